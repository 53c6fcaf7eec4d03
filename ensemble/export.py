"""python -m ensemble.export : an ensemble as one file for other runtimes, with preprocessing and class names inside.

`--format onnx` (opset 20: ONNX Runtime 1.17 or later, and whatever else reads ONNX) or `--format torch` (the .pt2 of
torch.export). Input `images`: uint8 (N, H, W, 3), RGB, any N, in the size to which the run's data set was decoded.
Output `probs`: float32 (N, C). Each member's resizing, normalisation, views and temperature are in the graph, and the
weights or the stacked layer. Metadata, as JSON texts: `classes`; `ensemble` (run, name, selector, members); `select`
(its scores on the select split); `fit` (how pictures of other proportions get to that size: the example is "squash",
the sweep's own default). To use the file takes no more than

    import json, onnxruntime, numpy as np, PIL.Image
    model = onnxruntime.InferenceSession("ensemble.onnx")
    image = PIL.Image.open("cat.jpg").convert("RGB").resize(model.get_inputs()[0].shape[2:0:-1])
    probs = model.run(["probs"], {"images": np.asarray(image)[None]})[0][0]
    print(json.loads(model.get_modelmeta().custom_metadata_map["classes"])[probs.argmax()], probs.max())

All members compute in fp32. A file is left only when it agrees with what `ensemble.predict` computes in fp32, within
1e-4 in every probability.
"""

import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from upath import UPath

from ensemble.file import Ensemble, read_ensemble
from ensemble.predict import Voters
from ensemble.selection.metrics import FLOOR
from trainables.command import progress
from trainables.data.decode import Canvas
from trainables.data.share import open_run_data
from trainables.errors import UserError, exit_on_user_error
from trainables.inference import view_logits
from trainables.models.weights import load_model
from trainables.run_directory import Candidate, open_runs, read_run
from trainables.storage import check_out
from trainables.training.augment import Pixels

OPSET = 20
TOLERANCE = 1e-4  # largest difference of a probability
CHECKED = 1000  # images of the select split that the file is compared on
CHECK_BATCH = 64
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: one protobuf message, so one file, ends at 2 GiB


LOG_FLOOR = float(torch.tensor(FLOOR).log())


class MemberModule(nn.Module):
    """One member with its preprocessing: uint8 (N, H, W, 3) to log-probabilities, float32 (N, C)."""

    mean: Tensor
    std: Tensor

    def __init__(self, candidate: Candidate, temperature: float) -> None:
        super().__init__()
        self.network = load_model(candidate)
        info = candidate.info
        assert info.config is not None  # load_model has refused it
        assert info.mean is not None
        assert info.std is not None
        self.size = info.image_size or info.config.image_size
        self.tta = info.config.tta
        self.temperature = temperature
        pixels = Pixels.of(info.mean, info.std, torch.device("cpu"))
        self.register_buffer("mean", pixels.mean)
        self.register_buffer("std", pixels.std)

    def forward(self, images: Tensor) -> Tensor:
        logits = view_logits(self.network, images, Pixels(self.mean, self.std), self.size, self.tta)
        return scale_logs(F.log_softmax(logits, dim=1), self.temperature)


class EnsembleModule(nn.Module):
    """All members of an ensemble and how they combine: uint8 (N, H, W, 3) to probabilities, float32 (N, C).

    (H, W) is the size to which the run's data set was decoded. Raises UserError when a member or its weights are gone.
    """

    coefficients: Tensor
    intercept: Tensor

    def __init__(self, runs: Sequence[UPath], ensemble: Ensemble) -> None:
        super().__init__()
        members = [member for member in ensemble.members if member.weight > 0]
        self.members = nn.ModuleList(MemberModule(m.candidate(runs), m.temperature) for m in members)
        self.weights = [member.weight for member in members]
        self.temperature = ensemble.temperature
        self.stacked = ensemble.stack is not None
        if ensemble.stack is not None:
            coefficients = torch.from_numpy(ensemble.stack.coefficients).float()  # (C, K, C)
            self.register_buffer("coefficients", coefficients.permute(1, 2, 0).contiguous())
            self.register_buffer("intercept", torch.from_numpy(ensemble.stack.intercept).float())
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logs = [member(images) for member in self.members]
        if self.stacked:
            votes = [log.clamp(min=LOG_FLOOR) @ self.coefficients[k] for k, log in enumerate(logs)]
            together = F.log_softmax(torch.stack(votes).sum(0) + self.intercept, dim=1)
        else:
            shares = [weight * log.exp() for weight, log in zip(self.weights, logs, strict=True)]
            together = torch.stack(shares).sum(0).log()
        return scale_logs(together, self.temperature).exp()


def scale_logs(logs: Tensor, temperature: float) -> Tensor:
    """What `ensemble.blend.scale` does to probabilities, on their logarithms (N, C)."""
    return logs if temperature == 1 else F.log_softmax(logs.clamp(min=LOG_FLOOR) / temperature, dim=1)


@dataclass(frozen=True)
class Export:
    """Write an ensemble as one file for other runtimes, and check it against PyTorch."""

    out: Path | None = None
    """File to write; default: ensemble.onnx or ensemble.pt2 in the run directory."""
    format: Literal["onnx", "torch"] = "onnx"
    """ONNX, or torch.export's .pt2."""
    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its probabilities are at most from PyTorch's, on which images."""

    path: Path
    largest_difference: float
    images: int
    real: bool  # of the select split; else random ones, for there is none or the data set could not be opened
    seconds: float


Runtime = Callable[[np.ndarray], np.ndarray]
"""A file opened by the runtime that it is for: uint8 (N, H, W, 3) to float32 (N, C)."""


def export(runs: Sequence[UPath], ensemble: Ensemble, out: Path, format: Literal["onnx", "torch"]) -> Exported:
    """Write the file, whole and checked or not at all.

    Raises UserError when a member's weights are missing, the folder does not exist, packages are missing, the ensemble
    is too large for one ONNX file, a member's architecture cannot be exported, or the file would not agree.
    """
    started = time.perf_counter()
    check_out(out, "--out")
    if format == "onnx":
        _need_onnx()
    voters = Voters.load(runs, ensemble, "cpu", precision="fp32")
    images, real = _images_to_check(runs[0], voters.canvas)
    module = EnsembleModule(runs, ensemble)
    metadata = describe(runs, ensemble)
    write = _write_onnx if format == "onnx" else _write_torch
    descriptor, name = tempfile.mkstemp(dir=out.absolute().parent, prefix=f".{out.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        with progress(f"writing {out.name}", None):
            runtime = write(module, voters.canvas, metadata, temporary)
        with progress("comparing it with PyTorch", len(images)) as advance:
            worst = largest_difference(runtime, voters, images, advance)
        if not worst <= TOLERANCE:
            raise UserError(
                f"the exported file differs from PyTorch by up to {worst:.2g} in probability, expected at most "
                f"{TOLERANCE:g}, so it was not kept; try --format {'torch' if format == 'onnx' else 'onnx'}"
            )
        temporary.chmod(0o644)  # mkstemp's is for its owner alone
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(out, worst, len(images), real, time.perf_counter() - started)


def describe(runs: Sequence[UPath], ensemble: Ensemble) -> dict[str, str]:
    """The file's metadata: JSON texts by name."""
    members = [
        {"id": m.id, "architecture": m.candidate(runs).architecture, "weight": m.weight} for m in ensemble.members
    ]
    made_by = {"run": runs[0].name, "name": ensemble.name, "selector": ensemble.selector, "members": members}
    return {
        "classes": json.dumps(read_run(runs[0]).classes),
        "fit": json.dumps(read_run(runs[0]).data.fit),
        "ensemble": json.dumps(made_by),
        "select": json.dumps(ensemble.scores.get("select", {})),
    }


def largest_difference(
    runtime: Runtime, predict: Runtime, images: np.ndarray, advance: Callable[[int], None] = lambda images: None
) -> float:
    """How far the two are apart at most, over all images and classes, in batches of 1, 2, 64 and what is left."""
    starts = [0, 1, 3, *range(3 + CHECK_BATCH, len(images), CHECK_BATCH), len(images)]
    parts = [images[a:b] for a, b in itertools.pairwise(starts) if b > a]
    worst = 0.0
    for part in parts:
        worst = float(np.maximum(worst, np.abs(runtime(part) - predict(part)).max()))  # NaN stays NaN
        advance(len(part))
    return worst


def _images_to_check(run: UPath, canvas: Canvas) -> tuple[np.ndarray, bool]:
    """Images of the select split, or random ones (and False) when it is empty or the data set not within reach."""
    try:
        data, splits = open_run_data(run)
        images = np.asarray(data.images[splits.select[:CHECKED]])
    except (UserError, OSError):  # nowhere, damaged, or there is no room for a copy of it
        images = np.empty(0, np.uint8)
    if len(images) == 0:  # a refit was trained on its select split, too
        return np.random.default_rng(0).integers(0, 256, (CHECKED, *canvas.shape), np.uint8), False
    return images, True


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}; pip install 'ninefold[export]'") from None


def _write_onnx(module: nn.Module, canvas: Canvas, metadata: dict[str, str], path: Path) -> Runtime:
    from onnxruntime import InferenceSession, SessionOptions

    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if weights > LARGEST_ONNX:
        raise UserError(f"the weights are {weights / 2**30:.1f} GiB, one ONNX file ends at 2 GiB; use --format torch")
    with _silence():
        program = _traced(module, canvas)
        try:
            converted = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["probs"], verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"ONNX cannot express this ensemble ({_last_line(error)}); use --format torch") from None
    assert converted is not None
    converted.model.metadata_props.update(metadata)
    converted.save(path, external_data=False)
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # its own default takes every core, whoever else uses them
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["probs"], {"images": images})[0])


def _write_torch(module: nn.Module, canvas: Canvas, metadata: dict[str, str], path: Path) -> Runtime:
    with _silence():
        program = _traced(module, canvas)
        with open(path, "wb") as file:
            torch.export.save(program, file, extra_files=metadata)  # type: ignore[arg-type]
        with open(path, "rb") as written:
            opened = torch.export.load(written).module()

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return opened(torch.from_numpy(np.ascontiguousarray(images))).numpy()

    return run


def _traced(module: nn.Module, canvas: Canvas) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *canvas.shape, dtype=torch.uint8)  # two: a batch of one would be taken for a constant
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # whatever tracing a network may raise
        raise UserError(f"torch.export cannot trace this ensemble ({_last_line(error)})") from error


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters tell of their own future, and of optional packages; nobody can act on it here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ensemble.export") -> None:
    with exit_on_user_error():
        args = tyro.cli(Export, description=Export.__doc__, prog=prog, args=arguments)
        runs = open_runs(args.run)
        ensemble = read_ensemble(runs[0], args.ensemble)
        out = args.out or Path(str(runs[0])) / f"ensemble.{'onnx' if args.format == 'onnx' else 'pt2'}"
        made = export(runs, ensemble, out, args.format)
        kind = "images of the select split" if made.real else "random images (no select split can be opened here)"
        print(f"{made.path}: {made.path.stat().st_size / 2**20:.1f} MiB after {made.seconds:.0f} s")
        print(f"differs from PyTorch by at most {made.largest_difference:.1e} in probability, on {made.images} {kind}")


if __name__ == "__main__":
    main()
