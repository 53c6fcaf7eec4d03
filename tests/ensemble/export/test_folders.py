"""ensemble.export --to hf and --to mlflow: folders that their own libraries load, without this repository."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from upath import UPath

from ensemble.export import Export, export, main
from ensemble.export.card import write_card
from ensemble.export.hf_folder import check_push
from ensemble.export.package import PACKAGE, load_module
from ensemble.file import Ensemble, Member, read_ensemble, write_ensemble
from ensemble.predict import Voters
from ensemble.risk import Risk
from ensemble.selection.blend import Stack
from ensemble.selection.goal import Decision
from tests.hub import serve_hub
from trainables.config import TrialConfig
from trainables.data.decode import decode
from trainables.errors import UserError
from trainables.models.architecture import assemble
from trainables.models.backbones import build, describe_architecture
from trainables.run_directory import read_run

OURS = {"ensemble", "trainables", "search", "cluster", "ninefold"}
ALLOWED = {"PIL", "huggingface_hub", "numpy", "pillow_heif", "timm", "torch", "torchvision", *sys.stdlib_module_names}
CHECK = f"""
import sys
found = {OURS!r} & {{name.partition(".")[0] for name in sys.modules}}
assert not found, found
"""


def clean(script: str, cwd: Path, **env: str) -> str:
    """What a script prints in a process that sees nothing of this repository, in which it is checked at its end."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_TOKEN")}
    ran = subprocess.run(
        [sys.executable, "-c", script + CHECK], cwd=cwd, env={**environment, **env}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def cautious(small_run: UPath) -> Ensemble:
    """Temperatures, a risk, and a decision under which some answers are not the most probable class."""
    ensemble = read_ensemble(small_run)
    members = tuple(
        Member(m.id, weight, temperature=t)
        for m, weight, t in zip(ensemble.members, (0.5, 0.3, 0.2), (0.7, 1.0, 2.5), strict=True)
    )
    claim = {"accuracy": 0.9, "interval": [0.8, 0.95], "log_loss": 0.3, "split": "select", "images": 18}
    return dataclasses.replace(
        ensemble, members=members, temperature=0.6, risk=Risk(0.05, 0.2, 0.7), metric="balanced_accuracy",
        decision=Decision(np.array([0.3, 1.0, 2.0])), scores={**ensemble.scores, "claim": claim},
    )  # fmt: skip


@pytest.fixture(scope="module")
def album(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, of which one is rotated by its EXIF orientation, one transparent and one of another size."""
    folder = tmp_path_factory.mktemp("album")
    for number, path in enumerate(sorted((pictures / "test").glob("*/*.png"))[::8]):
        image = Image.open(path).convert("RGB")
        exif = image.getexif()
        if number == 1:
            exif[0x0112] = 6
        if number == 2:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        if number == 3:
            image = image.resize((30, 20))
        image.save(folder / f"{number:02}.png", exif=exif)
    return folder


def expected_of(run: UPath, ensemble: Ensemble, album: Path) -> tuple[np.ndarray, list[str]]:
    voters = Voters.load([run], ensemble, "cpu", precision="fp32")
    probs = voters(np.stack([decode(Image.open(path), voters.canvas) for path in sorted(album.iterdir())]))
    return probs, [voters.classes[answer] for answer in ensemble.decision.answers(probs)]


# --- Hugging Face -----------------------------------------------------------------------------------------------------

LOAD = """
import json, pathlib, sys
from huggingface_hub import snapshot_download
folder = snapshot_download("me/small")
sys.path.insert(0, folder)
from ninefold_model import EnsembleModule
model = EnsembleModule.from_pretrained(folder)
answers = model.answer(sorted(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ALBUM).iterdir()))
print(json.dumps({"labels": answers.labels, "probs": answers.probabilities.tolist(), "sets": answers.sets,
                  "unsure": answers.unsure.tolist()}))
"""


def test_a_pushed_folder_is_downloaded_and_loaded_without_this_repository(
    small_run: UPath, cautious: Ensemble, album: Path, tmp_path: Path
) -> None:
    """From the command line to the hub, and from the hub into a process that sees nothing of this repository."""
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    write_ensemble(run, dataclasses.replace(cautious, name="cautious"))
    with serve_hub() as (address, files, tokens):
        env = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "ensemble.export", "--to", "hf", "--push", "me/small", "--run", str(run)]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[3])
        assert ran.returncode == 0, ran.stderr
        assert "pushed to" in ran.stdout
        assert set(tokens) == {"Bearer hf_secret"}
        assert {"config.json", "model.safetensors", "README.md", "requirements.txt"} <= set(files)
        script = f"ALBUM = {str(album)!r}\n{LOAD}"
        out = clean(script, tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1")
    answers = json.loads(out)
    probs, labels = expected_of(run, cautious, album)
    np.testing.assert_allclose(answers["probs"], probs, atol=1e-4)
    assert answers["labels"] == labels
    classes = np.array(read_run(run).classes)
    assert labels != classes[probs.argmax(1)].tolist(), "else the decision would not be tested"
    assert cautious.risk is not None
    inside = cautious.risk.sets(probs, cautious.decision)
    assert answers["sets"] == [classes[row].tolist() for row in inside]
    assert answers["unsure"] == cautious.risk.unsure(probs, cautious.decision).tolist()
    assert (run / "ensemble-hf/config.json").exists()


@pytest.mark.parametrize("kind", ["plain", "stack", "cost"])
def test_a_folder_agrees(kind: str, small_run: UPath, cautious: Ensemble, tmp_path: Path, album: Path) -> None:
    random = np.random.default_rng(0)
    stack = Stack(0.4 * np.eye(3)[:, None] + random.normal(0, 0.1, (3, 3, 3)), random.normal(size=3))
    costs = Decision(cost=np.array([[0.0, 1, 1], [9, 0, 1], [1, 1, 0]]))
    ensemble = {
        "plain": read_ensemble(small_run),
        "stack": dataclasses.replace(cautious, stack=stack),
        "cost": dataclasses.replace(cautious, decision=costs, metric="cost"),
    }[kind]
    made = export([small_run], ensemble, tmp_path / "e", "hf")
    assert made.largest_difference <= 1e-4
    assert made.bytes > 10_000
    module = load_module([small_run], ensemble)
    answers = module.answer([path.read_bytes() for path in sorted(album.iterdir())])
    probs, labels = expected_of(small_run, ensemble, album)
    np.testing.assert_allclose(answers.probabilities, probs, atol=1e-4)
    assert answers.labels == labels
    assert (answers.sets is None) == (ensemble.risk is None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]
    again = export([small_run], ensemble, tmp_path / "e", "hf")  # an earlier export is replaced
    assert again.largest_difference == made.largest_difference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


def test_the_code_that_is_written_needs_only_what_is_listed(small_run: UPath, tmp_path: Path) -> None:
    export([small_run], read_ensemble(small_run), tmp_path / "e", "hf")
    for path in (tmp_path / "e" / PACKAGE).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level or node.module.split(".")[0] in ALLOWED, path  # type: ignore[union-attr]
    suffixes = {path.suffix for path in (tmp_path / "e").rglob("*") if path.is_file()}
    assert suffixes == {".py", ".json", ".safetensors", ".md", ".txt"}, "no pickle among them"


def test_weights_that_lack_a_tensor_are_refused(small_run: UPath, tmp_path: Path) -> None:
    """huggingface_hub's own default leaves what is missing at random."""
    from safetensors.torch import load_file, save_file

    from ensemble.export.package import open_package

    export([small_run], read_ensemble(small_run), tmp_path / "e", "hf")
    state = load_file(tmp_path / "e/model.safetensors")
    state.pop("members.0.network.head.weight")
    save_file(state, tmp_path / "e/model.safetensors")
    with pytest.raises(RuntimeError, match=r"members\.0\.network\.head\.weight"):
        open_package(tmp_path / "e", tmp_path / "e")


def test_the_card_says_what_it_is_worth_and_under_which_licences(small_run: UPath, cautious: Ensemble) -> None:
    card = write_card([small_run], cautious, "me/small")
    _, header, text = card.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["pipeline_tag"] == "image-classification"
    assert {"ensemble", "ninefold", "image-classification"} <= set(values["tags"])
    assert values["metrics"] == ["accuracy"]
    assert values["license"] == "unknown"  # all from random weights
    (result,) = values["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.9
    assert result["dataset"]["split"] == "select"
    assert "Expect 90.00% on new images (95 % 80.00% to 95.00%)" in text
    assert "select split (18 images" in text
    assert text.count("| `speednet` |") + text.count("| `keras_cnn` |") + text.count("| `vit_scratch` |") == 3
    assert "`across`, `down`, `grid`" in text
    assert "random weights" in text


def test_the_card_names_the_licences_of_pretrained_weights(small_run: UPath, tmp_path: Path) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    for number, backbone in enumerate(("tf_efficientnet_lite0", "vit_small_patch14_dinov2", "eva02_tiny_patch14_224")):
        path = run / f"candidates/{number:04}/candidate.json"
        values = json.loads(path.read_text())
        values["config"] |= {"backbone": backbone, "pretrained": True}
        path.write_text(json.dumps(values))
    card = write_card([run], read_ensemble(run), None)
    header = yaml.safe_load(card.split("---\n")[1])
    assert "- Weights of `tf_efficientnet_lite0`: apache-2.0." in card
    assert "- Weights of `eva02_tiny_patch14_224`: mit." in card
    assert header["license"] == "other"
    assert header["base_model"][0] == "timm/tf_efficientnet_lite0.in1k"
    assert "[its pretrained weights](https://huggingface.co/timm/tf_efficientnet_lite0.in1k) | apache-2.0 |" in card


def test_names_in_a_run_do_not_become_markup(small_run: UPath, tmp_path: Path) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    info = json.loads((run / "run.json").read_text())
    info["classes"][0] = "<img src=x>`|"
    info["data"]["name"] = "a: [b]\n---"
    (run / "run.json").write_text(json.dumps(info))
    card = write_card([run], read_ensemble(run), None)
    assert "<img" not in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"


@pytest.mark.parametrize(
    ("name", "stem"),
    [("resnet10t", "default"), ("resnet18", "small"), ("vit_tiny_patch16_224", "default"), ("squeezenet1_1", "default"),
     ("shvit_s1", "default"), ("tf_efficientnet_lite0", "default")],
)  # fmt: skip
def test_an_architecture_is_built_again_from_its_description(name: str, stem: str) -> None:
    import torch

    config = TrialConfig(backbone=name, stem=stem, image_size=64, dropout=0.2, drop_path=0.1)  # type: ignore[arg-type]
    described = json.loads(json.dumps(describe_architecture(config, 3)))
    with torch.device("meta"):
        expected, found = build(config, 3).state_dict(), assemble(num_classes=3, **described).state_dict()
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}


def test_mistakes(small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = read_ensemble(small_run)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="exists and is no earlier export; move it away, or name another --out"):
        export([small_run], ensemble, tmp_path / "mine", "hf")
    with pytest.raises(UserError, match="make it, or name another --out"):
        export([small_run], ensemble, tmp_path / "no/where", "hf")
    with pytest.raises(UserError, match="--push is for --to hf, not for --to onnx"):
        Export(push="me/small")
    with pytest.raises(UserError, match="--int8 is for --to onnx, not for --to hf"):
        Export(to="hf", int8=True)
    monkeypatch.setattr("ensemble.export.hf_folder.get_token", lambda: "hf_x")
    with pytest.raises(UserError, match="expected OWNER/NAME of a repository on the hub"):
        check_push("../../etc")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.pyfunc", None)
    with pytest.raises(UserError, match=r"pip install 'ninefold\[mlflow\]'"):
        export([small_run], ensemble, tmp_path / "m", "mlflow")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_push_without_a_token_is_refused_before_any_work(
    small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ensemble.export.hf_folder.get_token", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--to", "hf", "--push", "me/small", "--run", str(small_run), "--out", str(tmp_path / "e")])
    told = capsys.readouterr().err
    assert told == "error: --push needs a token of the hub; set HF_TOKEN, or log in with: hf auth login\n"
    assert not list(tmp_path.iterdir())


# --- MLflow -----------------------------------------------------------------------------------------------------------

PYFUNC = """
import base64, json, pathlib
import mlflow.pyfunc, numpy as np, pandas as pd
from PIL import Image
model = mlflow.pyfunc.load_model(MODEL)
files = sorted(pathlib.Path(ALBUM).iterdir())
pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((12, 12))) for path in files])
columns = {
    "paths": pd.DataFrame({"image": [str(path) for path in files]}),
    "bytes": pd.DataFrame({"image": [path.read_bytes() for path in files]}),
    "pixels": pd.DataFrame({"image": list(pixels)}),
    "array": {"image": pixels},
    "urls": pd.DataFrame({"image": ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
                                    for path in files]}),
}
found = {name: json.loads(model.predict(column).to_json()) for name, column in
         columns.items()}
found["example"] = json.loads(model.predict(model.input_example).to_json())
found["inputs"] = model.metadata.get_input_schema().to_dict()
found["outputs"] = model.metadata.get_output_schema().to_dict()
direct = model.unwrap_python_model().predict(None, pixels)
found["direct"] = json.loads(direct.to_json())
print(json.dumps(found))
"""


@pytest.mark.track
def test_an_mlflow_model_is_loaded_by_mlflow_without_this_repository(
    small_run: UPath, cautious: Ensemble, album: Path, tmp_path: Path
) -> None:
    made = export([small_run], cautious, tmp_path / "model", "mlflow")
    assert made.largest_difference <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not list((tmp_path / "model").rglob("*.pkl"))
    assert not list((tmp_path / "model").rglob("__pycache__"))
    needed = (tmp_path / "model/requirements.txt").read_text()
    assert all(f"{name}==" in needed for name in ("mlflow", "torch", "timm", "safetensors"))
    (tmp_path / "elsewhere").mkdir()
    script = f"MODEL, ALBUM = {str(tmp_path / 'model')!r}, {str(album)!r}\n{PYFUNC}"
    found = json.loads(clean(script, tmp_path / "elsewhere"))
    probs, labels = expected_of(small_run, cautious, album)
    for kind in ("paths", "bytes", "urls"):
        assert list(found[kind]["label"].values()) == labels
        np.testing.assert_allclose(list(found[kind]["probabilities"].values()), probs, atol=1e-4)
        assert cautious.risk is not None
        assert list(found[kind]["unsure"].values()) == cautious.risk.unsure(probs, cautious.decision).tolist()
        assert all(label in chosen for label, chosen in zip(labels, found[kind]["set"].values(), strict=True))
    voters = Voters.load([small_run], cautious, "cpu", precision="fp32")
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB").resize((12, 12))) for p in sorted(album.iterdir())])
    for kind in ("pixels", "array", "direct"):
        np.testing.assert_allclose(list(found[kind]["probabilities"].values()), voters(pixels), atol=1e-4)
    assert [column["name"] for column in found["inputs"]] == ["image"]
    assert [column["name"] for column in found["outputs"]] == ["label", "probabilities", "set", "unsure"]
    assert len(found["example"]["label"]) == 1
