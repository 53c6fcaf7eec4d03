"""Measures what candidates take for one image, all of them together: each kind of network once, in turns."""

import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainables.command import progress
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.inference import pick_device, predict_probs
from trainables.models.backbones import build, check_backbone
from trainables.run.latencies import Latencies, Latency
from trainables.run_directory import Candidate
from trainables.training.augment import Pixels

ROUNDS = 7
RESTLESS = 3.0  # times the fastest round that the slowest takes, from which on a machine was not quiet
AT_A_TIME = 8  # networks that are held in memory
Kind = tuple[str, float, str, int, str, str]


def measure_latencies(
    candidates: Sequence[Candidate], shape: tuple[int, ...], classes: int, device: str | None = None
) -> Latencies:
    """Milliseconds of every candidate that says which network it is, for one image as it is predicted in the end: from
    stored pixels of this shape (H, W, 3), with its test-time augmentation, in its precision.

    Networks that differ in nothing that matters for that have one figure. Weights do not matter, and are not read.
    """
    place = pick_device(device)
    by_kind: dict[Kind, list[str]] = {}
    for candidate in candidates:
        if (kind := _kind(candidate)) is not None:
            by_kind.setdefault(kind, []).append(candidate.id)
    kinds = sorted(by_kind)
    found: dict[str, Latency] = {}
    with progress("measuring latency", len(kinds)) as advance:
        for start in range(0, len(kinds), AT_A_TIME):
            some = kinds[start : start + AT_A_TIME]
            for kind, latency in zip(some, _measure(some, shape, classes, place), strict=True):
                found |= dict.fromkeys(by_kind[kind], latency)
            advance(len(some))
    device = describe_device(place)
    if found and statistics.median(latency.high / latency.low for latency in found.values()) > RESTLESS:
        device += ", beside other work"  # so that nobody takes these figures for the network's
    return Latencies(device, found)


def describe_device(place: torch.device) -> str:
    """A device in words: the card's name, or the processor's and the number of its threads."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads" if place.type == "cpu" else place.type


def _kind(candidate: Candidate) -> Kind | None:
    info, config = candidate.info, candidate.info.config
    if config is None or info.num_classes is None:
        return None
    try:
        check_backbone(config.backbone)
    except UserError:  # of another tool
        return None
    precision = info.precision if info.precision != "fp16" or torch.cuda.is_available() else "fp32"
    return (config.backbone, config.width, config.stem, info.image_size or config.image_size, config.tta, precision)


def _build(kind: Kind, classes: int) -> nn.Module:
    backbone, width, stem, size, _, _ = kind
    return build(TrialConfig(backbone=backbone, width=width, stem=stem, image_size=size), classes)  # type: ignore[arg-type]


def _measure(kinds: Sequence[Kind], shape: tuple[int, ...], classes: int, place: torch.device) -> list[Latency]:
    pixels = Pixels.of((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), place)
    image = np.random.default_rng(0).integers(0, 256, (1, *shape), np.uint8)
    nets = [_build(kind, classes).to(place).eval() for kind in kinds]

    def seconds(net: nn.Module, kind: Kind) -> float:
        began = time.perf_counter()
        predict_probs(net, image, None, pixels, kind[3], kind[4], kind[5])  # type: ignore[arg-type]
        return time.perf_counter() - began  # the probabilities are on the CPU by then

    for net, kind in zip(nets, kinds, strict=True):
        seconds(net, kind)  # the first time is another matter
    rounds = [[1000 * seconds(net, kind) for net, kind in zip(nets, kinds, strict=True)] for _ in range(ROUNDS)]
    return [
        Latency(*(round(f(times), 3) for f in (statistics.median, min, max)))
        for times in zip(*rounds, strict=True)
    ]  # fmt: skip
