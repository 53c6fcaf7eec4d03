"""A network in training, and its optimiser step: what train() and lr_find repeat.

Under torch.distributed every rank holds a Learner of the same configuration and takes its share of each batch.
"""

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainables.config import TestTimeAugmentation, TrialConfig
from trainables.data.dataset import Data
from trainables.data.splits import Splits
from trainables.errors import UserError
from trainables.features import Features
from trainables.inference import autocast, pick_device, predict_probs
from trainables.job import Lesson, WeightSource
from trainables.models.adapters import add_adapters
from trainables.models.backbones import (
    build,
    check_image_size,
    head_of,
    keep_statistics,
    normalisation,
    recompute_activations,
    set_frozen,
    still_statistics,
)
from trainables.models.weights import read_pretrained
from trainables.training.augment import Pixels, augmented, mix
from trainables.training.compiled import Training, compiled, forget
from trainables.training.feed import Feed, rows_on
from trainables.training.head import Head, fit_at, fit_head, shared_head
from trainables.training.optim import lr_factor, make_optimizers
from trainables.training.precision import choose_layout, quicken
from trainables.training.teacher import Teacher

WHITENING_IMAGES = 2000


class Learner:
    """A network with everything that its training needs, on its device; ready once it is made.

    For every epoch call `begin_epoch`, and for each of the batches that it returns `set_lr` and `step`.

    Attributes:
        model, optimizers: plain torch.
        pixels: mean and std the inputs are normalised with.
        precision: "fp32", "bf16" or "fp16"; channels_last: the memory format of images and filters.
        accumulate: micro-batches per step.
        image_size: of the epoch, in pixels.
        lr: of the head, in the step set last.
        feed: brings images to the device.
        features: of the frozen body, where the head can be fed from them; None otherwise.
        strength: of the regularisation that the head was fitted with; None where it was not.
        cached: whether the epoch trains the head on stored features.
        rank, world: of this process, and how many there are.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: Data,
        splits: Splits,
        weights: WeightSource | None = None,
        device: str | None = None,
        deadline: float | None = None,
        tick: Callable[[], None] = lambda: None,
        state: dict[str, Any] | None = None,
        lesson: Lesson | None = None,
        recompute: bool = False,
        start: dict[str, Tensor] | None = None,
    ) -> None:
        """See train() for the arguments; `state` is an earlier Learner's `state_dict`, to continue from.

        Raises UserError for weights that are missing or do not fit, a batch larger than the train split, and an image
        size that does not go with the backbone; OutOfTime when the deadline passes before the head is fitted.
        """
        if config.batch_size > len(splits.train) and not config.is_probe:
            raise UserError(
                f"batch_size is {config.batch_size}, expected at most the train split's {len(splits.train)} images"
            )
        check_image_size(config)
        if config.pretrained and weights is None:
            raise UserError(f"{config.backbone} is to start from pretrained weights, but their source was not given")
        self.config, self.data, self.splits, self.tick = config, data, splits, tick
        self.teacher: Teacher | None = None
        self.device = pick_device(device)
        self.deadline = deadline
        quicken(self.device)
        forget()  # what an earlier trial in this process has compiled
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(config.seed)
        mean, std = normalisation(config.backbone, config.pretrained, data.mean, data.std)
        self.pixels = Pixels.of(mean, std, device=self.device)
        self.labels = torch.tensor(data.labels, device=self.device)
        pretrained = None
        if weights is not None and config.pretrained and start is None:
            pretrained = read_pretrained(config.backbone, weights)
        model = build(config, len(data.classes), pretrained)
        if start is not None:
            model.load_state_dict(start)
        elif hasattr(model, "prepare"):  # a whitening layer is set from the data
            sample = np.sort(np.random.default_rng(0).permutation(splits.train)[:WHITENING_IMAGES])
            images = rows_on(data.images, sample, self.device)
            model.prepare(self.pixels(images, config.image_size))  # type: ignore[operator]
        self.recompute = recompute and recompute_activations(model)
        self.model: nn.Module = model.to(self.device)
        if self.world > 1 and self.device.type == "cuda":
            self.model = with_synced_batchnorm(model)
        self.precision: str
        self.channels_last: bool
        self.precision, self.channels_last = self._layout() if state is None else state["layout"]
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.class_weights = _class_weights(data, splits).to(self.device) if config.class_weights else None
        self.accumulate = config.accumulate
        self.features: Features | None = None
        if config.pretrained and start is None:  # of the body as it stands now, which a checkpoint may change
            features = Features(self.model, config, data, self.pixels, self.precision, deadline, tick)
            self.features = features if features.usable else None
        if config.lora and not config.is_probe:
            add_adapters(self.model, config.lora)
        self.optimizers = make_optimizers(
            self.model, head_of(self.model), config.optimizer, config.lr, config.body_lr, config.layer_decay,
            config.weight_decay, config.momentum,
        )  # fmt: skip
        self.strength: float | None = None
        self.head: Head | None = None
        if state is not None:
            self._restore(state)
        elif self.features is not None:
            self.head, self.strength = self._fit_head(self.features, deadline)
            self._set_head(self.head)
        if lesson is not None:
            self.teacher = Teacher(lesson, data, splits, self.device, tick)
        unlabelled = None if self.teacher is None else self.teacher.unlabelled
        self.feed = Feed(data.images, unlabelled, self.device, data.fingerprint)
        self.forward: nn.Module = self.model
        self.may_compile = self.device.type == "cuda" and self.world == 1 and not (config.progressive or self.recompute)
        self.learns: set[int] = set()  # which parameters do, in the epoch
        self.epoch, self.cached, self.image_size, self.lr = 0, False, config.image_size, config.lr

    def _layout(self) -> tuple[str, bool]:
        """The precision and memory format that are fastest here; all ranks take rank 0's."""
        config = self.config
        layout = choose_layout(
            self.model, f"{config.backbone} {config.width} {config.stem}", config.image_size,
            config.batch_size // self.world, self.device, self.data.cache, config.precision,
            learns=not config.is_probe,
        )  # fmt: skip
        return self.agreed((layout.precision, layout.channels_last))

    # the head

    def _weighs(self) -> bool:
        return self.config.class_weights or self.config.balanced

    def _fit_head(self, features: Features, deadline: float | None) -> tuple[Head, float]:
        splits, classes = self.splits, len(self.data.classes)
        question = {
            **features.question, "flipped": features.is_flipped, "weighs": self._weighs(), "classes": classes,
            "rows": [
                hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()
                for rows in (splits.train, splits.tune) for array in (rows, self.data.labels[rows])
            ],
        }  # fmt: skip
        return shared_head(
            self.data.cache / "heads", question, tuple(head_of(self.model).weight.shape), self.device,  # type: ignore[arg-type, union-attr]
            lambda: fit_head(
                features.rows, self.data.labels, splits.train, splits.tune, classes, self._weighs(), self.tick, deadline
            ),
            deadline,
        )  # fmt: skip

    @torch.no_grad()
    def _set_head(self, head: Head) -> None:
        layer = head_of(self.model)
        assert isinstance(layer, nn.Linear)  # or its features would not be usable
        layer.weight.copy_(head.weight)
        if layer.bias is not None:
            layer.bias.copy_(head.bias)
        if self.world > 1:  # fitted on each rank, perhaps with other rounding
            for parameter in layer.parameters():
                dist.broadcast(parameter.data, src=0)

    def refit_head(self) -> None:
        """Fit the probe's head once more, at the same strength, on all labelled images: train, tune and select."""
        assert self.features is not None
        assert self.strength is not None
        rows = np.unique(np.concatenate([self.splits.train, self.splits.tune, self.splits.select]))
        classes = len(self.data.classes)
        (head,) = fit_at(
            self.features.rows, self.data.labels, rows, classes, (self.strength,), self._weighs(), self.tick
        )
        self._set_head(head)

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "layout": [self.precision, self.channels_last],
            "accumulate": self.accumulate,
            "strength": self.strength,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.accumulate = max(state["accumulate"], self.config.accumulate)  # doubled since, when memory ran out
        self.scaler.load_state_dict(state["scaler"])
        self.strength = state["strength"]

    # training

    def begin_epoch(self, epoch: int, step: int = 0) -> list[np.ndarray]:
        """Set what depends on the epoch: seeds, image size, what learns. Returns all its batches of image indices, of
        which the first `step` have been trained on."""
        config = self.config
        self.epoch, self.image_size = epoch, image_size_of(config, epoch)
        self.begin_tenth(step)
        is_frozen = epoch < config.freeze_epochs
        self.cached = is_frozen and self.features is not None
        self.model.train()
        set_frozen(self.model, is_frozen)
        if config.frozen_norm:
            keep_statistics(self.model)
        for group in self._groups():
            if not is_frozen and epoch - config.freeze_epochs >= group["until"] * config.epochs:
                for parameter in group["params"]:
                    parameter.requires_grad = False  # their gradient costs time, too
        self._wrap()
        rows = self.splits.train
        if self.teacher is not None and self.teacher.unlabelled is not None:
            rows = np.concatenate([rows, len(self.data.labels) + np.arange(len(self.teacher.unlabelled))])
        batches = _batches(config, self.data.labels, rows, epoch)
        if not self.cached:
            if self.may_compile and not is_frozen:
                self._compile(batches)
            self.feed.begin([self._share_of(batch) for batch in batches[step:]])
        return batches

    def begin_tenth(self, step: int) -> None:
        """Set the seeds anew, at a step where a tenth of the epoch begins: there a training can be continued."""
        seed, epoch = self.config.seed, self.epoch + 1
        drawn = (seed + 1_000_003 * epoch + 15_485_863 * step + self.rank) % 2**63  # for dropout and the like
        torch.default_generator.manual_seed(drawn)  # torch.manual_seed would note down a call stack for every GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(drawn)
        elif self.device.type == "mps":
            torch.mps.manual_seed(drawn)
        self.generator = torch.Generator().manual_seed(seed + 7_919 * epoch + 32_452_843 * step + 104_729 * self.rank)

    def _wrap(self) -> None:
        """Let the ranks' gradients meet; anew whenever other parameters learn than before."""
        learns = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        if self.world == 1 or learns == self.learns:
            return
        self.learns = learns
        self.forward = self.model if self.cached else DistributedDataParallel(self.model)

    def _compile(self, batches: list[np.ndarray]) -> None:
        """Let torch compile the network, once, if the steps that are left win back what that takes."""
        self.may_compile = False
        config = self.config
        sizes = {len(micro) for batch in (batches[0], batches[-1]) for micro in self._micro_batches(batch)}
        network = (config.backbone, config.width, config.stem, config.lora, config.dropout, config.drop_path)
        training = Training(
            " ".join(map(str, (*network, len(self.data.classes)))), tuple(sorted(sizes, reverse=True)),
            self.image_size, self.precision, self.accumulate > 1,
            steps=len(batches) * self.accumulate * (config.all_epochs - self.epoch),
            seconds=math.inf if self.deadline is None else max(0.0, self.deadline - time.time()),
        )  # fmt: skip
        self.forward = compiled(self.model, training, self.device, self.data.cache) or self.model

    def set_lr(self, at: float, factor: float = 1.0) -> None:
        """Set the schedule's learning rates, times `factor`, after `at` epochs.

        The head alone and the whole network have a schedule each, so the body starts from zero under a head that knows
        its features.
        """
        config = self.config
        is_frozen = at < config.freeze_epochs
        progress = at / config.freeze_epochs if is_frozen else (at - config.freeze_epochs) / config.epochs
        self.lr = config.lr * lr_factor(config.schedule, progress, config.warmup) * factor
        for group in self._groups():
            scheduled = lr_factor(config.schedule, progress / group["until"], config.warmup)
            group["lr"] = config.lr * group["lr_scale"] * scheduled * factor

    def step(self, batch: np.ndarray, progress: float) -> Tensor:
        """One optimiser step on a batch of image indices, after a share (0 to 1) of the training; returns the loss
        summed over this rank's share of the batch."""
        mine, micro_batches = self._share_of(batch), self._micro_batches(batch)
        loss_sum = torch.zeros((), device=self.device)
        many = len(micro_batches)
        images = [None] * many if self.cached else self.feed(mine).tensor_split(many)
        for micro, own in zip(micro_batches, images, strict=True):
            with nullcontext() if micro is micro_batches[-1] else self._without_sync():
                logits, targets = self._cached_logits(micro) if own is None else self._logits(own, micro, progress)
                loss = _loss(logits.float(), targets, self.config.label_smoothing, self.class_weights)
                # the sum over all ranks and micro-batches is the mean over the whole batch; DDP divides by `world`
                with still_statistics(self.model) if self.recompute else nullcontext():
                    self.scaler.scale(loss * (self.world / len(batch))).backward()
            loss_sum += loss.detach()
        if self.cached and self.world > 1:  # the head was fed past DDP
            for gradient in [p.grad for p in head_of(self.model).parameters() if p.grad is not None]:
                dist.all_reduce(gradient)
                gradient /= self.world
        # Muon has no gradients while the body is frozen, and a scaler insists on some
        learning = [optimizer for optimizer in self.optimizers if _has_gradients(optimizer)]
        if self.config.clip_norm:
            for optimizer in learning:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], self.config.clip_norm)
        for optimizer in learning:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return loss_sum

    def _logits(self, images: Tensor, micro: np.ndarray, progress: float) -> tuple[Tensor, Tensor]:
        targets = self._targets(micro)
        x = augmented(images, micro, self.config, self.image_size, self.epoch, self.generator, self.pixels)
        if self.teacher is not None:
            targets = self.teacher.targets(x, self.pixels, targets)
        x, targets = mix(x, targets, self.config, progress, self.generator)
        with autocast(self.device, self.precision):
            return self.forward(x), targets

    def _cached_logits(self, micro: np.ndarray) -> tuple[Tensor, Tensor]:
        assert self.features is not None
        return head_of(self.model)(self.features.batch(micro, self.epoch, self.generator)), self._targets(micro)

    def _micro_batches(self, batch: np.ndarray) -> list[np.ndarray]:
        """The parts in which this rank's share of a batch goes through the network."""
        return np.array_split(self._share_of(batch), min(self.accumulate, max(1, len(batch) // self.world)))

    def _share_of(self, batch: np.ndarray) -> np.ndarray:
        """This rank's images of a batch."""
        return batch[self.rank :: self.world]

    def _targets(self, indices: np.ndarray) -> Tensor:
        rows = torch.from_numpy(indices).to(self.device, non_blocking=True)
        known = rows < len(self.labels)  # an image without a label has a row of zeros
        labels = self.labels[torch.where(known, rows, 0)]
        return F.one_hot(labels, len(self.data.classes)).float() * known[:, None]

    def _without_sync(self) -> Any:
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else nullcontext()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    # predictions

    def predict(self, indices: np.ndarray, tta: TestTimeAugmentation = "none") -> np.ndarray:
        """Class probabilities, float32 (N, C), of data.images[indices] by the model as it stands.

        Each rank predicts its share, with rank 0's BatchNorm statistics, and all get the whole. While the body has not
        learned, stored features are enough, but for shifted views.
        """
        if self.features is not None and (self.cached or self.config.is_probe) and tta != "mirror_shift":
            return self.features.probs(indices, head_of(self.model), tta == "mirror")
        if self.world == 1:
            return self._predict(indices, tta)
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)
        shares: list[Any] = [None] * self.world
        dist.all_gather_object(shares, self._predict(np.array_split(indices, self.world)[self.rank], tta))
        return np.concatenate(shares)

    def _predict(self, indices: np.ndarray, tta: TestTimeAugmentation) -> np.ndarray:
        return predict_probs(
            self.model, self.feed.images, indices, self.pixels, self.image_size, tta, self.precision, tick=self.tick
        )

    # agreement between ranks

    def agreed(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def over_ranks(self, values: list[float], largest: bool = False) -> list[float]:
        """Sums, or largest values, over all ranks."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, device="cuda" if dist.get_backend() == "nccl" else "cpu", dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor.tolist()


def with_synced_batchnorm(model: nn.Module) -> nn.Module:
    """The model with BatchNorms that take their statistics over all ranks, each with the activation that it had.

    Not torch's own conversion: it takes timm's BatchNormAct2d for a plain BatchNorm and drops the activation inside.
    """
    return convert_sync_batchnorm(model)


def tenths(steps: int) -> tuple[int, ...]:
    """The steps at which each tenth of an epoch with `steps` steps begins; every step when there are fewer than ten."""
    return tuple(sorted({round(number * steps / 10) for number in range(10)}))


def image_size_of(config: TrialConfig, epoch: int) -> int:
    """The image size of an epoch: progressive sizes are spread evenly over those of the whole network."""
    if not config.progressive:
        return config.image_size
    at = max(0, epoch - config.freeze_epochs)
    return config.progressive[min(len(config.progressive) - 1, at * len(config.progressive) // max(1, config.epochs))]


def _batches(config: TrialConfig, labels: np.ndarray, train: np.ndarray, epoch: int) -> list[np.ndarray]:
    """The epoch's batches of image indices, of nearly equal size: no image is dropped and no batch is tiny.

    Their number is rounded, so with few of them they may be up to half as large again as config.batch_size.
    """
    rng = np.random.default_rng((config.seed, epoch))
    if config.balanced:
        counts = np.bincount(labels[train])
        chances = 1.0 / counts[labels[train]]
        order = rng.choice(train, size=len(train), p=chances / chances.sum())
    else:
        order = rng.permutation(train)
    return np.array_split(order, max(1, round(len(order) / config.batch_size)))


def _loss(logits: Tensor, targets: Tensor, smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Cross-entropy with soft targets (N, C), summed over the batch."""
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    if class_weights is not None:
        targets = targets * class_weights
    return -(targets * F.log_softmax(logits, dim=1)).sum()


def _class_weights(data: Data, splits: Splits) -> Tensor:
    """Inverse class frequencies in the train split, float (C,), scaled so that an average image weighs 1."""
    counts = np.bincount(data.labels[splits.train], minlength=len(data.classes))
    weights = counts.sum() / np.maximum(1, counts) / len(counts)
    return torch.tensor(weights, dtype=torch.float32)


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
