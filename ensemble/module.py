"""An ensemble as one nn.Module, from uint8 images to probabilities: what ensemble.export writes to a file.

It computes in fp32 what `Voters` computes in the members' own precision and numpy.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upath import UPath

from ensemble.ensemble import Ensemble
from ensemble.metrics import FLOOR
from trainables.augment import Pixels
from trainables.backbones import load_model
from trainables.inference import view_logits
from trainables.run_directory import Candidate

LOG_FLOOR = float(torch.tensor(FLOOR).log())


class MemberModule(nn.Module):
    """One member with its preprocessing: uint8 (N, H, W, 3) to log-probabilities, float32 (N, C)."""

    mean: Tensor
    std: Tensor

    def __init__(self, candidate: Candidate, temperature: float) -> None:
        super().__init__()
        self.network = load_model(candidate)
        info = candidate.info
        assert info.config is not None  # load_model has refused it
        assert info.mean is not None
        assert info.std is not None
        self.size = info.image_size or info.config.image_size
        self.tta = info.config.tta
        self.temperature = temperature
        pixels = Pixels.of(info.mean, info.std, torch.device("cpu"))
        self.register_buffer("mean", pixels.mean)
        self.register_buffer("std", pixels.std)

    def forward(self, images: Tensor) -> Tensor:
        logits = view_logits(self.network, images, Pixels(self.mean, self.std), self.size, self.tta)
        return scale_logs(F.log_softmax(logits, dim=1), self.temperature)


class EnsembleModule(nn.Module):
    """All members of an ensemble and how they combine: uint8 (N, H, W, 3) to probabilities, float32 (N, C).

    (H, W) is the size to which the run's data set was decoded. Raises UserError when a member or its weights are gone.
    """

    coefficients: Tensor
    intercept: Tensor

    def __init__(self, runs: Sequence[UPath], ensemble: Ensemble) -> None:
        super().__init__()
        members = [member for member in ensemble.members if member.weight > 0]
        self.members = nn.ModuleList(MemberModule(m.candidate(runs), m.temperature) for m in members)
        self.weights = [member.weight for member in members]
        self.temperature = ensemble.temperature
        self.stacked = ensemble.stack is not None
        if ensemble.stack is not None:
            coefficients = torch.from_numpy(ensemble.stack.coefficients).float()  # (C, K, C)
            self.register_buffer("coefficients", coefficients.permute(1, 2, 0).contiguous())
            self.register_buffer("intercept", torch.from_numpy(ensemble.stack.intercept).float())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logs = [member(images) for member in self.members]
        if self.stacked:
            votes = [log.clamp(min=LOG_FLOOR) @ self.coefficients[k] for k, log in enumerate(logs)]
            together = F.log_softmax(torch.stack(votes).sum(0) + self.intercept, dim=1)
        else:
            shares = [weight * log.exp() for weight, log in zip(self.weights, logs, strict=True)]
            together = torch.stack(shares).sum(0).log()
        return scale_logs(together, self.temperature).exp()


def scale_logs(logs: Tensor, temperature: float) -> Tensor:
    """What `ensemble.blend.scale` does to probabilities, on their logarithms (N, C)."""
    return logs if temperature == 1 else F.log_softmax(logs.clamp(min=LOG_FLOOR) / temperature, dim=1)
