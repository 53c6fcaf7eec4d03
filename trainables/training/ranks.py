"""What the ranks of a trial agree on before they act."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_first(read: Callable[[], T]) -> T:
    """What `read` returns or raises on rank 0, on every rank; all of them call it.

    Each rank asking the file system for itself might see it in another state (NFS, a store that is away for a moment),
    and one that then goes another way leaves the others waiting in a collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return read()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = read()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]  # type: ignore[no-any-return]
