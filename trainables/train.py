"""train(config, data, splits, report): THE training loop. Plain PyTorch; Ray is nowhere in it.

Every epoch's randomness is a function of (seed, epoch), so a run that was cut and resumed from its checkpoint ends in
the same weights as one that was not (on a CPU, to the bit). Under torch.distributed every rank calls train() with the
same arguments and takes its share of each batch.
"""

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from upath import UPath

from trainables.augment import Pixels, augment, cutout, mix
from trainables.averaging import WeightAverage
from trainables.backbones import WeightSource, build, head_of, normalisation, set_frozen
from trainables.candidate import write_bytes
from trainables.config import TrialConfig
from trainables.data import Data
from trainables.errors import UserError
from trainables.features import FrozenFeatures
from trainables.inference import autocast, pick_device, predict_probs, scores
from trainables.optim import lr_factor, make_optimizers
from trainables.precision import choose_layout
from trainables.splits import Splits

PLATEAU_EPOCHS = 2
EXPLODED = 10.0  # an epoch's mean loss of that many times ln(classes) is not going to come back

Report = Callable[[dict[str, Any]], bool]


class Diverged(RuntimeError):
    """The loss became NaN, infinite, or far worse than guessing."""


@dataclass
class Trained:
    """What train() leaves: the network, how it came about, and its predictions.

    Attributes:
        model: in eval mode, with the weights that are evaluated (averaged or best ones when the config asks).
        probs: split name ("tune", "select") -> float32 (N, C), with the config's test-time augmentation.
        metrics: accuracy, log-loss and size by split, as in `scores`.
        curve: one dict per epoch, as reported.
        pixels: mean and std the inputs are normalised with.
        precision, accumulate: what was really used.
        seconds: spent in training steps and evaluation, over all resumptions.
        resumed: after which epochs it was continued from a checkpoint.
        image_size: side in pixels at which the predictions were made.
        outcome: "finished", "pruned" (report() said stop: then without probs), or "time" (cut at the deadline).
    """

    model: nn.Module
    probs: dict[str, np.ndarray]
    metrics: dict[str, Any]
    curve: list[dict[str, Any]]
    pixels: Pixels
    precision: str
    accumulate: int
    seconds: float
    resumed: list[int]
    image_size: int
    outcome: str


@dataclass
class _Progress:
    """Where a trial stands; with the tensors, this is its checkpoint."""

    epoch: int = 0  # epochs done
    seconds: float = 0.0
    accumulate: int = 1
    precision: str = ""
    channels_last: bool = True
    plateau_factor: float = 1.0
    since_best: int = 0
    best_log_loss: float = math.inf
    curve: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)


def train(
    config: TrialConfig,
    data: Data,
    splits: Splits,
    report: Report = lambda metrics: False,
    *,
    weights: WeightSource | None = None,
    checkpoint: UPath | None = None,
    deadline: float | None = None,
    device: str | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Trained:
    """Train one network and predict the tune and select splits with it.

    Args:
        config: the hyperparameters.
        data, splits: uint8 images (N, H, W, 3), labels (N,), and indices of the splits. Test images are not in them.
        report: called on every rank after each epoch with tune scores; returns True to abandon the trial.
        weights: source of pretrained weights; needed when config.pretrained.
        checkpoint: file that is written after each epoch but the last, and continued from when it exists.
        deadline: time.time() after which the running epoch is ended early and the trial finishes with what it has.
        tick: called at every step, as a sign of life.

    Raises Diverged; torch.OutOfMemoryError when even a micro-batch of one image does not fit; UserError for weights
    that do not fit.
    """
    place = pick_device(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    _seed(config.seed)
    pixels = Pixels.of(*normalisation(config.backbone, config.pretrained, data.mean, data.std), device=place)
    model = build(config, len(data.classes), weights)
    if config.pretrained and weights is None:
        raise UserError(f"{config.backbone} is to start from pretrained weights, but their source was not given")
    if hasattr(model, "prepare"):  # a whitening layer is set from the data
        sample = np.sort(np.random.default_rng(0).permutation(splits.train)[:2000])
        model.prepare(pixels_of(data.images[sample], pixels, config.image_size))  # type: ignore[operator]
    model.to(place)
    if world > 1 and place.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizers = make_optimizers(
        model, head_of(model), config.optimizer, config.lr, config.body_lr, config.layer_decay,
        config.weight_decay, config.momentum,
    )  # fmt: skip
    average = WeightAverage.of(model, config)
    best = None  # weights of the best epoch, when config.patience asks for them
    progress = _Progress(accumulate=config.accumulate)

    # what is cached is decided before the checkpoint changes the head: a resumed run must decide alike
    frozen = FrozenFeatures(model, config, data, weights, pixels, deadline, tick) if config.freeze_epochs else None
    state = None
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(io.BytesIO(checkpoint.read_bytes()), map_location=place, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average.load_state_dict(state["average"])
        best = state["best"]
        progress = _Progress(**state["progress"])
        progress.resumed.append(progress.epoch)
        progress.accumulate = max(progress.accumulate, config.accumulate)  # doubled since, when memory ran out
    else:
        cache = data.path.parent.parent
        layout = choose_layout(
            model, f"{config.backbone} {config.width} {config.stem}", config.image_size, config.batch_size // world,
            place, cache, config.precision,
        )  # fmt: skip
        progress.precision, progress.channels_last = _agreed([layout.precision, layout.channels_last], world)
    if progress.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(place.type, enabled=progress.precision == "fp16")
    if state is not None:
        scaler.load_state_dict(state["scaler"])
    if frozen is not None:
        frozen.precision = progress.precision
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    some_rest = config.freeze_epochs > 0 or any(group["until"] < 1 for group in groups)
    forward = DistributedDataParallel(model, find_unused_parameters=some_rest) if world > 1 else model
    class_weights = _class_weights(data, splits, place) if config.class_weights else None

    outcome, use_cache = "finished", False
    while progress.epoch < config.epochs:
        epoch, started = progress.epoch, time.perf_counter()
        _seed(config.seed + 1_000_003 * (epoch + 1) + rank)  # dropout and the like
        generator = torch.Generator().manual_seed(config.seed + 7_919 * (epoch + 1) + 104_729 * rank)
        is_frozen = epoch < config.freeze_epochs
        size = _image_size(config, epoch)
        batches = _batches(config, data.labels, splits.train, epoch)
        model.train()
        set_frozen(model, is_frozen)
        for group in groups:
            if epoch >= group["until"] * config.epochs:
                for parameter in group["params"]:
                    parameter.requires_grad = False  # their gradient costs time, too
        # cached steps go past DDP, which would leave every rank with a head of its own
        use_cache = is_frozen and frozen is not None and frozen.usable and world == 1
        total_loss, seen = torch.zeros((), device=place), 0
        for step, batch in enumerate(batches):
            tick()
            at = (epoch + step / len(batches)) / config.epochs
            for group in groups:
                factor = lr_factor(config.schedule, at / group["until"], config.warmup) * progress.plateau_factor
                group["lr"] = config.lr * group["lr_scale"] * factor
            mine = batch[rank::world]
            loss_sum = torch.zeros((), device=place)
            for micro in _micro_batches(mine, min(progress.accumulate, max(1, len(batch) // world))):
                targets = _targets(data.labels[micro], len(data.classes), place)
                if use_cache and frozen is not None:
                    logits = frozen.logits(micro, epoch, generator)
                else:
                    images = torch.from_numpy(np.ascontiguousarray(data.images[micro])).to(place, non_blocking=True)
                    x = pixels(augment(images, micro, config, epoch, generator), size)
                    if config.cutout:
                        x = cutout(x, config.cutout, generator)
                    if config.mixup or config.cutmix:
                        x, targets = mix(x, targets, config, generator)
                    with autocast(place, progress.precision):
                        logits = forward(x)
                loss = _loss(logits.float(), targets, config.label_smoothing, class_weights)
                # the sum over all ranks and micro-batches is the mean over the whole batch; DDP divides by `world`
                scaler.scale(loss * (world / len(batch))).backward()
                loss_sum += loss.detach()
            if config.clip_norm:
                for optimizer in filter(_has_gradients, optimizers):
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], config.clip_norm)
            for optimizer in optimizers:
                if _has_gradients(optimizer):  # Muon has none while the body is frozen, and a scaler insists on some
                    scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            average.update(model, at)
            total_loss, seen = total_loss + loss_sum, seen + len(mine)
            if place.type == "cpu" and world == 1 and not math.isfinite(float(loss_sum)):
                raise Diverged(f"loss is {float(loss_sum)} in epoch {epoch + 1}, step {step + 1}")
            if _past(deadline, step, world):
                outcome = "time"
                break

        train_loss = _mean_over_ranks(float(total_loss), seen)
        if not math.isfinite(train_loss) or train_loss > EXPLODED * math.log(max(3, len(data.classes))):
            raise Diverged(f"mean training loss {train_loss:.3g} after epoch {epoch + 1}")
        seconds = time.perf_counter() - started
        tune: dict[str, Any] = {}
        if len(splits.tune):  # a refit holds nothing out
            with average.applied(model):
                if use_cache and frozen is not None and not average.active:
                    tune_probs = frozen.probs(splits.tune)
                else:
                    tune_probs = predict_probs(
                        model, data.images, splits.tune, pixels, size, precision=progress.precision, tick=tick
                    )
            # BatchNorm statistics differ a little between ranks; what decides must not
            tune = _agreed(scores(tune_probs, data.labels[splits.tune], "tune"), world)
            if not math.isfinite(float(tune["tune_log_loss"])):
                raise Diverged(f"predictions are not numbers after epoch {epoch + 1}")
        progress.epoch += 1
        progress.seconds += time.perf_counter() - started
        progress.curve.append(
            {"epoch": progress.epoch, "train_loss": train_loss, **tune, "seconds": round(progress.seconds, 3),
             "images_per_second": round(seen * world / seconds, 1)}
        )  # fmt: skip
        if tune and tune["tune_log_loss"] < progress.best_log_loss:
            progress.best_log_loss, progress.since_best = float(tune["tune_log_loss"]), 0
            if config.patience:
                with average.applied(model):
                    best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        else:
            progress.since_best += 1
            if config.schedule == "plateau" and progress.since_best % PLATEAU_EPOCHS == 0:
                progress.plateau_factor /= 2
        last = outcome == "time" or progress.epoch == config.epochs
        last = last or bool(config.patience and progress.since_best >= config.patience)
        if checkpoint is not None and not last and rank == 0:
            buffer = io.BytesIO()
            torch.save(
                {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "average": average.state_dict(), "best": best, "scaler": scaler.state_dict(),
                 "progress": vars(progress)},
                buffer,
            )  # fmt: skip
            write_bytes(checkpoint, buffer.getvalue())
        if report(progress.curve[-1]) and not last:
            outcome = "pruned"
            break
        if last:
            break

    image_size = _image_size(config, progress.epoch - 1)
    average.apply(model)
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    probs: dict[str, np.ndarray] = {}
    metrics: dict[str, Any] = {}
    if outcome != "pruned":
        for split, indices in (("tune", splits.tune), ("select", splits.select)):
            if not len(indices):
                continue
            if split == "select" and splits.shared:
                probs["select"] = probs["tune"]
            elif use_cache and frozen is not None and config.tta == "none" and not average.active:
                probs[split] = frozen.probs(indices)  # the body never learned, so its features still hold
            else:
                probs[split] = predict_probs(
                    model, data.images, indices, pixels, image_size, config.tta,
                    progress.precision, tick=tick,
                )  # fmt: skip
            metrics.update(scores(probs[split], data.labels[indices], split))
    return Trained(
        model, probs, metrics, progress.curve, pixels, progress.precision, progress.accumulate,
        progress.seconds, progress.resumed, image_size, outcome,
    )  # fmt: skip


def pixels_of(images: np.ndarray, pixels: Pixels, size: int) -> Tensor:
    """uint8 (N, H, W, 3) numpy images as the network sees them, on the device of `pixels`."""
    return pixels(torch.from_numpy(np.array(images)).to(pixels.mean.device), size)


def _seed(seed: int) -> None:
    torch.manual_seed(seed % 2**63)


def _batches(config: TrialConfig, labels: np.ndarray, train: np.ndarray, epoch: int) -> list[np.ndarray]:
    """The epoch's batches of image indices, of nearly equal size: no image is dropped and no batch is tiny."""
    rng = np.random.default_rng((config.seed, epoch))
    if config.balanced:
        counts = np.bincount(labels[train])
        chances = 1.0 / counts[labels[train]]
        order = rng.choice(train, size=len(train), p=chances / chances.sum())
    else:
        order = rng.permutation(train)
    return np.array_split(order, max(1, round(len(order) / config.batch_size)))


def _micro_batches(batch: np.ndarray, accumulate: int) -> list[np.ndarray]:
    return [part for part in np.array_split(batch, accumulate) if len(part)]


def _targets(labels: np.ndarray, classes: int, device: torch.device) -> Tensor:
    return F.one_hot(torch.from_numpy(np.ascontiguousarray(labels)), classes).float().to(device, non_blocking=True)


def _loss(logits: Tensor, targets: Tensor, smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Cross-entropy with soft targets (N, C), summed over the batch."""
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    if class_weights is not None:
        targets = targets * class_weights
    return -(targets * F.log_softmax(logits, dim=1)).sum()


def _class_weights(data: Data, splits: Splits, device: torch.device) -> Tensor:
    """Inverse class frequencies in the train split, float (C,), scaled so that an average image weighs 1."""
    counts = np.bincount(data.labels[splits.train], minlength=len(data.classes))
    weights = counts.sum() / np.maximum(1, counts) / len(counts)
    return torch.tensor(weights, dtype=torch.float32, device=device)


def _image_size(config: TrialConfig, epoch: int) -> int:
    """The image size of an epoch: progressive sizes are spread evenly over the epochs."""
    if not config.progressive:
        return config.image_size
    return config.progressive[min(len(config.progressive) - 1, epoch * len(config.progressive) // config.epochs)]


def _past(deadline: float | None, step: int, world: int) -> bool:
    """Whether the deadline has passed, decided by all ranks together (every 20 steps when there are several)."""
    if deadline is None:
        return False
    if world == 1:
        return time.time() > deadline
    if step % 20:
        return False
    flag = torch.tensor([float(time.time() > deadline)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _agreed(value: Any, world: int) -> Any:
    """Rank 0's value on every rank."""
    if world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _mean_over_ranks(total: float, count: int) -> float:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return total / max(1, count)
    pair = torch.tensor([total, float(count)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(pair)
    return float(pair[0] / pair[1].clamp_min(1))
