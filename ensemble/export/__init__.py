"""python -m ensemble.export : an ensemble for other runtimes, with preprocessing and class names inside.

`--to onnx` (opset 20: ONNX Runtime 1.17 or later, and whatever else reads ONNX) or `--to torch` (the .pt2 of
torch.export) writes one file. Input `images`: uint8 (N, H, W, 3), RGB, any N, in the size to which the run's data set
was decoded. Output `probs`: float32 (N, C). Each member's resizing, normalisation, views and temperature are in the
graph, and the weights or the stacked layer. Metadata, as JSON texts: `classes`; `ensemble` (run, name, selector,
members); `select` (its scores on the select split); `decision` (`factors` or `cost`, where the answer need not be the
most probable class); `fit` (how pictures of other proportions get to that size: the example is "squash", the sweep's
own default); `int8` with `--int8`, see int8.py. To use the file takes no more than

    import json, onnxruntime, numpy as np, PIL.Image, PIL.ImageOps
    model = onnxruntime.InferenceSession("ensemble.onnx")
    image = PIL.ImageOps.exif_transpose(PIL.Image.open("cat.jpg")).convert("RGBA")
    image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = np.asarray(image.resize(model.get_inputs()[0].shape[2:0:-1]))[None]
    probs = model.run(["probs"], {"images": pixels})[0][0]
    print(json.loads(model.get_modelmeta().custom_metadata_map["classes"])[probs.argmax()], probs.max())

`--to hf` and `--to mlflow` write a folder that a library of that name loads, see hf_folder.py and mlflow_folder.py.

All members compute in fp32. Something is left only when it agrees with what `ensemble.predict` computes in fp32, within
1e-4 in every probability.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from upath import UPath

from ensemble.export import int8 as quantised
from ensemble.export.check import TOLERANCE, Runtime, images_to_check, largest_difference
from ensemble.export.hf_folder import check_push, push, write_hf
from ensemble.export.mlflow_folder import need_mlflow, write_mlflow
from ensemble.export.model import EnsembleModule
from ensemble.export.onnx_file import need_onnx, write_onnx
from ensemble.export.package import load_module
from ensemble.export.torch_file import write_torch
from ensemble.file import Ensemble, read_ensemble
from ensemble.predict import Voters
from trainables.command import progress
from trainables.errors import UserError, exit_on_user_error
from trainables.run_directory import open_runs, read_run
from trainables.storage import check_out

__all__ = ["EnsembleModule", "Export", "Exported", "describe", "export", "main"]

To = Literal["onnx", "torch", "mlflow", "hf"]
FOLDERS = {"mlflow": "MLmodel", "hf": "config.json"}  # a file that shows that a folder is an earlier export
NAMES = {"onnx": "ensemble.onnx", "torch": "ensemble.pt2", "mlflow": "ensemble-mlflow", "hf": "ensemble-hf"}


@dataclass(frozen=True)
class Export:
    """Write an ensemble for other runtimes and libraries, and check it against PyTorch."""

    out: Path | None = None
    """File or folder to write; default: ensemble.onnx, ensemble.pt2, ensemble-mlflow or ensemble-hf in the run."""
    to: Annotated[To, tyro.conf.arg(aliases=["--format"])] = "onnx"
    """onnx, or torch.export's .pt2 (torch): one file. mlflow (extra mlflow): a pyfunc model. hf: a folder for the
    Hugging Face hub, with a model card."""
    int8: bool = False
    """With --to onnx: networks in int8, calibrated on train images; what it costs on the select split is measured."""
    push: Annotated[str | None, tyro.conf.arg(metavar="OWNER/NAME")] = None
    """With --to hf: upload the folder to this repository of the hub, which is made private where there is none."""
    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""

    def __post_init__(self) -> None:
        if self.int8 and self.to != "onnx":
            raise UserError(f"--int8 is for --to onnx, not for --to {self.to}")
        if self.push is not None and self.to != "hf":
            raise UserError(f"--push is for --to hf, not for --to {self.to}")


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its probabilities are at most from PyTorch's, on which images.

    Of an int8 file that is the difference of the fp32 file that it was made from, and `note` says what int8 costs.
    """

    path: Path
    largest_difference: float
    images: int
    real: bool  # of the select split; else random ones, for there is none or the data set could not be opened
    seconds: float
    note: str = ""

    @property
    def bytes(self) -> int:
        """Size of the file, or of all files in the folder."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


def export(
    runs: Sequence[UPath], ensemble: Ensemble, out: Path, to: To, int8: bool = False, repository: str | None = None
) -> Exported:
    """Write the file or folder, whole and checked or not at all; an earlier one in its place is replaced.

    repository: of the hub, named on the model card. Raises UserError when a member's weights are missing, the folder
    does not exist or is something else, packages are missing, the ensemble is too large for one ONNX file, a member's
    architecture cannot be exported, int8 has no images to be calibrated on, or what was written would not agree.
    """
    started = time.perf_counter()
    _check_place(out, to)
    if to == "onnx":
        need_onnx()
    elif to == "mlflow":
        need_mlflow()
    calibration = quantised.open_calibration(runs[0]) if int8 else None
    voters = Voters.load(runs, ensemble, "cpu", precision="fp32")
    images, real = images_to_check(runs[0], voters.canvas)
    module = load_module(runs, ensemble)
    metadata = describe(runs, ensemble)
    temporary = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    note, fp32 = "", temporary.with_name(f"{temporary.name}.fp32")
    try:
        with progress(f"writing {out.name}", None):
            if to == "onnx":
                runtime = write_onnx(module, voters.canvas, metadata, temporary)
            elif to == "torch":
                runtime = write_torch(module, voters.canvas, metadata, temporary)
            elif to == "mlflow":
                runtime = write_mlflow(module, runs, ensemble, metadata, temporary)
            else:
                runtime = write_hf(module, runs, ensemble, temporary, repository)
        with progress("comparing it with PyTorch", len(images)) as advance:
            worst = largest_difference(runtime, voters, images, advance)
        if not worst <= TOLERANCE:
            raise UserError(
                f"the exported {'folder' if to in FOLDERS else 'file'} differs from PyTorch by up to {worst:.2g} in "
                f"probability, expected at most {TOLERANCE:g}, so it was not kept; try "
                f"--to {'torch' if to == 'onnx' else 'onnx'}"
            )
        if calibration is not None:
            os.replace(temporary, fp32)
            note = _to_int8(ensemble, runtime, fp32, temporary, calibration, metadata)
        _publish(temporary, out)
    finally:
        fp32.unlink(missing_ok=True)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return Exported(out, worst, len(images), real, time.perf_counter() - started, note)


def _to_int8(
    ensemble: Ensemble, runtime: Runtime, fp32: Path, path: Path, calibration: quantised.Calibration,
    metadata: dict[str, str],
) -> str:  # fmt: skip
    with progress("calibrating int8", None):
        small = quantised.quantise(fp32, path, calibration)
    with progress("measuring what int8 costs", 2 * len(calibration.labels)) as advance:
        cost = quantised.cost(ensemble, runtime, small, calibration, advance)
    quantised.note(path, cost, metadata)
    return quantised.in_words(cost)


def _check_place(out: Path, to: To) -> None:
    if to not in FOLDERS:
        check_out(out, "--out")
        return
    if not out.absolute().parent.is_dir():
        raise UserError(f"folder {out.absolute().parent} does not exist; make it, or name another --out")
    if out.is_symlink() or (out.exists() and not (out / FOLDERS[to]).is_file()):
        raise UserError(f"{out} exists and is no earlier export; move it away, or name another --out")


def _publish(temporary: Path, out: Path) -> None:
    """Put what was written in its place; a folder that is there goes only then."""
    if not temporary.is_dir():
        temporary.chmod(0o644)
        os.replace(temporary, out)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def describe(runs: Sequence[UPath], ensemble: Ensemble) -> dict[str, str]:
    """The metadata: JSON texts by name."""
    members = [
        {"id": m.id, "architecture": m.candidate(runs).architecture, "weight": m.weight} for m in ensemble.members
    ]
    made_by = {"run": runs[0].name, "name": ensemble.name, "selector": ensemble.selector, "members": members}
    described = {
        "classes": read_run(runs[0]).classes,
        "fit": read_run(runs[0]).data.fit,
        "ensemble": made_by,
        "select": ensemble.scores.get("select", {}),
    }
    decision = {"factors": ensemble.decision.factors, "cost": ensemble.decision.cost}
    if ensemble.decision.classes is not None:
        described["decision"] = {name: value.tolist() for name, value in decision.items() if value is not None}
    return {name: json.dumps(value) for name, value in described.items()}


def members_in_half_precision(runs: Sequence[UPath], ensemble: Ensemble) -> list[str]:
    """Ids of the members that were trained, and are predicted with, in bf16 or fp16; what is exported is in fp32."""
    candidates = {member.id: member.candidate(runs).info for member in ensemble.members}
    return [id for id, info in candidates.items() if info.precision != "fp32"]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ensemble.export") -> None:
    with exit_on_user_error():
        args = tyro.cli(Export, description=Export.__doc__, prog=prog, args=arguments)
        if args.push is not None:
            check_push(args.push)
        runs = open_runs(args.run)
        ensemble = read_ensemble(runs[0], args.ensemble)
        out = args.out or Path(str(runs[0])) / NAMES[args.to]
        made = export(runs, ensemble, out, args.to, args.int8, args.push)
        kind = "images of the select split" if made.real else "random images (no select split can be opened here)"
        print(f"{made.path}: {made.bytes / 2**20:.1f} MiB after {made.seconds:.0f} s")
        which = "in fp32 it differs" if args.int8 else "differs"
        print(f"{which} from PyTorch by at most {made.largest_difference:.1e} in probability, on {made.images} {kind}")
        if made.note:
            print(made.note)
        if half := members_in_half_precision(runs, ensemble):
            print(f"predict and serve compute {', '.join(half)} in half precision, and may differ a little more")
        if args.push is not None:
            print(f"pushed to {push(made.path, args.push)}")
