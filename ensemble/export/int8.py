"""An ONNX file whose convolutions and matrix products are computed in int8, and what that costs in accuracy.

onnxruntime's static quantisation: activations are scaled by what train images of the run bring, weights channel by
channel. The cost is measured on the select split, where both files answer the same images.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from ensemble.export.check import Runtime
from ensemble.export.onnx_file import open_onnx
from ensemble.export.torch_file import silence
from ensemble.file import Ensemble
from ensemble.selection.claim import paired_interval
from trainables.data.share import open_run_data
from trainables.errors import UserError

CALIBRATED = 256  # train images
BATCH = 32
QUANTISED = ["Conv", "MatMul", "Gemm"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Images of a run: `train` uint8 (M, H, W, 3) to calibrate on, `select` (N, H, W, 3) with its labels (N,)."""

    train: np.ndarray
    select: np.ndarray
    labels: np.ndarray


def open_calibration(run: UPath) -> Calibration:
    """Raises UserError when the run's images are not within reach, or no train image is outside select."""
    data, splits = open_run_data(run)
    train = np.setdiff1d(splits.train, np.concatenate([splits.select, splits.tune]))
    if len(splits.select) == 0 or len(train) == 0:
        raise UserError(
            f"--int8 needs train images to calibrate on and others, of the select split, to measure its cost; {run} "
            "(cross-fitted, or a refit) does not keep them apart; export without --int8"
        )
    rows = train[np.linspace(0, len(train) - 1, min(CALIBRATED, len(train))).round().astype(int)]
    return Calibration(
        np.asarray(data.images[rows]), np.asarray(data.images[splits.select]), np.asarray(data.labels[splits.select])
    )


def quantise(fp32: Path, path: Path, calibration: Calibration) -> Runtime:
    """Write the int8 file beside the fp32 one, with its metadata, and open it."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name(f"{path.name}.prepared")
    try:
        with silence():
            quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
            chosen = layers(onnx.load(prepared).graph)
            quantize_static(
                prepared, path, _Reader(calibration.train), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=QUANTISED,
                nodes_to_quantize=chosen,
            )  # fmt: skip
    finally:
        prepared.unlink(missing_ok=True)
    return open_onnx(path)


def layers(graph: Any) -> list[str]:
    """Names of the nodes of an ONNX graph that are layers of networks, because they have weights: products of
    activations, as in attention, stay in fp32, and so does the layer that stacks members."""
    weights = {one.name for one in graph.initializer if not one.name.startswith("coefficients_")}
    return [node.name for node in graph.node if node.op_type in QUANTISED and weights & set(node.input[1:2])]


class _Reader:
    """What onnxruntime asks for batches to calibrate on, until there is none."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = _batches(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def cost(
    ensemble: Ensemble, fp32: Runtime, int8: Runtime, calibration: Calibration, advance: Callable[[int], None]
) -> dict[str, Any]:
    """What int8 costs on the select split, as plain JSON: both `accuracy`s, their paired `difference` (int8 less fp32)
    with its 95 % `interval`."""
    right: dict[str, np.ndarray] = {}
    for name, runtime in (("fp32", fp32), ("int8", int8)):
        answers = []
        for batch in _batches(calibration.select):
            answers.append(ensemble.decision.answers(runtime(batch)))
            advance(len(batch))
        right[name] = np.concatenate(answers) == calibration.labels
    difference = right["int8"].astype(np.float64) - right["fp32"]
    return {
        "calibrated": {"split": "train", "images": len(calibration.train)},
        "split": "select",
        "images": len(calibration.labels),
        "accuracy": {name: float(one.mean()) for name, one in right.items()},
        "difference": float(difference.mean()),
        "interval": list(paired_interval(difference)),
    }


def note(path: Path, cost: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write the metadata of the fp32 file, and the cost as `int8`, into the file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {**metadata, "int8": json.dumps(cost)})
    onnx.save(model, path)


def in_words(cost: dict[str, Any]) -> str:
    low, high = cost["interval"]
    int8, fp32 = cost["accuracy"]["int8"], cost["accuracy"]["fp32"]
    return (
        f"int8 answers {int8:.2%} of the select split right, fp32 {fp32:.2%}: "
        f"{100 * cost['difference']:+.2f} points (95 % {100 * low:+.2f} to {100 * high:+.2f}, {cost['images']} "
        f"images); calibrated on {cost['calibrated']['images']} train images"
    )


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), BATCH):
        yield np.ascontiguousarray(images[start : start + BATCH])
