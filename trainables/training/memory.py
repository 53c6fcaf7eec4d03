"""Memory: kept between steps; and when it runs out, how PyTorch says so, and the batches that still fit."""

import ctypes
import os

import torch

# CUDA's own error, those of the libraries below it when they find no room for a workspace or a handle (NCCL's and
# cuBLAS's among them), and what PyTorch says on a CPU; most come as a plain RuntimeError
SAYINGS = (
    "out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED", "CUFFT_ALLOC_FAILED",
)  # fmt: skip
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's, of glibc's malloc.h
KEPT = 2**28  # bytes that a process which predicts keeps
_fitting: dict[tuple[str, int], int] = {}


def keep_memory(device: torch.device, everything: bool = False) -> None:
    """Let this process keep what a network's steps free on a CPU, for the next step to take.

    glibc gives blocks of some MB back to the kernel at once and gets them again full of zeros, page by page, which
    takes a third to a half of a step's time. A prediction's blocks are below 32 MB, and KEPT bytes are enough for them;
    larger ones, such as an image of 50 megapixels that a server decodes, are still given back. Training keeps
    `everything`. Without glibc, and on a GPU, where PyTorch keeps memory itself, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if device.type == "cpu" and os.name == "posix" else None
    if mallopt is None:
        return
    if everything:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
    else:
        mallopt(MMAP_THRESHOLD, 2**25)
        mallopt(TRIM_THRESHOLD, KEPT)


def take_share(gpus: float) -> None:
    """Keep this process to its share of a GPU's memory, 0 to 1: the trials beside it have the rest. More than one GPU,
    or none, changes nothing."""
    if 0 < gpus <= 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpus)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of a GPU's memory; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free, int(share * total) - torch.cuda.memory_reserved(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying.lower() in str(error).lower() for saying in SAYINGS)


def fitting(device: torch.device, image_size: int, batch: int) -> int:
    """The largest batch up to `batch` that has not run out of memory in this process."""
    return min(batch, _fitting.get((str(device), image_size), batch))


def halved(device: torch.device, image_size: int, batch: int, error: RuntimeError) -> int:
    """Half of a batch that ran out of memory with `error`, also for the batches to come; raises any other error, and
    this one for a batch of one."""
    if not is_out_of_memory(error) or batch == 1:
        raise error
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _fitting[str(device), image_size] = max(1, batch // 2)
    return max(1, batch // 2)
