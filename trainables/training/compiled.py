"""torch.compile where it pays: on a GPU, in a training long enough to win back the time that compiling takes.

What compiling takes, and what a step takes before and after, is measured once on a node and remembered under the cache,
for every trial of a sweep asks the same few questions. Small networks gain most: their steps take as long as the GPU
waits for Python, which CUDA graphs (mode "reduce-overhead") spare it.
"""

import hashlib
import math
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upath import UPath

from trainables.inference import autocast
from trainables.storage import Damaged, read_json, write_json

GRAPHS = "reduce-overhead"
MODES = ("default", GRAPHS)
COMPILING_S = 60.0  # what it may take, before that was measured
LARGEST_GAIN = 0.4  # the share of a step that it may save, before that was measured
WORTHWHILE = 4  # times what compiling may take must be to win, before it is tried
ROUNDS = 5
_used = False  # whether this process has compiled anything since `forget`


@dataclass(frozen=True)
class Compiling:
    """What was measured on this node: the mode, seconds to compile, and seconds of a step before and after (None where
    torch could not compile it)."""

    mode: str
    compile_s: float
    plain_step_s: float
    step_s: float | None

    def saves(self, steps: float) -> float:
        """Seconds of a training of `steps`; below 0 where compiling takes longer than it wins."""
        return -math.inf if self.step_s is None else steps * (self.plain_step_s - self.step_s) - self.compile_s


@dataclass(frozen=True)
class Training:
    """What is to be compiled for.

    Attributes:
        name: of the network, with all that its code depends on.
        sizes: of its micro-batches, the largest first.
        image_size, precision: of every step.
        accumulates: whether gradients of several micro-batches are added up.
        steps: that are left; seconds: until the deadline (infinite without one).
    """

    name: str
    sizes: tuple[int, ...]
    image_size: int
    precision: str
    accumulates: bool
    steps: int
    seconds: float


class Careful(nn.Module):
    """A compiled network that is the plain one from the first error of the compiler on: a size or a mode that nobody
    has tried yet costs time then, and not the trial."""

    def __init__(self, model: nn.Module, mode: str) -> None:
        super().__init__()
        self.plain, self.fast = [model], [torch.compile(model, mode=mode, dynamic=False)]  # no parameters twice

    def forward(self, x: Tensor) -> Tensor:
        if self.fast:
            try:
                return self.fast[0](x)  # type: ignore[no-any-return, operator]
            except torch.OutOfMemoryError:
                raise
            except Exception:
                self.fast.clear()
        return self.plain[0](x)  # type: ignore[no-any-return]


def compiled(model: nn.Module, training: Training, device: torch.device, cache: Path) -> nn.Module | None:
    """`model`, compiled, where that shortens the training; else None. It shares the model's weights.

    Raises torch.OutOfMemoryError where a plain step would.
    """
    question = f"{training.name} {training.sizes} {training.image_size} {training.precision} {training.accumulates} "
    question += f"{torch.__version__} {_card(device)}"
    memory = UPath(cache / "compiled" / f"{hashlib.sha256(question.encode()).hexdigest()[:16]}.json")
    forget()
    known: list[Compiling] = []
    with suppress(Damaged, KeyError, TypeError):
        known = [Compiling(**row) for row in read_json(memory)["modes"]]
    if known:
        plain = known[0].plain_step_s
    else:
        plain = _steps_s(model, model, training, device)[1]
        if min(training.steps * plain, training.seconds) * LARGEST_GAIN < WORTHWHILE * COMPILING_S:
            return None
        # gradients that are added up would lie in the graphs' own memory, where the next micro-batch overwrites them
        modes = [mode for mode in MODES if mode != GRAPHS or not training.accumulates]
        known = [_measure(model, mode, plain, training, device) for mode in modes]
        write_json(memory, {"modes": [asdict(row) for row in known]})
    steps = min(training.steps, training.seconds / plain)
    best = max(known, key=lambda row: row.saves(steps))
    return _compiled(model, best.mode) if best.saves(steps) > 0 else None


def forget() -> None:
    """Give back what earlier trials of this process have compiled, and the memory of their graphs: torch keeps it, up
    to a number of networks beyond which it compiles nothing more."""
    global _used
    if _used:
        torch.compiler.reset()
        _used = False


def _compiled(model: nn.Module, mode: str) -> Careful:
    global _used
    _used = True
    return Careful(model, mode)


def _measure(model: nn.Module, mode: str, plain: float, training: Training, device: torch.device) -> Compiling:
    compile_s, step, works = 0.0, 0.0, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to compile
            fast = _compiled(model, mode)
            compile_s, step = _steps_s(model, fast, training, device)
        works = bool(fast.fast)
    except Exception:  # whatever torch's compiler raises, or its need of memory: the network trains without it
        pass
    forget()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Compiling(mode, compile_s, plain, step if works else None)


def _steps_s(model: nn.Module, forward: nn.Module, training: Training, device: torch.device) -> tuple[float, float]:
    """Seconds that first steps of all sizes take longer than later ones, and of a later one of the largest size; the
    model stays as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.random.fork_rng():
            first = [_step_s(model, forward, size, training, device) for size in training.sizes]
            for _ in range(2):  # graphs are recorded in the second step
                _step_s(model, forward, training.sizes[0], training, device)
            later = min(_step_s(model, forward, training.sizes[0], training, device) for _ in range(ROUNDS))
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(before)  # forward passes move the BatchNorm statistics
    return max(0.0, sum(first) - len(first) * later), later


def _step_s(model: nn.Module, forward: nn.Module, size: int, training: Training, device: torch.device) -> float:
    x = torch.randn(size, 3, training.image_size, training.image_size, device=device)
    x = x.to(memory_format=torch.channels_last)
    _wait(device)
    began = time.perf_counter()
    with autocast(device, training.precision):
        logits = forward(x)
    F.cross_entropy(logits.float(), torch.zeros(size, dtype=torch.long, device=device)).backward()
    _wait(device)
    took = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return took


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
