"""Memory that runs out: recognised however it is said, and the batch that fitted is remembered."""

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from trainables import inference
from trainables.inference import eval_batch, predict_probs
from trainables.training import memory
from trainables.training.augment import Pixels
from trainables.training.memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_it_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")]
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_real_one_of_the_cpu() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(told.value)


def test_the_batch_that_fits_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: only PyTorch's own class was caught, and the next prediction ran out of memory again."""
    monkeypatch.setattr(memory, "_fitting", {})
    monkeypatch.setattr(inference, "EVAL_BATCH", 32)
    sizes: list[int] = []

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > 10:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            return x.mean((2, 3)) * self.weight

    pixels = Pixels(torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.5))
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    probs = predict_probs(Narrow(), images, None, pixels, 8)
    assert probs.shape == (20, 3)
    assert sizes == [20, 16, 8, 8, 4]
    sizes.clear()
    predict_probs(Narrow(), images, None, pixels, 8)
    assert sizes == [8, 8, 4]
    assert eval_batch(torch.device("cpu"), 8) == 8
    assert eval_batch(torch.device("cpu"), 16) == 32, "of other images nothing is known"


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so early")
LARGE = 12_000_000  # floats, 48 MB: more than 32, which glibc never keeps by itself
FAULTS = """
import resource, sys, torch
from trainables.training.memory import keep_memory
device = torch.device("cpu")
if sys.argv[1] != "plain":
    keep_memory(device, everything=sys.argv[1] == "everything")
size = int(sys.argv[2])
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(20):
    if step == 10:  # by then the heap has room for the largest
        before = pages()
    torch.ones(size), torch.ones(size), torch.ones(size)
print(pages() - before)
"""


@glibc
@pytest.mark.parametrize(("mode", "size"), [("some", 6_000_000), ("everything", 6_000_000), ("everything", LARGE)])
def test_a_step_on_a_cpu_takes_the_memory_of_the_step_before(mode: str, size: int) -> None:
    assert faults(mode, size) < 0.1 * faults("plain", LARGE)


@glibc
def test_a_process_that_predicts_gives_large_blocks_back() -> None:
    """Such as a large picture's: a server kept 1.4 GB of them in a siege."""
    assert faults("some", LARGE) > 0.5 * faults("plain", LARGE)


def faults(mode: str, size: int) -> int:
    """Pages that ten steps with three blocks of `size` floats get from the kernel, once the heap has grown."""
    done = subprocess.run([sys.executable, "-c", FAULTS, mode, str(size)], capture_output=True, text=True, check=True)
    return int(done.stdout)
