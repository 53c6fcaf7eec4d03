"""docs/data.md names a test for every layout and format: they are there."""

import re
from pathlib import Path

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())


def test_every_test_that_the_page_names_exists() -> None:
    text = (ROOT / "docs/data.md").read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", text))
    assert len(names) > 30
    assert sorted(name for name in names if f"def {name}(" not in tests) == []
    for file in re.findall(r"`(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(file))


def test_the_counts_of_broken_inputs_are_right() -> None:
    from tests.data import test_broken

    text = (ROOT / "docs/data.md").read_text()
    assert f"lists {len(test_broken.DATA_SETS)} data sets and {len(test_broken.FILES)} files" in text
