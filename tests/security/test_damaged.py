"""A run directory whose files are damaged: every command says so in a line, and goes on with the rest where it can."""

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble import predict as predicting
from ensemble import select as selecting
from ensemble.report import __main__ as reporting
from search.study.mirror import open_mirror
from tests.small_run import change
from trainables.run.records import read_records


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("candidate.json", b"[" * 200_000),
        ("candidate.json", b'{"id": "0001", "config": null, "metrics": ' + b"[" * 200_000),
        ("candidate.json", b""),
        ("candidate.json", b"null"),
        ("candidate.json", b'{"id": "0001", "config": {"lr": "fast"}}'),
        ("candidate.json", b'{"id": "0001", "config": {"warp": 9}}'),
        ("candidate.json", b'{"id": "0001", "metrics": "good"}'),
        ("candidate.json", b"\xff\xfe{}"),
        ("select_probs.npy", b""),
        ("select_probs.npy", b"\x93NUMPY"),
        ("select_probs.npy", b"PK\x03\x04 an archive"),
        ("select_probs.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': 'O', 'fortran_order': False, 'shape': (1, 1), }"),
        ("select_probs.npy", b"\x93NUMPY\x01\x00\x05\x00junk\n"),
    ],
)
def test_a_damaged_candidate_is_named_and_left_out(run: Path, command, file: str, content: bytes) -> None:
    (run / "candidates" / "0001" / file).write_bytes(content)
    code, said = command(selecting, "--run", run)
    assert code == 0, said
    assert "left out 0001" in " ".join(said.split())


def test_a_null_configuration_is_none(run: Path, command) -> None:
    """Before: `"config": null` stopped select with a traceback."""
    change(run / "candidates" / "0001" / "candidate.json", lambda info: info.update(config=None))
    assert command(selecting, "--run", run)[0] == 0


def test_an_archive_in_an_arrays_place_is_left_out(run: Path, command) -> None:
    probs = np.load(run / "candidates" / "0001" / "select_probs.npy")
    with open(run / "candidates" / "0001" / "select_probs.npy", "wb") as file:
        np.savez(file, probs)
    code, said = command(selecting, "--run", run)
    assert code == 0
    assert "left out 0001" in " ".join(said.split())


def test_a_named_pipe_is_not_waited_for(run: Path, command) -> None:
    for name in ("candidate.json", "select_probs.npy"):
        path = run / "candidates" / "0001" / name
        before = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        code, said = command(selecting, "--run", run)
        assert code == 0
        assert "left out 0001" in " ".join(said.split())
        path.unlink()
        path.write_bytes(before)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "", "null", "[]", '{"classes": ["a"]}', '{"classes": 1, "split_fingerprint": "x"}']
)
def test_a_damaged_run_json_is_one_line(run: Path, command, text: str) -> None:
    (run / "run.json").write_text(text)
    code, said = command(selecting, "--run", run)
    assert code == 2
    assert len(said.strip().splitlines()) == 1
    assert "run.json" in said


def test_a_study_that_is_a_program_is_not_run(run: Path, command) -> None:
    """It is read by nobody, and where the sweep goes on another one is made."""
    with sqlite3.connect(run / "study.db") as database:
        database.executescript(
            "CREATE TABLE hidden (x); CREATE VIEW studies AS WITH RECURSIVE c(x) AS "
            "(SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x AS study_id FROM c;"
        )
    assert command(reporting, "--run", run, "--ensemble", "greedy")[0] == 0
    records = read_records(UPath(run))
    mirror = open_mirror(UPath(run), None, "run", True, records)
    mirror.close()
    assert len(mirror.study.trials) == len(records)


@pytest.mark.parametrize(
    "content",
    [
        b"[]", b"{}", b'{"number": 7}', b'{"number": 0, "stage": "ended"}', b'{"number": -1}', b"\xff",
        b'{"number": 0, "stage": "ended", "outcome": "finished", "params": {"lr": 1}, "distributions": {"lr": "x"}}',
        b'{"number": 0, "config": {"lr": "fast"}}',
        b'{"number": 0, "began": 1e300, "stage": "ended", "outcome": "bug"}',
    ],
)  # fmt: skip
def test_a_damaged_record_is_told_and_the_rest_is_reported(run: Path, command, content: bytes) -> None:
    (run / "trials" / "0000.json").write_bytes(content)
    assert command(reporting, "--run", run, "--ensemble", "greedy")[0] == 0
    assert "0000" in json.loads((run / "report.json").read_text())["missing"]["study"]


def test_weights_of_another_size_cost_no_memory(run: Path, tmp_path: Path, pictures: Path, command) -> None:
    """A configuration of a network of billions of parameters is refused by its weights' header."""
    for path in run.glob("candidates/*/candidate.json"):
        change(path, lambda info: info["config"].update(backbone="vit_giant_patch14_dinov2", image_size=518))
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, said = command(predicting, "--run", run, "--images", pictures, "--out", tmp_path / "p.csv")
    assert code == 2
    assert "do not fit" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB; the network has 4.5 GB
