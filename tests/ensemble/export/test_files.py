"""ensemble.export: files that agree with PyTorch, used with nothing but their runtime; and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from upath import UPath

from ensemble import export as exporting
from ensemble.export import Exported, export, onnx_file
from ensemble.export.check import Runtime, images_to_check, largest_difference
from ensemble.export.onnx_file import OPSET
from ensemble.export.package import load_module
from ensemble.file import Ensemble, Member, read_ensemble
from ensemble.predict import Voters
from ensemble.selection.blend import Stack
from trainables.data.dataset import default_cache, open_data
from trainables.data.decode import Canvas, decode
from trainables.data.share import share_data
from trainables.errors import UserError
from trainables.models.classic import _TwoByTwo
from trainables.run_directory import read_run

ROOT = Path(__file__).parents[3]


def test_a_file_that_answers_nan_does_not_agree() -> None:
    """Before: NaN in any but the first batch went unnoticed, because no number is larger than NaN."""
    images = np.zeros((80, 2, 2, 3), np.uint8)
    sizes: list[int] = []

    def runtime(part: np.ndarray) -> np.ndarray:
        sizes.append(len(part))
        return np.full((len(part), 3), np.nan if len(sizes) == 3 else 1 / 3)

    told: list[int] = []
    worst = largest_difference(runtime, lambda part: np.full((len(part), 3), 1 / 3), images, told.append)
    assert np.isnan(worst)
    assert told == sizes == [1, 2, 64, 13]


def variants(ensemble: Ensemble) -> dict[str, Ensemble]:
    """The ways in which members are combined."""
    members = tuple(
        Member(m.id, weight, temperature=temperature)
        for m, weight, temperature in zip(ensemble.members, (0.5, 0.3, 0.2), (0.7, 1.0, 2.5), strict=True)
    )
    random = np.random.default_rng(0)
    coefficients = 0.4 * np.eye(3)[:, None] + random.normal(0, 0.1, (3, 3, 3))
    stack = Stack(coefficients, random.normal(size=3))
    return {
        "weights": ensemble,
        "temperatures": dataclasses.replace(ensemble, members=members, temperature=0.6),
        "stack": dataclasses.replace(ensemble, members=members, stack=stack, temperature=1.7),
    }


def example() -> str:
    """The lines that show how to use the file; the README's are the same."""
    lines = [line for line in (exporting.__doc__ or "").splitlines() if line.startswith("    ")]
    text = textwrap.dedent("\n".join(lines))
    readme = (ROOT / "README.md").read_text()
    assert text in readme or "InferenceSession" not in readme
    return text


@pytest.fixture(scope="module")
def images(pictures: Path) -> np.ndarray:
    """uint8 (45, 12, 12, 3), of all classes."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted((pictures / "test").glob("*/*.png"))[::2]])


@pytest.fixture(scope="module")
def tempered(small_run: UPath) -> Ensemble:
    return variants(read_ensemble(small_run))["temperatures"]


@pytest.fixture(scope="module")
def made(small_run: UPath, tempered: Ensemble, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """ensemble.onnx, in a folder of its own."""
    return export([small_run], tempered, tmp_path_factory.mktemp("onnx") / "ensemble.onnx", "onnx")


@pytest.mark.parametrize("kind", ["weights", "temperatures", "stack"])
def test_the_module_computes_what_the_ensemble_predicts(kind: str, small_run: UPath, images: np.ndarray) -> None:
    ensemble = variants(read_ensemble(small_run))[kind]
    expected = Voters.load([small_run], ensemble, "cpu", precision="fp32")(images)
    with torch.no_grad():
        found = load_module([small_run], ensemble)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std(axis=0).min() > 0.01, "the images are told apart, so agreement means something"


def test_an_onnx_file_is_used_with_onnxruntime_numpy_and_pillow(
    small_run: UPath, tempered: Ensemble, made: Exported, pictures: Path
) -> None:
    """The example, in a process that must not import torch, on a picture of the stored size, a wider one, one that is
    rotated by its EXIF orientation, and two that are transparent.

    Before: the example cut the middle out, where the ensemble looks at the whole picture; it looked at photographs of
    phones as they lie in the file, and at the black that hides under transparent pixels.
    """
    assert len(example().splitlines()) == 7
    picture = Image.open(pictures / "test/down/0.png")
    wider = Image.new("RGB", (18, 12))
    wider.paste(picture, (6, 0))
    rotated = wider.copy()
    rotated.getexif()[0x0112] = 6  # by a quarter: across becomes down
    transparent = wider.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(wider.size))
    palette = wider.quantize(16)
    palette.info["transparency"] = 3
    voters = Voters.load([small_run], tempered, "cpu", precision="fp32")
    script = example() + "\nimport sys; assert not {'torch', 'ensemble'} & set(sys.modules)"
    answers = []
    for image in (picture, wider, rotated, transparent, palette):
        image.save(made.path.parent / "cat.jpg", "PNG", exif=image.getexif())  # Pillow looks at the content
        expected = voters(decode(Image.open(made.path.parent / "cat.jpg"), voters.canvas)[None])[0]
        answers.append(expected)
        ran = subprocess.run([sys.executable, "-c", script], cwd=made.path.parent, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        label, probability = ran.stdout.split()
        assert label == read_run(small_run).classes[expected.argmax()]
        assert float(probability) == pytest.approx(float(expected.max()), abs=1e-4)
    for other in answers[2:]:
        assert np.abs(other - answers[1]).max() > 1e-3, "how a picture is read matters, so agreement means something"
    assert sorted(p.name for p in made.path.parent.iterdir()) == ["cat.jpg", "ensemble.onnx"]


def test_an_onnx_file_agrees_on_a_thousand_images(
    small_run: UPath, tempered: Ensemble, made: Exported, images: np.ndarray
) -> None:
    import onnx
    import onnxruntime

    assert made.largest_difference <= 1e-4
    assert made.real
    onnx.checker.check_model(str(made.path))
    assert [entry.version for entry in onnx.load(made.path).opset_import if entry.domain == ""] == [OPSET]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(made.path, options)
    assert [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()] == [("images", "tensor(uint8)", [12, 12, 3])]
    meta = session.get_modelmeta().custom_metadata_map
    assert json.loads(meta["classes"]) == ["across", "down", "grid"]
    assert [m["architecture"] for m in json.loads(meta["ensemble"])["members"]]
    assert json.loads(meta["select"])["images"] == 18
    voters = Voters.load([small_run], tempered, "cpu", precision="fp32")
    random = np.random.default_rng(0)
    noisy = images[random.integers(len(images), size=1000)] + random.normal(0, 30, (1000, 12, 12, 3))
    for batch in (images, images[:1], noisy.clip(0, 255).astype(np.uint8)):
        np.testing.assert_allclose(session.run(None, {"images": batch})[0], voters(batch), atol=1e-4)


def test_a_torch_file(small_run: UPath, tmp_path: Path, images: np.ndarray) -> None:
    ensemble = variants(read_ensemble(small_run))["stack"]
    made = export([small_run], ensemble, tmp_path / "e.pt2", "torch")
    assert made.largest_difference <= 1e-4
    extra = {"classes": ""}
    model = torch.export.load(made.path, extra_files=extra).module()
    assert json.loads(extra["classes"]) == ["across", "down", "grid"]
    voters = Voters.load([small_run], ensemble, "cpu", precision="fp32")
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(images)).numpy(), voters(images), atol=1e-5)


def test_a_file_that_disagrees_is_not_left(small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "e.pt2").write_text("an older one")

    def write(module: torch.nn.Module, size: object, metadata: object, path: Path) -> Runtime:
        module.weights[0] += 3e-4  # type: ignore[index, operator]
        return real(module, size, metadata, path)  # type: ignore[arg-type]

    real = exporting.write_torch
    monkeypatch.setattr(exporting, "write_torch", write)
    with pytest.raises(UserError, match=r"differs from PyTorch by up to 0\.000"):
        export([small_run], read_ensemble(small_run), tmp_path / "e.pt2", "torch")
    assert [p.name for p in tmp_path.iterdir()] == ["e.pt2"]
    assert (tmp_path / "e.pt2").read_text() == "an older one"


def test_without_the_data_set_random_images_are_compared(small_run: UPath, tmp_path: Path) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    info = json.loads((run / "run.json").read_text())
    info["data"]["folder"] = "folder-0123456789abcdef"
    (run / "run.json").write_text(json.dumps(info))
    images, real = images_to_check(run, Canvas(12, 12))
    assert images.shape == (1000, 12, 12, 3)
    assert not real


def test_images_beside_the_run_are_compared(small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    info = json.loads((run / "run.json").read_text())
    share_data(run, open_data(default_cache() / "data" / info["data"]["folder"]))
    expected, _ = images_to_check(run, Canvas(12, 12))
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    images, real = images_to_check(run, Canvas(12, 12))
    assert real
    np.testing.assert_array_equal(images, expected)


def test_mistakes(small_run: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = read_ensemble(small_run)
    with pytest.raises(UserError, match="make it, or name another --out"):
        export([small_run], ensemble, tmp_path / "nowhere/e.onnx", "onnx")
    monkeypatch.setattr(onnx_file, "LARGEST_ONNX", 1000)
    with pytest.raises(UserError, match="one ONNX file ends at 2 GiB; use --to torch"):
        export([small_run], ensemble, tmp_path / "e.onnx", "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime; pip install 'ninefold\[export\]'"):
        export([small_run], ensemble, tmp_path / "e.onnx", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("height", range(1, 12))
def test_two_by_two_pooling_is_adaptive_max_pooling(height: int) -> None:
    x = torch.randn(3, 4, height, 7, generator=torch.Generator().manual_seed(height))
    assert torch.equal(_TwoByTwo()(x), torch.nn.functional.adaptive_max_pool2d(x, 2))
