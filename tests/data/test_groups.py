"""Images of one patient, video or burst, and twins, stay on one side; and a claim without that is too high."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from upath import UPath

from ensemble.file import read_ensemble
from ensemble.pool import load_pool
from ensemble.report.write import write_report
from tests.data.command import COLOURS, explored, learned, paint, paint_folder, planned, refused, swept
from trainables.data.dataset import open_units
from trainables.data.duplicates import Group
from trainables.data.groups import LARGEST_TWINS, count_leaks, draw_units, group_numbers, unit_of_each
from trainables.data.splits import Splits, draw, make_splits
from trainables.errors import UserError
from trainables.storage import read_json


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NINEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fractions", [[0.2], [0.1, 0.1], [0.3, 0.4]])
@pytest.mark.parametrize("seed", range(5))
def test_where_every_image_is_alone_units_change_nothing(seed: int, fractions: list[float]) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, 400)
    alone = np.random.default_rng(seed).permutation(400)
    for one, other in zip(draw(labels, fractions, seed), draw_units(labels, alone, fractions, seed), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("seed", range(20))
def test_no_unit_is_on_two_sides_and_the_shares_are_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(300), rng.integers(1, 12, 300))
    labels = rng.integers(0, 4, 300)[units]
    splits = make_splits(labels, "abc", seed, units=units)
    assert count_leaks(units, splits.train, splits.select) == count_leaks(units, splits.tune, splits.select) == 0
    for c in range(4):
        for split in (splits.tune, splits.select):
            assert (labels[split] == c).sum() / (labels == c).sum() == pytest.approx(0.1, abs=0.02)


def leaks(units: np.ndarray, splits: Splits) -> int:
    """Images that are predicted by a network that was trained on others of their unit."""
    return sum(count_leaks(units, splits.without(fold).train, held) for fold, held in enumerate(splits.folds))


def test_units_of_many_classes_are_drawn_by_their_rarest() -> None:
    """A patient with healthy and ill images: drawn by the majority, the ill ones would be in no split by design."""
    units = np.repeat(np.arange(40), 10)
    labels = np.zeros(400, int)
    labels[units < 10] = np.tile([0] * 9 + [1], 10)
    [held] = draw(labels, [0.2], 0, units)
    assert (labels[held] == 1).sum() == 2


def test_a_huge_unit_is_learned_from_and_the_rest_held_out() -> None:
    units = np.concatenate([np.zeros(90, int), np.arange(1, 11), np.arange(11, 111)])
    labels = np.repeat([0, 1], 100)
    [select] = draw(labels, [0.2], 0, units)
    assert not (units[select] == 0).any()
    assert (labels[select] == 0).sum() == 10, "all others, which is as near to 20 as whole units come"


def test_a_class_of_one_group_is_trained_on() -> None:
    units = np.concatenate([np.zeros(500, int), np.arange(1, 1001)])
    labels = np.repeat([0, 1, 2], 500)
    splits = make_splits(labels, "abc", units=units)
    assert np.isin(np.arange(500), splits.train).all()
    assert sorted(set(labels[splits.select])) == [1, 2]
    with pytest.raises(UserError, match="fewer than two classes"):
        make_splits(labels[:1000], "abc", units=units[:1000])


def test_cross_fitted_units_are_predicted_by_networks_that_have_seen_none_of_them() -> None:
    units = np.repeat(np.arange(40), 5)
    splits = make_splits(np.repeat([0, 1], 100), "abc", units=units)
    assert [len(fold) for fold in splits.folds] == [40] * 5
    assert leaks(units, splits) == 0


def test_held_out_images_with_a_twin_in_train_are_trained_on() -> None:
    labels = np.arange(120) % 3
    units = np.arange(120)
    units[100:110] = units[:10]
    splits = make_splits(labels, "abc", units=units, held_out=30)
    assert np.array_equal(splits.train, np.concatenate([np.arange(90), np.arange(100, 110)]))
    assert len(splits.tune) + len(splits.select) == 20


def test_look_alikes_by_the_hundred_are_no_twins() -> None:
    """Else half of a set of scanned digits would be one unit."""
    many = Group(tuple(range(LARGEST_TWINS + 1)), "near")
    assert unit_of_each([many], None, 400) is None
    assert unit_of_each([Group(many.rows, "exact")], None, 400) is not None
    units = unit_of_each([Group((3, 5), "near")], np.array([0, -1, -1, 1, -1, -1, 1]), 7)
    assert units is not None
    assert units[3] == units[5] == units[6]
    assert len(np.unique(units)) == 5


# --- --group-by -------------------------------------------------------------------------------------------------------


def patients(root: Path) -> Path:
    """Four pictures of each of eight patients a class, named patient_07_2.png."""
    for colour in COLOURS:
        (root / colour).mkdir(parents=True)
        for i in range(32):
            paint(colour, i).save(root / colour / f"patient_{i // 4:02}_{i % 4}.png")
    return root


def test_a_pattern_on_the_paths_makes_groups(tmp_path: Path) -> None:
    root = patients(tmp_path / "scans")
    pattern = r"(\w+/patient_\d+)_"
    plan = learned(tmp_path / "run", tmp_path, "--data", "folder", "--data-dir", str(root), "--group-by", pattern)
    names = explored(tmp_path / "page.html", "--data", "folder", "--data-dir", str(root), "--group-by", pattern)
    units = open_units(plan.data)
    assert units is not None
    assert leaks(units, plan.splits) == 0
    assert plan.data.test_images == 12, "one patient of each class"
    [note] = plan.notes
    assert "groups by (\\w+/patient_\\d+)_ (84 images) stay on one side" in note
    assert note in names["notes"]
    assert len(np.unique(units)) == 21


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is no regular expression"),
        ("nothing", "gives no group"),
        ("png", "gives one group of all images"),
        (r"(\w+)/", "96 images of 3 groups are too few"),
    ],
)
def test_patterns_that_make_no_groups(
    pattern: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = patients(tmp_path / "scans")
    args = ["--data", "folder", "--data-dir", str(root), "--group-by", pattern]
    assert message in refused(capsys, monkeypatch, tmp_path / "run", *args)


def test_groups_need_paths(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no files of their own" in refused(capsys, monkeypatch, tmp_path / "run", "--group-by", "x")


def test_paths_without_a_match_are_alone() -> None:
    assert group_numbers(["a1", "b", "a2", "c1"], r"(\w)\d").tolist() == [0, -1, 0, 1]


# --- twins ------------------------------------------------------------------------------------------------------------


def test_twins_stay_on_one_side_unless_they_are_to_be_ignored(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos" / "train", 20).parent
    for path in sorted(root.rglob("*.png"))[::2]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=70)
    plan = planned(tmp_path / "run", "--data", "folder", "--data-dir", str(root))[1]
    units = open_units(plan.data)
    assert units is not None
    assert len(plan.data.labels) - len(np.unique(units)) == 30
    assert leaks(units, plan.splits) == 0
    [note] = plan.notes
    assert "twins (60 images) stay on one side; otherwise" in note
    without = planned(tmp_path / "other", "--data", "folder", "--data-dir", str(root), "--ignore-twins")[1]
    assert open_units(without.data) is None
    assert leaks(units, without.splits) > 5
    found = explored(tmp_path / "page.html", "--data", "folder", "--data-dir", str(root))
    assert found["leaks"] == []
    assert note in found["notes"]


def test_twins_of_a_test_part_that_was_given_are_told(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "photos" / "train", 12).parent
    paint_folder(root / "test", 4, seed=500)
    Image.open(root / "train/red/03.png").save(root / "test/red/90.png")
    plan = planned(tmp_path / "run", "--data", "folder", "--data-dir", str(root))[1]
    assert plan.data.test_images == 13
    assert plan.notes == ["1 images of the test part have a twin in the train part: its score is flattered"]


def test_the_report_says_what_would_have_leaked_and_what_it_was_worth(tmp_path: Path) -> None:
    root = paint_folder(tmp_path / "images", 30)
    for colour in COLOURS:
        for i in range(0, 20, 2):  # every second one again, brighter by one level: near twins
            picture = np.asarray(Image.open(root / colour / f"{i:02}.png")).astype(int)
            Image.fromarray((picture + 1).clip(0, 255).astype(np.uint8)).save(root / colour / f"again-{i:02}.png")
    plan = swept(tmp_path / "run", "--data", "folder", "--data-dir", str(root))
    write_report([plan.run], read_ensemble(plan.run))
    found = read_json(UPath(plan.run / "report.json"))
    splits, claim = found["splits"], found["select"]["claim"]["accuracy"]
    assert splits["why"] == "twins"
    assert splits["together"] >= 40
    assert 0 < splits["leaks"] <= splits["select"]
    assert splits["leaks_worth"] == pytest.approx((1 - claim) * splits["leaks"] / splits["select"])
    units = load_pool([plan.run]).units
    assert units is not None
    assert 1 < len(units) / len(np.unique(units)) < 2
    page = (plan.run / "report.html").read_text()
    assert f"Otherwise {splits['leaks']} images of tune and select would have had one like them in train" in page


def test_a_report_without_twins_says_nothing_of_them(tmp_path: Path) -> None:
    plan = swept(tmp_path / "run", "--data", "folder", "--data-dir", str(paint_folder(tmp_path / "images", 30)))
    write_report([plan.run], read_ensemble(plan.run))
    assert read_json(UPath(plan.run / "report.json"))["splits"]["leaks_worth"] is None
    assert load_pool([plan.run]).units is None
    assert "Kept on one side" not in (plan.run / "report.html").read_text()
