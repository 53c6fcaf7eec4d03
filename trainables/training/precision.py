"""Which precision and memory layout is fastest here: known of a GPU; on a CPU measured on a few steps.

On a CPU with AVX512-BF16, bf16 autocast makes a ResNet-like net 2.5x faster and EfficientNet-lite 1.5x slower, so no
rule by device alone is right. The answer is kept on the node, for every trial of a sweep asks the same few questions.
"""

import hashlib
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from trainables.inference import autocast
from trainables.training.memory import keep_memory

PROBE_IMAGES = 16
PROBE_ROUNDS = 2
SLOW_BF16 = ("AVX2", "DEFAULT", "NO AVX")  # what such a processor has not in hardware
WORTHWHILE = 0.9  # bf16 must take at most this share of fp32's time: it costs a little accuracy


@dataclass(frozen=True)
class Layout:
    """`precision` "fp32", "bf16" or "fp16"; `channels_last` the memory format of images and filters."""

    precision: str
    channels_last: bool


def choose_layout(
    model: nn.Module,
    name: str,
    image_size: int,
    batch_size: int,
    device: torch.device,
    cache: Path,
    asked: str = "auto",
    learns: bool = True,
) -> Layout:
    """The fastest safe layout for training `model`, or for its features alone where nothing `learns`.

    `asked` other than "auto" fixes the precision.

    On CUDA nothing is measured: bf16 where the chip has it, else fp16, channels last. On a CPU two steps of each are
    timed in turn, once per node for a (backbone, image size, threads), and remembered under `cache`; but not on one
    that computes bf16 piece by piece, where a step takes ten times as long.
    """
    if device.type == "cuda":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return Layout(half if asked == "auto" else asked, channels_last=True)
    if device.type != "cpu":
        return Layout("fp32" if asked == "auto" else asked, channels_last=False)
    if asked != "auto":
        return Layout(asked, channels_last=True)
    if torch.backends.cpu.get_cpu_capability() in SLOW_BF16:
        return Layout("fp32", channels_last=True)
    images = min(batch_size, PROBE_IMAGES)
    question = f"{name} {image_size} {images} {learns} {torch.get_num_threads()} {torch.__version__} {_processor()}"
    memory = cache / "layout" / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    if memory.exists():
        return Layout(**json.loads(memory.read_text()))
    best = _measure(model, image_size, images, learns)
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"precision": best.precision, "channels_last": best.channels_last}))
    temporary.replace(memory)
    return best


def quicken(device: torch.device) -> None:
    """Let a GPU take its fastest convolutions, tried out for each size, and TF32 in matrix products of fp32; let a CPU
    keep its memory.

    TF32 has 10 bits of mantissa, more than bf16's 7. Affects the whole process; does nothing on other devices.
    """
    keep_memory(device, everything=True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def _measure(model: nn.Module, image_size: int, images: int, learns: bool) -> Layout:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fp32, bf16 = Layout("fp32", True), Layout("bf16", True)
    seconds = dict.fromkeys((fp32, bf16), math.inf)
    with torch.random.fork_rng():
        for _ in range(PROBE_ROUNDS):  # in turn: other work on the machine then slows both
            for layout in seconds:
                seconds[layout] = min(seconds[layout], _step_seconds(model, image_size, images, layout, learns))
    model.load_state_dict(before)  # the probe's forward passes moved the BatchNorm statistics
    return bf16 if seconds[bf16] < WORTHWHILE * seconds[fp32] else fp32


def _step_seconds(model: nn.Module, image_size: int, images: int, layout: Layout, learns: bool) -> float:
    """Seconds of one forward and, if it `learns`, backward pass: the better of two after a warm-up."""
    x = torch.randn(images, 3, image_size, image_size)
    x = x.to(memory_format=torch.channels_last if layout.channels_last else torch.contiguous_format)
    y = torch.zeros(images, dtype=torch.long)
    model.train(learns)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.set_grad_enabled(learns), autocast(torch.device("cpu"), layout.precision):
            loss = F.cross_entropy(model(x).float(), y)
        if learns:
            loss.backward()
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return min(times[1:])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return hashlib.sha256(line.encode()).hexdigest()[:8]
    except OSError:
        pass
    return platform.processor() or platform.machine()
