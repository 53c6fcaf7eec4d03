"""Files, on this machine or in an object store: read with limits, written whole or not at all.

A path is a `UPath`: of this machine's file system, or a URL such as s3://bucket/run (with s3fs installed). Everything
here waits out an outage of a store of up to OUTAGE_S seconds; a longer one raises StorageLost.

What is read may have been made by anybody. So every reader is bounded in what it takes into memory, opens nothing but
regular files (a named pipe would wait for ever), and raises one kind of error for whatever is wrong. Nothing here can
run code: JSON, and .npy without pickles. Neither torch nor Ray is imported.
"""

import io
import json
import os
import re
import shutil
import stat
import time
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import msgspec
import numpy as np
from upath import UPath

from trainables.errors import UserError

AnyPath = str | os.PathLike | UPath
T = TypeVar("T")

OUTAGE_S = 120.0  # of remote storage that is waited out
RETRY_S = 2.0
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, ValueError)
KINDS = {"f": "float", "iu": "integers", "i": "integers", "u": "unsigned integers"}
LARGEST_JSON = 64 * 2**20  # bytes; JSON takes up to thirty times as much memory once it is read

for _protocol in ("s3", "gs", "gcs", "abfs"):  # others write there, too: what was listed once says little
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


class StorageLost(UserError):
    """Remote storage could not be reached for OUTAGE_S seconds."""


class Damaged(UserError):
    """A file is not what it should be: too large, cut short, of another format, or of other values than expected."""


# --- places ----------------------------------------------------------------------------------------------------------


def reach(path: AnyPath) -> UPath:
    """Return the path; raise UserError when it is remote and nobody answers: the first contact is not waited for."""
    try:
        found = UPath(path)
        if not is_local(found):
            found.exists()
        return found
    except Exception as error:  # a client that is not installed, no such host, no credentials
        raise UserError(
            f"{path} cannot be reached ({error}); check the address, the credentials, and that its client is installed "
            "(s3://: pip install 'ninefold[s3]')"
        ) from None


def is_local(path: UPath) -> bool:
    """Whether it is a path of this machine's file system, which may be a mounted one (NFS)."""
    return path.protocol in ("", "file")


def patiently(path: UPath, action: Callable[[], T]) -> T:
    """Return what `action` returns; when `path` is remote, try again while the storage is out of reach.

    Raises StorageLost after OUTAGE_S seconds of that; what no waiting changes (a missing file, no permission) at once.
    """
    if is_local(path):
        return action()
    end = time.monotonic() + OUTAGE_S
    while True:
        try:
            return action()
        except FINAL_ERRORS:
            raise
        except Exception as error:  # every store's client has its own
            if time.monotonic() > end:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise StorageLost(
                    f"{path} could not be reached for {OUTAGE_S:g} s ({reason}); the same command continues"
                ) from error
        time.sleep(RETRY_S)


def exists(path: UPath) -> bool:
    return patiently(path, path.exists)


def list_folder(path: UPath) -> list[UPath]:
    """Return what lies in a folder, in no order; [] when there is none."""
    return patiently(path, lambda: list(path.iterdir()) if path.is_dir() else [])


def is_link(path: UPath) -> bool:
    """Whether it is a symbolic link, which may lead out of the folder that it lies in."""
    return is_local(path) and os.path.islink(str(path))


def remove_folder(path: UPath) -> None:
    """Delete a folder with all that is in it, unless it is a link, or lies in a folder that is one."""
    if not is_local(path):
        if exists(path):
            patiently(path, lambda: path.rmdir(recursive=True))
    elif not is_link(path) and not is_link(path.parent):
        shutil.rmtree(str(path), ignore_errors=True)


def hide_password(text: str) -> str:
    """Return the text with *** in place of every password in a URL."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&](?:ssl)?(?:password|passwd|pwd)=)[^&\s'\"]*", r"\1***", text, flags=re.IGNORECASE)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_bytes(path: UPath, most: int | None = None) -> bytes:
    """Return a file's content. Raises OSError when it cannot be read, Damaged when it has more than `most` bytes."""
    if not is_local(path):
        if most is not None and (size := patiently(path, lambda: path.stat().st_size)) > most:
            raise Damaged(f"{path} has {size:,} bytes, expected at most {most:,}")
        return patiently(path, path.read_bytes)
    # Not blocking: a named pipe would be opened only once somebody writes to it.
    with open(os.open(str(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is no regular file")
        if most is not None and status.st_size > most:
            raise Damaged(f"{path} has {status.st_size:,} bytes, expected at most {most:,}")
        return file.read()


def read_json(path: UPath) -> dict[str, Any]:
    """Return the JSON object in a file; raises Damaged for anything else."""
    try:
        value = msgspec.json.decode(read_bytes(path, LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read as JSON ({_reason(error)})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def parse(values: Any, kind: type[T], where: object) -> T:
    """Return plain JSON values as a `kind`, a dataclass: keys that it does not have are passed over.

    Raises Damaged, with `where` they stand, when a key is missing or a value is of another type.
    """
    try:
        return msgspec.convert(values, kind)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where} is damaged: {_reason(error)}") from None


def read_array(path: UPath, kinds: str = "f", dimensions: int = 2) -> np.ndarray:
    """Return the array in a .npy without ever unpickling; local files are memory-mapped, read-only.

    `kinds` are numpy's letters for the types that are expected, see KINDS. Raises FileNotFoundError when there is no
    file, Damaged when it holds anything else.
    """
    if not is_local(path):
        return _load(path, io.BytesIO(read_bytes(path)), None, kinds, dimensions)
    with open(os.open(str(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Damaged(f"{path} is no regular file")
        if file.read(6) != np.lib.format.MAGIC_PREFIX:  # np.load would open an archive, too
            raise Damaged(f"{path} is no .npy file")
    return _load(path, str(path), "r", kinds, dimensions)


def _load(path: UPath, file: Any, mode: Any, kinds: str, dimensions: int) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # numpy's readers raise a dozen kinds for a header that makes no sense
        raise Damaged(f"{path} is no array that can be read ({_reason(error)})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.ndim != dimensions:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise Damaged(f"{path} holds {found}, expected {KINDS[kinds]} in {dimensions} dimension{'s'[: dimensions - 1]}")
    return array


def read_arrays(path: UPath, most: int = 4 * 2**30) -> dict[str, np.ndarray]:
    """Return the arrays in a .npz as `write_arrays` leaves it, which is not compressed; raises Damaged for others."""
    try:
        content = io.BytesIO(read_bytes(path, most))
        with zipfile.ZipFile(content) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its arrays are compressed")  # a thousandfold at worst: memory would not be bounded
        with np.load(content, allow_pickle=False) as file:
            return {name: np.asarray(file[name]) for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # of zipfile, zlib and numpy
        raise Damaged(f"{path} is no archive of arrays that can be read ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# --- writing ---------------------------------------------------------------------------------------------------------


def check_out(path: Path | None, option: str) -> None:
    """Raise UserError when no file can come to lie there; None is not asked for. Called before any work is done."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist; make it, or name another {option}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file; name another {option}")


def write_bytes(path: UPath, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    if not is_local(path):
        patiently(path, lambda: path.write_bytes(data))  # an object store shows an object only once it is whole
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(str(path.parent)) / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, str(path))
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: UPath, value: Any) -> None:
    """Atomically write indented JSON; NaN and infinities are errors, because no JSON reader has to accept them."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_array(path: UPath, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def write_arrays(path: UPath, **arrays: np.ndarray) -> None:
    """Atomically write arrays by name as one .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())
