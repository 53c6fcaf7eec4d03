"""An ensemble that teaches one network: its probabilities for the very view that the student is learning from.

"Consistent teaching" (Beyer et al., 2022, "Knowledge distillation: A good teacher is patient and consistent",
arXiv:2106.05237), with a share of the labels kept (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upath import UPath

from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.features import Features, folded
from trainables.inference import autocast
from trainables.job import Lesson, LessonMember
from trainables.models.backbones import head_of
from trainables.models.weights import load_model, load_weights
from trainables.run_directory import read_candidate
from trainables.storage import read_array
from trainables.training.augment import Pixels
from trainables.training.head import fit_head

FLOOR = 1e-7


@dataclass(frozen=True, eq=False)
class _Voter:
    net: nn.Module
    pixels: Pixels
    size: int
    precision: str
    weight: float
    temperature: float


class Teacher:
    """The members of a lesson, with their weights loaded.

    In the end its members have seen all labelled images, those of tune and select among them. A student that learned
    from them could not be scored on these. So they are taken as they were before, and a probe's head is fitted again
    here, on the train split.
    """

    def __init__(
        self, lesson: Lesson, data: Data, splits: Splits, device: torch.device, tick: Callable[[], None]
    ) -> None:
        """Raises UserError when a member is gone or has no weights."""
        self.lesson = lesson
        self.voters = [self._voter(member, data, splits, device, tick) for member in lesson.members]
        self.unlabelled: np.ndarray | None = None
        if lesson.unlabelled:
            self.unlabelled = read_array(UPath(lesson.unlabelled), "u", 4)

    def _voter(
        self, member: LessonMember, data: Data, splits: Splits, device: torch.device, tick: Callable[[], None]
    ) -> _Voter:
        candidate = read_candidate(UPath(member.path))
        net, info = load_model(candidate, device), candidate.info
        config = info.config
        assert config is not None  # load_model has refused it
        assert info.mean is not None
        assert info.std is not None
        pixels, size = Pixels.of(info.mean, info.std, device), info.image_size or config.image_size
        if candidate.has_weights_before:
            net.load_state_dict(load_weights(candidate, before=True))
        elif info.refitted:
            features = Features(net, config, data, pixels, info.precision, None, tick)
            weigh = config.class_weights or config.balanced
            head, _ = fit_head(features.rows, data.labels, splits.train, splits.tune, len(data.classes), weigh, tick)
            layer = head_of(net)
            assert isinstance(layer, nn.Linear)
            with torch.no_grad():
                layer.weight.copy_(head.weight)
                layer.bias.copy_(head.bias)
        net = folded(net, pixels(torch.from_numpy(np.array(data.images[:2])).to(device), size))
        precision = "fp32" if info.precision == "fp16" and device.type != "cuda" else info.precision
        return _Voter(net, pixels, size, precision, member.weight, member.temperature)

    @torch.inference_mode()
    def __call__(self, x: Tensor, pixels: Pixels) -> Tensor:
        """What it says of a student's normalised images (N, 3, S, S): probabilities, float32 (N, C)."""
        plain = x.float() * pixels.std + pixels.mean
        mixed: Tensor | None = None
        for voter in self.voters:
            view = plain
            if view.shape[-1] != voter.size:
                shrinks = view.shape[-1] > voter.size
                view = F.interpolate(view, (voter.size, voter.size), mode="bilinear", antialias=shrinks)
            with autocast(x.device, voter.precision):
                logits = voter.net((view - voter.pixels.mean) / voter.pixels.std).float()
            own = voter.weight * F.softmax(logits / voter.temperature, dim=1)
            mixed = own if mixed is None else mixed + own
        assert mixed is not None
        return F.softmax(mixed.clamp_min(FLOOR).log() / (self.lesson.temperature * self.lesson.softness), dim=1)

    def targets(self, x: Tensor, pixels: Pixels, labels: Tensor) -> Tensor:
        """What the student is to say of these images: the teacher's answer, mixed with one-hot labels (N, C); of an
        image without a label (a row of zeros) the teacher's alone."""
        share = torch.where(labels.sum(dim=1, keepdim=True) > 0, self.lesson.share, 1.0)
        return share * self(x, pixels).clone() + (1 - share) * labels
