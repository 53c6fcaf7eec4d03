"""docs/quickstart.ipynb does what it says, cell by cell, in a kernel of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").exists())


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient  # not while collecting: other suites need neither
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "outputs are not committed"
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    answers = {cell.id: said(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert "%" in answers["show-claim"]
    assert len(answers["run-predict"].splitlines()) == 5
    assert answers["run-select"].strip() in ("1", "2")
    report = json.loads((tmp_path / "runs" / "quickstart" / "report.json").read_text())
    assert str(report["test"]["ensemble"]["accuracy"]) in answers["run-report"]
    # a notebook's kernel was started with words of its own, which are not the sweep's
    run = json.loads((tmp_path / "runs" / "quickstart" / "run.json").read_text())
    assert run["command"] == "python -m search.run --trials 4 --run runs/quickstart"


def said(cell: Any) -> str:
    """What a cell printed and returned."""
    texts = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(texts)
