"""ensemble.export --int8: calibrated on train images only, smaller, and what it costs is measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble.export import export
from ensemble.export.int8 import cost, layers, open_calibration
from ensemble.export.onnx_file import open_onnx
from ensemble.file import read_ensemble
from ensemble.predict import Voters
from trainables.data.share import open_run_data
from trainables.errors import UserError


def test_an_int8_file_says_what_it_costs(small_run: UPath, tmp_path: Path) -> None:
    import onnx

    ensemble = read_ensemble(small_run)
    made = export([small_run], ensemble, tmp_path / "small.onnx", "onnx", int8=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx"]
    model = onnx.load(made.path)
    onnx.checker.check_model(str(made.path))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") > 20
    assert sum(w.data_type == onnx.TensorProto.INT8 for w in model.graph.initializer) > 10
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["across", "down", "grid"]
    said = json.loads(metadata["int8"])
    data, splits = open_run_data(small_run)
    images = np.asarray(data.images[splits.select])
    voters = Voters.load([small_run], ensemble, "cpu", precision="fp32")
    both = [runtime(images) for runtime in (voters, open_onnx(made.path))]
    right = [(probs.argmax(1) == data.labels[splits.select]).astype(float) for probs in both]
    assert said["accuracy"] == {"fp32": right[0].mean(), "int8": right[1].mean()}
    assert said["difference"] == pytest.approx((right[1] - right[0]).mean())
    low, high = said["interval"]
    assert low < said["difference"] < high
    assert said["calibrated"] == {"split": "train", "images": len(splits.train)}
    assert (said["split"], said["images"]) == ("select", len(splits.select))
    assert 0 < np.abs(both[0] - both[1]).max() < 0.2, "it is another file, and near the first"
    assert made.note.startswith(f"int8 answers {right[1].mean():.2%} of the select split right")


def test_layers_of_networks_are_computed_in_int8_and_nothing_else() -> None:
    """Before: a transformer's layers stayed in fp32, because the exporter had given their weights other names."""
    from onnx import TensorProto, helper

    weights = [
        helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in ("val_7", "kernel", "coefficients_0")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "val_7"], ["a"], name="linear"),
        helper.make_node("Conv", ["a", "kernel"], ["b"], name="conv"),
        helper.make_node("MatMul", ["a", "b"], ["c"], name="attention"),
        helper.make_node("MatMul", ["c", "coefficients_0"], ["d"], name="stacking"),
        helper.make_node("Mul", ["d", "val_7"], ["e"], name="scale"),
    ]
    assert layers(helper.make_graph(nodes, "g", [], [], weights)) == ["linear", "conv"]


def test_it_is_calibrated_on_train_images_alone(small_run: UPath) -> None:
    data, splits = open_run_data(small_run)
    calibration = open_calibration(small_run)
    np.testing.assert_array_equal(calibration.train, data.images[splits.train])
    np.testing.assert_array_equal(calibration.labels, data.labels[splits.select])
    held = {image.tobytes() for image in data.images[splits.select]}
    assert not held & {image.tobytes() for image in calibration.train}


def test_the_cost_is_that_of_the_ensembles_answers(small_run: UPath) -> None:
    calibration, ensemble = open_calibration(small_run), read_ensemble(small_run)
    truth = np.eye(3)[calibration.labels]
    places = iter([truth, np.roll(truth, 1, axis=1)])  # one answers all right, the other none

    def runtime(images: np.ndarray) -> np.ndarray:
        return next(places)

    found = cost(ensemble, runtime, runtime, calibration, lambda images: None)
    assert found["accuracy"] == {"fp32": 1.0, "int8": 0.0}
    assert found["difference"] == -1
    assert -1 <= found["interval"][0] < found["interval"][1] < 0


def test_a_run_whose_train_and_select_are_the_same_is_refused(small_run: UPath, tmp_path: Path) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    with np.load(run / "splits.npz") as file:
        splits = dict(file)
    splits["select"] = splits["tune"] = splits["train"]
    np.savez(run / "splits.npz", **splits)
    with pytest.raises(UserError, match="does not keep them apart; export without --int8"):
        export([run], read_ensemble(run), tmp_path / "e.onnx", "onnx", int8=True)
    assert not (tmp_path / "e.onnx").exists()
