"""What a network costs: its operations per image, and how many of those a device does in a second of training."""

import functools
import time

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainables.config import TrialConfig
from trainables.models.backbones import build, check_backbone

MEASURED = "tf_efficientnet_lite0"  # small, and made of what most networks for photographs are made of
SIZE, BATCH, STEPS = 128, 8, 2


@functools.cache
def native_size(name: str) -> int:
    """The side in pixels at which a backbone was pretrained; 224 where nobody says."""
    check_backbone(name)
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return int(known.input_size[-1]) if known is not None else 224


@functools.cache
def gflops(name: str, size: int) -> float:
    """Operations, in 1e9, of a forward pass of one image of `size` pixels; counted, nothing is computed."""
    with torch.device("meta"):
        model = build(TrialConfig(backbone=name, image_size=size), 2).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return float(counter.get_total_flops()) / 1e9


def training_rate(device: str, threads: int | None = None) -> float:
    """Operations per second, in 1e9, that forward and backward passes reach on a device; takes a second or two."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        model = build(TrialConfig(backbone=MEASURED, image_size=SIZE), 2).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(BATCH, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
        seconds = min(_seconds(model, x) for _ in range(1 + STEPS))  # the first one warms up
    finally:
        torch.set_num_threads(before)
    return 3 * BATCH * gflops(MEASURED, SIZE) / seconds


def _seconds(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Of one forward and backward pass."""
    began = time.perf_counter()
    model(x).sum().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
