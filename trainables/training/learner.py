"""A network in training, and its optimiser step: what train() and lr_find repeat.

Under torch.distributed every rank holds a Learner of the same configuration and takes its share of each batch.
"""

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
from trainables.features import FrozenFeatures
from trainables.inference import autocast, pick_device, predict_probs
from trainables.job import WeightSource
from trainables.models.backbones import build, check_image_size, head_of, normalisation, set_frozen
from trainables.models.weights import read_pretrained
from trainables.training.augment import Pixels, augment, cutout, mix
from trainables.training.optim import lr_factor, make_optimizers
from trainables.training.precision import choose_layout

WHITENING_IMAGES = 2000


class Learner:
    """A network with everything that its training needs, on its device.

    Call `choose_layout` or `load_state_dict` first, then `begin_epoch` and, for each of the batches that it returns,
    `set_lr` and `step`.

    Attributes:
        model, optimizers: plain torch.
        pixels: mean and std the inputs are normalised with.
        precision: "fp32", "bf16" or "fp16"; channels_last: the memory format of images and filters.
        accumulate: micro-batches per step.
        image_size: of the epoch, in pixels.
        lr: of the head, in the step set last.
        cached: whether the epoch trains the head on stored features; see features.py.
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
    ) -> None:
        """See train() for the arguments.

        Raises UserError for weights that are missing or do not fit, a batch larger than the train split, and an image
        size that does not go with the backbone.
        """
        if config.batch_size > len(splits.train):
            raise UserError(
                f"batch_size is {config.batch_size}, expected at most the train split's {len(splits.train)} images"
            )
        check_image_size(config)
        if config.pretrained and weights is None:
            raise UserError(f"{config.backbone} is to start from pretrained weights, but their source was not given")
        self.config, self.data, self.splits, self.tick = config, data, splits, tick
        self.device = pick_device(device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(config.seed)
        mean, std = normalisation(config.backbone, config.pretrained, data.mean, data.std)
        self.pixels = Pixels.of(mean, std, device=self.device)
        model = build(config, len(data.classes), None if weights is None else read_pretrained(config.backbone, weights))
        if hasattr(model, "prepare"):  # a whitening layer is set from the data
            sample = np.sort(np.random.default_rng(0).permutation(splits.train)[:WHITENING_IMAGES])
            model.prepare(self.pixels(self._images(sample), config.image_size))  # type: ignore[operator]
        model.to(self.device)
        if self.world > 1 and self.device.type == "cuda":
            model = with_synced_batchnorm(model)
        self.model: nn.Module = model
        self.optimizers = make_optimizers(
            model, head_of(model), config.optimizer, config.lr, config.body_lr, config.layer_decay,
            config.weight_decay, config.momentum,
        )  # fmt: skip
        self.class_weights = _class_weights(data, splits).to(self.device) if config.class_weights else None
        self.accumulate = config.accumulate
        # what is cached is decided before a checkpoint changes the head: a resumed run must decide alike
        self.features = (
            FrozenFeatures(model, config, data, weights, self.pixels, deadline, tick) if config.freeze_epochs else None
        )
        self.cached, self.image_size, self.lr = False, config.image_size, config.lr

    # precision, memory format, checkpoints

    def choose_layout(self) -> None:
        """Take the precision and memory format that are fastest here; all ranks take rank 0's."""
        config = self.config
        layout = choose_layout(
            self.model, f"{config.backbone} {config.width} {config.stem}", config.image_size,
            config.batch_size // self.world, self.device, self.data.cache, config.precision,
        )  # fmt: skip
        self._lay_out(*self.agreed([layout.precision, layout.channels_last]))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
            "channels_last": self.channels_last,
            "accumulate": self.accumulate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.accumulate = max(state["accumulate"], self.config.accumulate)  # doubled since, when memory ran out
        self._lay_out(state["precision"], state["channels_last"])
        self.scaler.load_state_dict(state["scaler"])

    def _lay_out(self, precision: str, channels_last: bool) -> None:
        self.precision, self.channels_last = precision, channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        if self.features is not None:
            self.features.precision = precision
        self.forward = self.model
        if self.world > 1:
            some_rest = self.config.freeze_epochs > 0 or any(group["until"] < 1 for group in self._groups())
            self.forward = DistributedDataParallel(self.model, find_unused_parameters=some_rest)

    # training

    def begin_epoch(self, epoch: int) -> list[np.ndarray]:
        """Set what depends on the epoch: seeds, image size, what learns. Returns its batches of image indices."""
        config = self.config
        self.epoch, self.image_size = epoch, image_size_of(config, epoch)
        torch.manual_seed((config.seed + 1_000_003 * (epoch + 1) + self.rank) % 2**63)  # dropout and the like
        self.generator = torch.Generator().manual_seed(config.seed + 7_919 * (epoch + 1) + 104_729 * self.rank)
        is_frozen = epoch < config.freeze_epochs
        self.cached = is_frozen and self.features is not None and self.features.usable
        self.model.train()
        set_frozen(self.model, is_frozen)
        for group in self._groups():
            if epoch >= group["until"] * config.epochs:
                for parameter in group["params"]:
                    parameter.requires_grad = False  # their gradient costs time, too
        return _batches(config, self.data.labels, self.splits.train, epoch)

    def set_lr(self, progress: float, factor: float = 1.0) -> None:
        """The schedule's learning rates after `progress` (0 to 1) of the training, times `factor`."""
        config = self.config
        self.lr = config.lr * lr_factor(config.schedule, progress, config.warmup) * factor
        for group in self._groups():
            scheduled = lr_factor(config.schedule, progress / group["until"], config.warmup)
            group["lr"] = config.lr * group["lr_scale"] * scheduled * factor

    def step(self, batch: np.ndarray) -> Tensor:
        """One optimiser step on a batch of image indices; returns the loss summed over this rank's share of it."""
        mine = batch[self.rank :: self.world]
        loss_sum = torch.zeros((), device=self.device)
        micro_batches = np.array_split(mine, min(self.accumulate, max(1, len(batch) // self.world)))
        for micro in micro_batches:
            with nullcontext() if micro is micro_batches[-1] else self._without_sync():
                logits, targets = self._cached_logits(micro) if self.cached else self._logits(micro)
                loss = _loss(logits.float(), targets, self.config.label_smoothing, self.class_weights)
                # the sum over all ranks and micro-batches is the mean over the whole batch; DDP divides by `world`
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

    def _logits(self, micro: np.ndarray) -> tuple[Tensor, Tensor]:
        config = self.config
        targets = self._targets(micro)
        x = self.pixels(augment(self._images(micro), micro, config, self.epoch, self.generator), self.image_size)
        if config.cutout:
            x = cutout(x, config.cutout, self.generator)
        if config.mixup or config.cutmix:
            x, targets = mix(x, targets, config, self.generator)
        with autocast(self.device, self.precision):
            return self.forward(x), targets

    def _cached_logits(self, micro: np.ndarray) -> tuple[Tensor, Tensor]:
        assert self.features is not None
        return self.features.logits(micro, self.epoch, self.generator), self._targets(micro)

    def _images(self, indices: np.ndarray) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(self.data.images[indices]))
        return images.to(self.device, non_blocking=True)

    def _targets(self, indices: np.ndarray) -> Tensor:
        labels = torch.from_numpy(np.ascontiguousarray(self.data.labels[indices]))
        return F.one_hot(labels, len(self.data.classes)).float().to(self.device, non_blocking=True)

    def _without_sync(self) -> Any:
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else nullcontext()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    # predictions

    def predict(self, indices: np.ndarray, tta: TestTimeAugmentation = "none") -> np.ndarray:
        """Class probabilities, float32 (N, C), of data.images[indices] by the model as it stands.

        Each rank predicts its share, with rank 0's BatchNorm statistics, and all get the whole.
        """
        if self.cached and tta == "none":  # the body has never learned, so its features hold
            assert self.features is not None
            return self.features.probs(indices)
        if self.world == 1:
            return self._predict(indices, tta)
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)
        shares: list[Any] = [None] * self.world
        dist.all_gather_object(shares, self._predict(np.array_split(indices, self.world)[self.rank], tta))
        return np.concatenate(shares)

    def _predict(self, indices: np.ndarray, tta: TestTimeAugmentation) -> np.ndarray:
        return predict_probs(
            self.model, self.data.images, indices, self.pixels, self.image_size, tta, self.precision, tick=self.tick
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


def image_size_of(config: TrialConfig, epoch: int) -> int:
    """The image size of an epoch: progressive sizes are spread evenly over the epochs."""
    if not config.progressive:
        return config.image_size
    return config.progressive[min(len(config.progressive) - 1, epoch * len(config.progressive) // config.epochs)]


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
