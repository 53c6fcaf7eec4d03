"""A folder that needs nothing of this repository: config.json, model.safetensors, and the code as `ninefold_model`.

The code is that of the repository itself, copied word for word but for its imports, so it cannot drift from it.
"""

import importlib.util
import json
import re
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from upath import UPath

from ensemble.export.model import EnsembleModule
from ensemble.file import Ensemble
from ensemble.predict import stored_form
from trainables.errors import UserError
from trainables.models.backbones import describe_architecture
from trainables.models.weights import load_weights
from trainables.run_directory import Candidate, read_run

COPIED = (
    "ensemble/export/model.py",
    "trainables/data/decode.py",
    "trainables/models/architecture.py",
    "trainables/models/classic.py",
    "trainables/models/views.py",
)
PACKAGE = "ninefold_model"
NEEDED = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "huggingface_hub")
_OWN_IMPORT = re.compile(r"^from (?:ensemble|trainables)(?:\.\w+)*\.(\w+) import", re.MULTILINE)


def describe_model(runs: Sequence[UPath], ensemble: Ensemble) -> dict[str, Any]:
    """config.json: what EnsembleModule takes, as plain JSON.

    Raises UserError when a member is gone or cannot predict.
    """
    info = read_run(runs[0])
    values: dict[str, Any] = {
        "classes": list(info.classes),
        "image": asdict(stored_form(runs[0])),
        "members": [
            {"weight": m.weight, "temperature": m.temperature, **_describe_member(m.candidate(runs), len(info.classes))}
            for m in ensemble.members
            if m.weight > 0
        ],
        "temperature": ensemble.temperature,
        "stacked": ensemble.stack is not None,
    }
    if ensemble.decision.classes not in (None, len(info.classes)):
        raise UserError(f"ensemble {ensemble.name} decides among {ensemble.decision.classes} classes; select again")
    decision = {"factors": ensemble.decision.factors, "cost": ensemble.decision.cost}
    values["decision"] = {key: value.tolist() for key, value in decision.items() if value is not None} or None
    values["risk"] = None if ensemble.risk is None else asdict(ensemble.risk)
    return values


def _describe_member(candidate: Candidate, classes: int) -> dict[str, Any]:
    info = candidate.info
    if info.config is None or info.mean is None or info.std is None or info.num_classes != classes:
        raise UserError(
            f"candidate {candidate.id} does not say how it predicts; select again with --exclude {candidate.id}"
        )
    return {
        "architecture": describe_architecture(info.config, classes),
        "size": info.image_size or info.config.image_size,
        "mean": list(info.mean),
        "std": list(info.std),
        "views": info.config.tta,
    }


def load_module(runs: Sequence[UPath], ensemble: Ensemble) -> EnsembleModule:
    """The ensemble as a module on the CPU. Raises UserError when a member or its weights are gone."""
    config = describe_model(runs, ensemble)
    state: dict[str, torch.Tensor] = {}
    for number, member in enumerate(member for member in ensemble.members if member.weight > 0):
        weights = load_weights(member.candidate(runs))
        state |= {f"members.{number}.network.{name}": tensor for name, tensor in weights.items()}
    if ensemble.stack is not None:
        coefficients = torch.from_numpy(ensemble.stack.coefficients).float().permute(1, 2, 0)  # (K, C, C)
        state |= {f"coefficients_{k}": one.contiguous() for k, one in enumerate(coefficients)}
        state["intercept"] = torch.from_numpy(ensemble.stack.intercept).float()
    module = EnsembleModule(**config)  # only now: load_weights knows what would not fit before it takes memory
    module.load_state_dict(state)
    return module.eval()


def write_package(folder: Path, module: EnsembleModule, config: dict[str, Any], code: Path) -> None:
    """Write config.json and model.safetensors into `folder`, and the package below `code`; both exist."""
    (folder / "config.json").write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    package = code / PACKAGE
    package.mkdir()
    licence = "# Part of Ninefold, Apache-2.0.\n"
    for one in COPIED:
        source = Path(__file__).parents[2] / one
        text = _OWN_IMPORT.sub(r"from .\1 import", source.read_text(encoding="utf-8"))
        (package / source.name).write_text(licence + text, encoding="utf-8")
    exported = 'from .model import Answers, EnsembleModule\n\n__all__ = ["Answers", "EnsembleModule"]\n'
    (package / "__init__.py").write_text(licence + exported, encoding="utf-8")


def requirements() -> list[str]:
    """The packages that `ninefold_model` needs, pinned to the versions that it was checked with here."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in NEEDED]


def open_package(folder: Path, code: Path) -> EnsembleModule:
    """The module, from what was written alone: to compare it with PyTorch."""
    name = f"{PACKAGE}_{uuid.uuid4().hex}"  # an older one may be loaded
    path = code / PACKAGE
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing but what was written is to be there
    try:
        spec.loader.exec_module(package)
        model: EnsembleModule = package.EnsembleModule.from_pretrained(str(folder))
        return model
    finally:
        sys.dont_write_bytecode = writes
        for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[loaded]
