"""An ensemble as a model folder of MLflow: a pyfunc "from code", whose weights are safetensors.

MLmodel, requirements.txt, input_example.json, ...   MLflow's own
mlflow_code.py                                       what MLflow runs to load it
code/ninefold_model/                                 the code, see package.py
artifacts/ensemble/                                  config.json and model.safetensors
"""

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from upath import UPath

from ensemble.export.check import Runtime
from ensemble.export.model import EnsembleModule
from ensemble.export.package import PACKAGE, describe_model, open_package, requirements, write_package
from ensemble.export.torch_file import silence
from ensemble.file import Ensemble
from trainables.errors import UserError

CODE = "mlflow_code.py"


def need_mlflow() -> None:
    """Raise UserError when MLflow is missing."""
    try:
        import mlflow.pyfunc  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to mlflow needs the package {error.name}; pip install 'ninefold[mlflow]'") from None


def write_mlflow(
    module: EnsembleModule, runs: Sequence[UPath], ensemble: Ensemble, metadata: dict[str, str], folder: Path
) -> Runtime:
    """Write the folder, and open what it holds."""
    import mlflow
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    outputs = [ColSpec(DataType.string, "label"), ColSpec(Array(DataType.double), "probabilities")]
    if ensemble.risk is not None:
        outputs += [ColSpec(Array(DataType.string), "set"), ColSpec(DataType.boolean, "unsure")]
    # any type, because MLflow has none for pixels beside paths and bytes
    signature = ModelSignature(Schema([ColSpec(AnyType(), "image")]), Schema(outputs))
    parts = folder.with_name(f"{folder.name}.parts")
    (parts / "ensemble").mkdir(parents=True)
    try:
        write_package(parts / "ensemble", module, describe_model(runs, ensemble), code=parts)
        shutil.copyfile(Path(__file__).with_name(CODE), parts / CODE)
        # it warns of a type that is any, and shows bars of copying
        with silence(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            mlflow.pyfunc.save_model(
                path=str(folder),
                python_model=str(parts / CODE),
                code_paths=[str(parts / PACKAGE)],
                artifacts={"ensemble": str(parts / "ensemble")},
                signature=signature,
                input_example={"image": [_example().tolist()]},
                pip_requirements=[f"mlflow=={mlflow.__version__}", "pandas", *requirements()],
                metadata={name: json.loads(text) for name, text in metadata.items()},
            )
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return open_package(folder / "artifacts" / "ensemble", code=folder / "code").probabilities


def _example() -> np.ndarray:
    """A small picture, uint8 (8, 8, 3), that is nobody's."""
    return np.linspace(0, 255, 8 * 8 * 3).astype(np.uint8).reshape(8, 8, 3)
