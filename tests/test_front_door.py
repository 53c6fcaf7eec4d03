"""The front door: what `import ninefold` gives, and the command `ninefold`."""

import importlib.metadata
import inspect
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from upath import UPath

import ninefold
from ensemble.file import read_ensemble
from ensemble.predict import Predict, predict_folder
from ensemble.select import Select
from ninefold.__main__ import VERBS, main
from search.config import SearchConfig, name_data
from tests.conftest import draw_folder
from tests.ensemble.test_predict import rows_of
from trainables.command import make_options
from trainables.run_directory import read_run


@pytest.fixture
def run(small_run: UPath, tmp_path: Path) -> Path:
    return Path(shutil.copytree(str(small_run), tmp_path / "runs" / "copy"))


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `ninefold WORDS`."""
    monkeypatch.setattr(sys, "argv", ["ninefold", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    return code, *capsys.readouterr()


# --- Python ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_predicted_as_the_command_does(small_run: UPath, pictures: Path, tmp_path: Path) -> None:
    answers = ninefold.load(str(small_run), device="cpu").predict(pictures / "test")
    out = tmp_path / "out.csv"
    predict_folder(Predict(pictures / "test", out, (str(small_run),), probs=True, device="cpu"))
    rows = rows_of(out)[1:]
    assert len(answers) == 90
    assert answers.ids == tuple(row[0] for row in rows)
    assert answers.labels == tuple(row[1] for row in rows)
    np.testing.assert_allclose(answers.probs, [[float(p) for p in row[2:]] for row in rows], atol=1e-6)
    assert answers.classes == ("across", "down", "grid")
    assert answers.unreadable == {}


def test_files_pictures_and_pixels_are_predicted_alike(small_run: UPath, pictures: Path) -> None:
    model = ninefold.load(small_run, "equal", device="cpu")
    files = sorted((pictures / "test").glob("*/*.png"))[:5]
    from_files = model.predict(files)
    assert from_files.ids == tuple(map(str, files))
    opened = [Image.open(file) for file in files]
    pixels = [np.asarray(image.convert("RGB")) for image in opened]
    for others in (opened, pixels, np.stack(pixels)):
        answers = model.predict(others)
        assert answers.ids == ("0", "1", "2", "3", "4")
        np.testing.assert_array_equal(answers.probs, from_files.probs)
    for one in (str(files[0]), opened[0], pixels[0]):
        np.testing.assert_allclose(model.predict(one).probs, from_files.probs[:1], atol=1e-6)
    assert model.predict([files[0], files[0]]).ids == (str(files[0]),) * 2  # a row each


def test_a_phone_s_picture_is_turned_and_stays_as_it_is(small_run: UPath, pictures: Path, tmp_path: Path) -> None:
    image = Image.open(pictures / "test" / "across" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees, which undoes the other turn
    image.rotate(90).save(tmp_path / "phone.png", exif=exif)
    turned = Image.open(tmp_path / "phone.png")
    model = ninefold.load(small_run, device="cpu")
    before = np.asarray(turned)
    np.testing.assert_array_equal(model.predict(turned).probs, model.predict(image).probs)
    np.testing.assert_array_equal(np.asarray(turned), before)


def test_an_unreadable_file_has_a_row_without_a_label(small_run: UPath, pictures: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    answers = ninefold.load(small_run, device="cpu").predict([broken, pictures / "test" / "grid" / "1.png"])
    assert answers.labels[0] == ""
    assert answers.labels[1] in answers.classes
    assert np.isnan(answers.probs).tolist() == [[True] * 3, [False] * 3]
    assert "not an image" in answers.unreadable[str(broken)]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([], "there are no images"),
        ("nowhere.png", "image nowhere.png does not exist"),
        (np.zeros((2, 8, 8, 3)), "image 0 is float64 (8, 8, 3); expected a file, a Pillow image, or uint8"),
        ([None], "image 0 is NoneType"),
    ],
)
def test_what_is_no_image_is_refused(small_run: UPath, images: object, expected: str) -> None:
    with pytest.raises(ninefold.UserError) as error:
        ninefold.load(small_run, device="cpu").predict(images)  # type: ignore[arg-type]
    assert expected in str(error.value)


def test_select_and_report(run: Path, tmp_path: Path) -> None:
    told = tmp_path / "select.json"
    ensemble = ninefold.select(run, top_k=2, selector="greedy", name="mine", json=told)
    assert len(ensemble.members) <= 2
    written = json.loads((run / "ensembles" / "mine.json").read_text())
    assert written["members"] == [{"id": m.id, "weight": m.weight} for m in ensemble.members]
    assert json.loads(told.read_text()) == {
        "path": str(run / "ensembles" / "mine.json"), **written, "created": json.loads(told.read_text())["created"]
    }  # fmt: skip
    assert "json" not in ensemble.options
    numbers = ninefold.report(run, ensemble="mine", json=tmp_path / "report.json")
    assert numbers["test"]["ensemble"]["images"] == 90
    assert json.loads((run / "report.json").read_text()) == json.loads((tmp_path / "report.json").read_text())
    assert (run / "report.html").exists()
    assert ninefold.load(run).ensemble == read_ensemble(UPath(run), "mine")


def test_what_takes_long_tells_how_far_it_is(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """On stderr, where a test has no terminal; a line after every part, for what waits here is no time."""
    monkeypatch.setattr("trainables.command.LINE_S", 0.0)
    monkeypatch.setattr("ensemble.predict.BATCH", 30)
    ninefold.load(run, device="cpu").predict(pictures / "test")
    assert capsys.readouterr().err == "predicting: 30 of 90\npredicting: 60 of 90\n"
    ninefold.report(run)
    assert "predicting the test part: 240 of 270\n" in capsys.readouterr().err
    draw_folder(tmp_path / "new", per_class=10)
    code, out, err = command(
        monkeypatch, capsys, "explore", "--data-dir", tmp_path / "new", "--out", tmp_path / "x.html"
    )
    assert "decoding folder: 59 of 60\n" in err
    assert code == 0, err
    assert "written to" in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_kk": 3}, "unknown option 'top_kk'; did you mean top_k?"),
        ({"top_k": "3"}, "option top_k is '3': expected `int`, got `str`"),
        ({"score": "f1"}, "option score is 'f1': expected one of log_loss, brier, accuracy"),
        ({"json": 3}, "option json is 3: expected a path, got int"),
        ({"json": "/nowhere/x.json"}, "folder /nowhere does not exist"),
        ({"json": "/tmp"}, "/tmp is a folder"),
        ({"selector": "gready"}, "did you mean greedy?"),
        ({"run": "nowhere"}, "nowhere is not a run directory"),
    ],
)
def test_mistakes_in_python_are_told_in_a_line(run: Path, options: dict, expected: str) -> None:
    with pytest.raises(ninefold.UserError) as error:
        ninefold.select(**{"run": run, **options})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (run / "ensembles").iterdir()) == ["equal.json"]


def test_options_are_as_forgiving_as_a_command_line() -> None:
    made = make_options(Select, {"run": Path("a"), "top_k": np.int64(3), "max_params": 5, "score": None, "json": "x"})
    assert made == Select(run=("a",), top_k=3, max_params=5.0, json=Path("x"))
    assert make_options(Select, {"run": [Path("a"), "b"]}).run == ("a", "b")


def test_data_is_a_name_a_folder_or_a_table(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_data(pictures) == {"data": "folder", "data_dir": str(pictures)}
    assert name_data(str(pictures)) == name_data(pictures)
    assert name_data(tmp_path / "images.CSV") == {"data": "folder", "labels": str(tmp_path / "images.CSV")}
    assert name_data("hf:org/name") == {"data": "hf:org/name"}
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name_data("digits") == {"data": "digits"}


def test_a_sweep_refuses_before_it_starts_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong, expected in (
        ({"data": "cifar11"}, "unknown data set 'cifar11'; did you mean cifar10"),
        ({"data": tmp_path / "nowhere"}, "nowhere does not exist"),
        ({"minutes": 0}, "--minutes is 0"),
        ({"minuts": 3}, "unknown option 'minuts'; did you mean minutes?"),
    ):
        with pytest.raises(ninefold.UserError) as error:
            ninefold.sweep(**wrong)  # type: ignore[arg-type]
        assert expected in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_says_its_command() -> None:
    """Before: the words that the process was started with, which in a notebook are the kernel's."""
    assert SearchConfig().command() == "python -m search.run"
    config = SearchConfig(
        data="folder", data_dir=Path("my photos"), group_by="(.*)_[0-9]+", from_scratch=True, minutes=0.5,
        backbones=("speednet", "vit_scratch"), warm_start=("a", "b"), pruner="none", gpus_per_trial=0.0,
    )  # fmt: skip
    python, m, module, *words = shlex.split(config.command())
    assert (python, m, module) == ("python", "-m", "search.run")
    assert tyro.cli(SearchConfig, args=words) == config


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = command(monkeypatch, capsys, verb, "--help")
    assert code == 0
    assert f"usage: ninefold {verb}" in out
    options, _ = VERBS[verb]()
    assert inspect.getdoc(options).startswith(inspect.getdoc(VERBS[verb])), "both say the same of the command"
    for name in inspect.signature(options).parameters:
        assert f"--{name.replace('_', '-')}" in out


def test_help_lists_the_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for words in ((), ("--help",), ("-h",)):
        code, out, _ = command(monkeypatch, capsys, *words)
        assert code == 0
        assert all(f"\n  {verb} " in out for verb in VERBS)


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert command(monkeypatch, capsys, "--version")[1].strip() == importlib.metadata.version("ninefold")


def test_a_folder_without_its_option_is_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, _, told = command(monkeypatch, capsys, "explore", "photos")
    assert code == 2
    assert told.strip() == "error: 'photos' is no option; did you mean --data folder --data-dir photos?"


def test_mistakes_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for words, expected in (
        (("selct",), "error: unknown command 'selct'; did you mean select? known: sweep, select,"),
        (("select", "--run", "nowhere"), "error: nowhere is not a run directory"),
        (("sweep", "--trials", "0"), "error: --trials is 0"),
        (("predict", "--images", "nowhere"), "error: image folder nowhere does not exist"),
    ):
        code, out, err = command(monkeypatch, capsys, *words)
        assert (code, out) == (2, "")
        assert err.startswith(expected)
        assert len(err.splitlines()) == 1


def test_verbs_do_what_their_modules_do(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, out, _ = command(monkeypatch, capsys, "select", "--run", run, "--selector", "best_single")
    assert code == 0
    assert "best_single: 1 of 3 candidates" in out
    assert len(read_ensemble(UPath(run), "best_single").members) == 1
    code, out, _ = command(monkeypatch, capsys, "report", "--run", run, "--ensemble", "best_single")
    assert code == 0
    assert f"written to {run / 'report.html'}" in out
    assert read_run(UPath(run)).classes == ("across", "down", "grid")


def test_completion_knows_all_verbs_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    code, out, _ = command(monkeypatch, capsys, "--tyro-print-completion", "bash")
    assert code == 0
    assert all(f"'{verb}'" in out or f'"{verb}"' in out for verb in VERBS)
    assert all(word in out for word in ("--top-k", "--data-dir", "--ray-serve", "--fiftyone"))
    command(monkeypatch, capsys, "--tyro-write-completion", "zsh", tmp_path / "_ninefold")
    assert (tmp_path / "_ninefold").read_text().startswith("#compdef ninefold")


def test_the_package_is_two_files() -> None:
    assert sorted(path.name for path in Path(ninefold.__file__).parent.glob("*.py")) == ["__init__.py", "__main__.py"]
