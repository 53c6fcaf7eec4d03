"""Somebody else's run directory, made to do harm: every command that opens one runs nothing of it, writes and deletes
nothing outside it, and dials nobody. docs/security.md lists what is promised."""

import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from ensemble import predict as predicting
from ensemble import select as selecting
from ensemble.report import __main__ as reporting
from search import refit as refitting
from search import run as searching
from search.config import SearchConfig
from search.plan import make_plan
from tests.small_run import change
from trainables.data.dataset import default_cache
from trainables.data.prepare import prepare
from trainables.errors import UserError
from trainables.explore import __main__ as exploring


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# 1, 2: prepared data


def test_a_run_cannot_have_the_prepared_data_sets_deleted(run: Path, pictures: Path, command) -> None:
    """Before: `data.path: "/x/.."` made <cache>/data itself the folder that a copy replaces."""
    data = prepare("folder", pictures)
    for name in ("images.npy", "labels.npy", "test_images.npy", "test_labels.npy", "meta.json"):
        shutil.copy(data.path / name, run / name)
    (run / "data").mkdir()
    change(run / "run.json", lambda info: info["data"].update(path="/x/..", folder="..", fingerprint=""))
    code, said = command(reporting, "--run", run, "--ensemble", "greedy")
    assert code == 2
    assert "data.folder" in said
    assert (data.path / "meta.json").exists()


def test_images_beside_a_run_never_become_the_shared_cache(run: Path, tmp_path: Path, command, monkeypatch) -> None:
    """Before: they were copied there unhashed, and the next sweep of the same name trained on planted images."""
    name = json.loads((run / "run.json").read_text())["data"]["folder"]
    own = default_cache() / "data" / name
    planted = Path(shutil.copytree(own, run / "data" / name))
    images = np.load(planted / "images.npy")
    np.save(planted / "images.npy", 255 - images)
    fresh = tmp_path / "cache"
    monkeypatch.setenv("NINEFOLD_CACHE", str(fresh))
    code, _ = command(reporting, "--run", run, "--ensemble", "greedy")
    assert code == 0
    assert not list(fresh.glob("data/*"))


def test_features_of_images_beside_a_run_are_kept_apart(run: Path, tmp_path: Path, monkeypatch) -> None:
    from trainables.data.share import open_prepared, open_run_data

    name = json.loads((run / "run.json").read_text())["data"]["folder"]
    shutil.copytree(default_cache() / "data" / name, run / "data" / name)
    fresh = tmp_path / "cache"
    monkeypatch.setenv("NINEFOLD_CACHE", str(fresh))
    for data in (open_run_data(UPath(run))[0], open_prepared(UPath(run), tmp_path / "nowhere" / name)):
        assert data.cache.parent == fresh / "runs"
        assert not list(fresh.glob("data/*"))


# 3: code


def test_a_space_that_a_run_names_is_not_imported(run: Path, pictures: Path, tmp_path: Path, command) -> None:
    """Before: --run with the automatic space imported the .py file of its run.json."""
    evil, proof = tmp_path / "evil.py", tmp_path / "proof"
    evil.write_text(f"open({str(proof)!r}, 'w')\nTRIALS = 1\nBACKBONES = {{}}\ndef suggest(trial, task): ...\n")
    for space in ("evil", "auto"):
        change(
            run / "run.json",
            lambda info, space=space: info.update(space=space) or info["search"].update(space=str(evil)),
        )
        code, said = command(searching, "--data", "folder", "--data-dir", pictures, "--run", run)
        assert code == 2
        assert "--space" in said
    assert not proof.exists()


# 4: links


def test_links_are_not_followed_when_checkpoints_are_deleted(
    run: Path, pictures: Path, tmp_path: Path, command
) -> None:
    """Before: every folder in the target of a linked `checkpoints` was deleted."""
    precious = tmp_path / "precious"
    (precious / "thesis").mkdir(parents=True)
    (precious / "0000").mkdir()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").symlink_to(precious)
    arguments = ["--data", "folder", "--data-dir", pictures, "--space", "auto", "--backbones", "speednet"]
    code, said = command(searching, *arguments, "--run", run, "--trials", "1")
    assert code == 2
    assert "symbolic link" in said
    assert sorted(path.name for path in precious.iterdir()) == ["0000", "thesis"]


def test_only_checkpoints_of_the_sweeps_own_trials_are_deleted(tmp_path: Path) -> None:
    from tests.hand_sweep import finish, sweep, take

    s = sweep(tmp_path, trials=2)
    finish(s, take(s))
    for name in ("0000", "notes"):
        (Path(str(s.run)) / "checkpoints" / name).mkdir(parents=True)
    s.remove_stale_checkpoints()
    assert [path.name for path in (Path(str(s.run)) / "checkpoints").iterdir()] == ["notes"]


@pytest.mark.parametrize("name", ["candidates", "ensembles", ".lock", "study.db"])
def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path, command, name: str) -> None:
    target = tmp_path / "elsewhere"
    if (run / name).is_dir():
        shutil.move(run / name, target)
    else:
        target.write_bytes(b"precious")
        (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    before = files(target) if target.is_dir() else target.read_bytes()
    code, said = command(selecting, "--run", run, "--selector", "uniform")
    assert code == 2
    assert "symbolic link" in said
    assert (files(target) if target.is_dir() else target.read_bytes()) == before


def test_a_candidate_that_is_a_link_is_left_out(run: Path, tmp_path: Path, command) -> None:
    shutil.move(run / "candidates" / "0001", tmp_path / "0001")
    (run / "candidates" / "0001").symlink_to(tmp_path / "0001")
    code, said = command(selecting, "--run", run)
    assert code == 0
    assert "left out 0001" in " ".join(said.split())


# 5: pickles


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


def test_the_studys_attributes_are_never_unpickled(run: Path, pictures: Path, tmp_path: Path, command) -> None:
    """Before: --sampler cmaes unpickled what it found under its key in the study."""
    code, said = command(searching, "--run", run, "--trials", "4", "--sampler", "cmaes")
    assert code == 2, said


def test_a_checkpoint_is_not_unpickled(run: Path, tmp_path: Path, data, splits) -> None:
    from trainables.config import TrialConfig
    from trainables.storage import Damaged
    from trainables.train import train

    checkpoint = UPath(tmp_path / "state.safetensors")
    checkpoint.write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    config = TrialConfig(backbone="speednet", width=0.125, image_size=16, epochs=1, batch_size=12)
    with pytest.raises(Damaged):
        train(config, data, splits, checkpoint=checkpoint)
    assert not (tmp_path / "proof").exists()


# 6: addresses


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A web server, its address, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_addresses_in_files_are_not_dialled(run: Path, pictures: Path, tmp_path: Path, command, listener) -> None:
    """Before: a member's run and a refit's origin became live HTTP paths."""
    address, asked = listener
    change(run / "ensembles" / "greedy.json", lambda e: e["members"][0].update(run=f"{address}/run"))
    for module, extra in (
        (reporting, []),
        (predicting, ["--images", pictures, "--out", tmp_path / "p.csv"]),
        (refitting, []),
    ):
        code, said = command(module, "--run", run, *extra)
        assert code == 2
        assert address in said, "it says what would have to be named"
    refit = Path(shutil.copytree(run, run.parent / "other-refit"))
    origin = {"run": f"{address}/run", "ensemble": "greedy", "created": 0.0}
    change(refit / "run.json", lambda info: info.update(refit_of=origin))
    assert command(refitting, "--run", refit)[0] == 2
    change(run / "run.json", lambda info: info["data"].update(path=f"{address}/digits-0123456789abcdef"))
    change(run / "run.json", lambda info: info["search"].update(data_dir=f"{address}/x", weights_dir=f"{address}/y"))
    command(exploring, "--run", run, "--out", tmp_path / "explore.html")
    assert asked == []


def test_the_database_of_another_run_is_not_connected_to(run: Path, pictures: Path) -> None:
    """Before: --warm-start connected to the URL in its run.json, with the user's own password."""
    import socket

    shutil.rmtree(run / "trials")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"mysql+pymysql://me@127.0.0.1:{server.getsockname()[1]}/db"
        change(run / "run.json", lambda info: info["search"].update(storage=address))
        config = SearchConfig(
            data="folder", data_dir=pictures, space="auto", backbones=("speednet",), warm_start=(str(run),)
        )
        with pytest.raises(UserError, match="none of its candidates has a record"):
            make_plan(config)
        with pytest.raises(TimeoutError):
            server.accept()


# 7: names


def test_an_ensembles_name_is_its_files(run: Path, tmp_path: Path, command) -> None:
    """Before: the name in the JSON was used as a path, and a refit wrote to /elsewhere/settings.json."""
    from ensemble.file import read_ensemble

    change(run / "ensembles" / "greedy.json", lambda e: e.update(name=str(tmp_path / "elsewhere" / "settings")))
    assert read_ensemble(UPath(run), "greedy").name == "greedy"
    code, said = command(selecting, "--run", run, "--name", "../../settings")
    assert code == 2
    assert "name" in said
    assert not list(tmp_path.rglob("settings*"))


@pytest.mark.parametrize("id", ["../../../etc", "/etc/passwd", "..", "a/b", "", ".hidden", "a\nb"])
def test_ids_that_lead_elsewhere_are_refused(run: Path, command, id: str) -> None:
    change(run / "ensembles" / "greedy.json", lambda e: e["members"][0].update(id=id))
    code, said = command(reporting, "--run", run)
    assert code == 2
    assert len(said.strip().splitlines()) == 1
    assert "member" in said


def test_a_backbone_that_a_hub_would_be_asked_for_is_refused(
    run: Path, tmp_path: Path, pictures: Path, command
) -> None:
    for path in run.glob("candidates/*/candidate.json"):
        change(path, lambda info: info["config"].update(backbone="resnet18.hf-hub:evil/model"))
    code, said = command(predicting, "--run", run, "--images", pictures, "--out", tmp_path / "p.csv")
    assert code == 2
    assert "backbone" in said


# 8: secrets


def test_a_password_in_the_storage_reaches_no_file_and_no_error(pictures: Path, tmp_path: Path, command) -> None:
    secret = "tr0ub4dor"
    for url in (
        f"postgresql://me:{secret}@127.0.0.1:1/db",
        f"postgresql://127.0.0.1:1/db?user=me&password={secret}",
        f"nonsense://me:{secret}@host/db",
    ):
        code, said = command(
            searching, "--data", "folder", "--data-dir", pictures, "--space", "auto", "--backbones", "speednet",
            "--run", tmp_path / "run", "--storage", url,
        )  # fmt: skip
        assert code == 2
        assert secret not in said
    config = SearchConfig(
        data="folder", data_dir=pictures, space="auto", backbones=("speednet",), run=str(tmp_path / "kept"),
        storage=f"postgresql://me:{secret}@host/db",
    )  # fmt: skip
    searching._open_run(make_plan(config), config)
    assert not any(secret.encode() in content for content in files(tmp_path).values())
