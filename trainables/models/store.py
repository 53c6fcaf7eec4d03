"""Putting pretrained weights into a folder, where machines that reach no hub find them with --weights-dir."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from upath import UPath

from trainables.errors import UserError
from trainables.job import WeightSource
from trainables.models.backbones import plain_name
from trainables.models.licences import UNKNOWN, licence_of, source_of
from trainables.models.weights import OFFLINE, check_weights, find_file, find_weights, read_pretrained
from trainables.storage import write_bytes


@dataclass(frozen=True)
class Stored:
    """A backbone's weights in a folder.

    Attributes:
        name: of the backbone; file: its name in the folder.
        source: where they came from; licence: of the weights, or "unknown". Of a file that was put there by somebody
            else both are unknown.
        bytes: of the file.
        is_new: it was not there before.
    """

    name: str
    file: str
    source: str
    licence: str
    bytes: int
    is_new: bool


def store_weights(name: str, folder: Path) -> Stored:
    """Put a backbone's pretrained weights into a folder, as <timm name>.safetensors; what is there already stays.

    Of what is there only a damaged .safetensors is replaced. The new one appears whole, after its tensors were loaded
    into the network. Raises UserError when no source has the weights, and when a file is another network's.
    """
    name = plain_name(name)
    path = folder / f"{name}.safetensors"
    try:
        kept = find_file(name, folder)
    except UserError:
        if not path.exists() or _is_readable(path):
            raise
        kept = None
    if kept is not None:
        said = _described(Path(kept.path))
        return Stored(name, Path(kept.path).name, *said, Path(kept.path).stat().st_size, is_new=False)
    source = find_weights(name)
    where, licence = _origin(name, source)
    state = {key: tensor.contiguous().clone() for key, tensor in read_pretrained(name, source).items()}
    content = save_safetensors(state, {"format": "pt", "source": where, "licence": licence})
    check_weights(name, state)
    write_bytes(UPath(path), content)
    assert find_file(name, folder) is not None
    return Stored(name, path.name, where, licence, len(content), is_new=True)


def _is_readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _origin(name: str, source: WeightSource) -> tuple[str, str]:
    """Where the weights come from, and their licence: of a package what the package says."""
    if source.kind != "offline":
        return source_of(name), licence_of(name)
    package = OFFLINE[name].replace("_", "-")
    try:
        said: Any = metadata(package)
        licence = said.get("License-Expression") or said.get("License") or UNKNOWN
    except PackageNotFoundError:
        licence = UNKNOWN
    return f"https://pypi.org/project/{package}", str(licence).splitlines()[0][:80].lower()


def _described(path: Path) -> tuple[str, str]:
    """Source and licence that `store_weights` wrote into a file."""
    if path.suffix != ".safetensors":
        return UNKNOWN, UNKNOWN
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
    return said.get("source", UNKNOWN), said.get("licence", UNKNOWN)
