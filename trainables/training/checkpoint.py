"""The latest checkpoint of a trial: one safetensors file, because a pickle could run code when it is read.

A state is nested dicts and lists of tensors, numbers, texts, booleans and None. Its tensors are stored under numbers,
and everything else as JSON in the file's metadata, with {"tensor": "17", ...} in a tensor's place.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from upath import UPath

from trainables.storage import Damaged, exists, read_bytes, write_bytes


@dataclass(frozen=True)
class Copied:
    """A state as it was, in the host's memory: tensors by number, and the JSON that names them."""

    tensors: dict[str, Tensor]
    tree: str


def copied(state: dict[str, Any]) -> Copied:
    """A copy of the state. Raises TypeError for a value that a checkpoint cannot hold."""
    tensors: dict[str, Tensor] = {}
    return Copied(tree=json.dumps(_plain(state, tensors)), tensors=tensors)


def write_checkpoint(path: UPath, state: Copied) -> None:
    """Write the state atomically."""
    write_bytes(path, save(state.tensors, metadata={"state": state.tree}))


def read_checkpoint(path: UPath, device: torch.device) -> dict[str, Any] | None:
    """Return the state with its tensors on `device`; None when there is none. Raises Damaged for another file."""
    if not exists(path):
        return None
    content = read_bytes(path)
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")  # of the header, which is JSON
        tree = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["state"])
        state = _restored(tree, {name: tensor.to(device) for name, tensor in tensors.items()})
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is no checkpoint that can be read ({error})") from None
    if not isinstance(state, dict):
        raise Damaged(f"{path} is no checkpoint")
    return state


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
        is_channels_last = value.ndim == 4 and not value.is_contiguous()
        return {"tensor": name, "channels_last": is_channels_last}
    if isinstance(value, dict):  # as pairs, because optimisers number their parameters, and JSON keys are texts
        return {"pairs": [[key, _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            tensor = tensors[value["tensor"]]  # in another layout sums would be rounded otherwise
            return tensor.to(memory_format=torch.channels_last) if value["channels_last"] else tensor
        return {key: _restored(item, tensors) for key, item in value["pairs"]}
    return value
