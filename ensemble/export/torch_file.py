"""An ensemble as the .pt2 of torch.export; and the traced graph that ONNX is made from, too."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ensemble.export.check import Runtime
from trainables.data.decode import Canvas
from trainables.errors import UserError


def write_torch(module: nn.Module, canvas: Canvas, metadata: dict[str, str], path: Path) -> Runtime:
    """Write the file and open it again. Raises UserError when the ensemble cannot be traced."""
    with silence():
        program = traced(module, canvas)
        with open(path, "wb") as file:
            torch.export.save(program, file, extra_files=metadata)  # type: ignore[arg-type]
        with open(path, "rb") as written:
            opened = torch.export.load(written).module()

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return opened(torch.from_numpy(np.ascontiguousarray(images))).numpy()

    return run


def traced(module: nn.Module, canvas: Canvas) -> torch.export.ExportedProgram:
    """The graph of the module for any number of images. Raises UserError when there is none."""
    example = torch.zeros(2, *canvas.shape, dtype=torch.uint8)  # two: a batch of one would be taken for a constant
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # whatever tracing a network may raise
        raise UserError(f"torch.export cannot trace this ensemble ({last_line(error)})") from error


def last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """The exporters tell of their own future, and of optional packages; nobody can act on it here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
