"""What MLflow runs to load an exported ensemble (its "models from code"); written into the model's folder as it is."""

import base64
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.models import set_model


class Classifier(mlflow.pyfunc.PythonModel):
    """Images in; in each row of a DataFrame out `label`, `probabilities`, and where it is known `set` and `unsure`."""

    def load_context(self, context: Any) -> None:
        from ninefold_model import EnsembleModule  # beside this file: MLflow adds its folder to the path

        self.model = EnsembleModule.from_pretrained(context.artifacts["ensemble"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow would read a schema
        """model_input: a DataFrame whose column `image` (or its first) holds images of any size: paths, bytes of image
        files, `data:` URLs of these, or pixels, uint8 (H, W, 3). From Python without MLflow's checks also an array,
        uint8 (N, H, W, 3)."""
        if isinstance(model_input, pd.DataFrame):
            column = "image" if "image" in model_input.columns else model_input.columns[0]
            pictures = [picture for cell in model_input[column] for picture in self._pictures(cell)]
        else:
            array = np.asarray(model_input)
            pictures = list(self._pixels(array[None] if array.ndim == 3 else array))
        answers = self.model.answer(pictures)
        columns: dict[str, Any] = {
            "label": answers.labels,
            "probabilities": [row.astype(np.float64).tolist() for row in answers.probabilities],
        }
        if answers.sets is not None and answers.unsure is not None:
            columns |= {"set": answers.sets, "unsure": answers.unsure.tolist()}
        return pd.DataFrame(columns)

    def _pictures(self, cell: Any) -> list[Any]:
        """Those of a cell: one, or several paths, bytes or URLs where {"image": [...]} came, of which MLflow makes one
        cell."""
        if isinstance(cell, np.ndarray | list) and len(cell) and isinstance(cell[0], str | bytes):
            return [self._picture(one) for one in cell]
        return [self._picture(cell)]

    def _picture(self, cell: Any) -> Any:
        if isinstance(cell, np.ndarray | list):
            return self._pixels(np.asarray(cell))
        if isinstance(cell, str) and cell.startswith("data:"):  # bytes in JSON: data:image/png;base64,...
            return base64.b64decode(cell.partition(",")[2])
        return cell

    def _pixels(self, array: np.ndarray) -> np.ndarray:
        """Whole numbers from 0 to 255 of another type, such as JSON brings, as uint8."""
        if array.dtype != np.uint8 and np.issubdtype(array.dtype, np.integer):
            if array.size and (array.min() < 0 or array.max() > 255):
                raise ValueError(f"pixels go from {array.min()} to {array.max()}, expected 0 to 255")
            return array.astype(np.uint8)
        return array


set_model(Classifier())
