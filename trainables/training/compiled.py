"""torch.compile where it pays: on a GPU, in a training long enough to win back the time that compiling takes.

What compiling takes, and what a step takes before and after, is measured once on a node and remembered under the cache,
for every trial of a sweep asks the same few questions. Small networks gain most: their steps take as long as the GPU
waits for Python, which CUDA graphs (mode "reduce-overhead") spare it.
"""

import hashlib
import json
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.inference import autocast
from trainables.training.memory import is_out_of_memory

MODES = ("default", "reduce-overhead")
COMPILING_S = 60.0  # what it may take, before that was measured
LARGEST_GAIN = 0.4  # the share of a step that it may save, before that was measured
ROUNDS = 5


@dataclass(frozen=True)
class Compiling:
    """What was measured on this node: the mode, seconds to compile, and seconds of a step before and after (infinite
    where torch could not compile it)."""

    mode: str
    compile_s: float
    plain_step_s: float
    step_s: float

    def pays(self, steps: int) -> bool:
        return steps * (self.plain_step_s - self.step_s) > self.compile_s


def compiled(
    model: nn.Module, name: str, shape: tuple[int, ...], steps: int, device: torch.device, precision: str, cache: Path
) -> nn.Module | None:
    """`model`, compiled for batches of `shape` (N, C, H, W), where that shortens a training of `steps`; else None.

    It shares the model's weights. `name` says which network it is. Raises torch.OutOfMemoryError, as a step would.
    """
    question = f"{name} {shape} {precision} {torch.__version__} {_card(device)}"
    memory = cache / "compiled" / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    if memory.exists():
        known = [Compiling(**row) for row in json.loads(memory.read_text())]
    else:
        plain = _steps_s(model, model, shape, device, precision)[1]
        if steps * plain * LARGEST_GAIN < COMPILING_S:
            return None
        known = [_measure(model, mode, plain, shape, device, precision) for mode in MODES]
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps([asdict(row) for row in known]))
        temporary.replace(memory)
    best = min(known, key=lambda row: row.compile_s + steps * row.step_s)
    return torch.compile(model, mode=best.mode) if best.pays(steps) else None  # type: ignore[return-value]


def _measure(
    model: nn.Module, mode: str, plain: float, shape: tuple[int, ...], device: torch.device, precision: str
) -> Compiling:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to compile
            first, step = _steps_s(model, torch.compile(model, mode=mode), shape, device, precision)  # type: ignore[arg-type]
    except Exception as error:  # whatever torch's compiler raises: the network trains without it
        if is_out_of_memory(error):
            raise
        return Compiling(mode, 0.0, plain, math.inf)
    return Compiling(mode, max(0.0, first - step), plain, step)


def _steps_s(
    model: nn.Module, forward: nn.Module, shape: tuple[int, ...], device: torch.device, precision: str
) -> tuple[float, float]:
    """Seconds of the first step, which may compile, and of a later one; the model stays as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    times = []
    with torch.random.fork_rng():
        x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
        for _ in range(2 + ROUNDS):
            began = time.perf_counter()
            _step(forward, x, precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    model.load_state_dict(before)  # forward passes move the BatchNorm statistics
    return times[0], min(times[2:])


def _step(forward: nn.Module, x: Tensor, precision: str) -> None:
    with autocast(x.device, precision):
        logits = forward(x)
    F.cross_entropy(logits.float(), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
