"""A real run directory, damaged at random in one file, opened by every command that reads one.

What must hold whatever a file says: an answer or one line of error, no traceback; nothing written or deleted outside
the run (and the command's own output); no connection, no process, no pickle; bounded memory and time. Python's audit
events show the first three: unlike a mock they see what any library does.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from upath import UPath

from ensemble import compare as comparing
from ensemble.file import read_ensemble
from ensemble.pool import load_pool
from ensemble.predict import Predict, Voters, predict_folder
from ensemble.report.write import write_report
from ensemble.running import EnsembleSoFar
from ensemble.select import Select, choose_from, open_pool
from ensemble.serve.drift import Drift, Reference
from ensemble.serve.page import Examples
from ensemble.show import show
from ensemble.soup import kitchens
from search import refit as refitting
from search.config import SearchConfig
from search.plan import make_plan
from search.run import _open_run
from search.study.warm_start import read_earlier
from tests.small_run import train_run
from trainables.data.dataset import default_cache
from trainables.data.prepare import prepare
from trainables.data.share import open_prepared
from trainables.errors import UserError
from trainables.explore.__main__ import Explore, explore
from trainables.run_directory import list_candidates, open_run
from trainables.training.checkpoint import copied, read_checkpoint, write_checkpoint

LONGEST_S = 120
MOST_MEMORY = 2 * 2**20  # KiB that a case may add to the largest so far; the networks here have a megabyte
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """What the code under test does to the world outside, by Python's audit events."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.harm: list[str] = []
        self.on = False
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str | bytes) and (set(str(mode or "")) & set("wax+") or (flags or 0) & WRITING):
                self.check(event, path)
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "os.chmod"):
            path, folder = arguments[0], arguments[-1]
            if event in ("os.remove", "os.rmdir") and isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
            self.check(event, path)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.check(event, arguments[0])
            self.check(event, arguments[1])
        elif event.startswith(("socket.connect", "socket.getaddrinfo", "subprocess", "os.system", "os.exec", "pickle")):
            self.harm.append(f"{event} {arguments!r}")

    def check(self, event: str, path: object) -> None:
        if isinstance(path, int):
            return
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        place = os.path.realpath(text)
        if not place.startswith(self.allowed) and "/__pycache__/" not in place and place != "/dev/null":
            self.harm.append(f"{event} {place}")


WATCH = Watch()


@contextmanager
def watched(*folders: Path) -> Iterator[None]:
    """Fail when anything outside these folders is written to or deleted, or anybody is called, or it takes too long."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST_S} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WATCH.allowed, WATCH.harm, WATCH.on = tuple(os.path.realpath(folder) for folder in folders), [], True
    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        WATCH.on = False
    assert not WATCH.harm, WATCH.harm
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


# --- the run, and its readers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def origin(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that one can have: candidates, study, ensemble, checkpoint, its data beside it, a refit."""
    folder = tmp_path_factory.mktemp("fuzz")
    run, _ = train_run(folder / "run", pictures, epochs=2)
    data = prepare("folder", pictures)
    shutil.copytree(data.path, Path(str(run)) / "data" / data.path.name)
    import torch

    write_checkpoint(
        run / "checkpoints" / "0009" / "state.safetensors", copied({"a": torch.zeros(3), "b": [1, {"c": None}]})
    )
    write_report([run], read_ensemble(run))
    return Path(str(run))


def commands(run: UPath, pictures: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Everything that opens a run directory, as the commands do it."""
    import torch

    def select() -> None:
        args = Select(run=(str(run),))
        pool = open_pool(args)
        show(pool, choose_from(pool, args))

    def predict() -> None:
        predict_folder(Predict(pictures / "test" / "grid", out / "p.csv", (str(run),), probs=True, device="cpu"))

    def compare() -> None:
        told = comparing.compare(comparing.Compare(run=(str(run), str(run)), out=out / "compare.html"))
        comparing.show(told)

    def resume() -> None:
        config = SearchConfig(
            data="folder", data_dir=pictures, space="auto", backbones=("speednet",), run=str(open_run(str(run)))
        )
        _open_run(make_plan(config), config)
        EnsembleSoFar(run, 9)

    def warm_start() -> None:
        def suggest(trial):
            trial.suggest_float("lr", 1e-4, 1.0, log=True)
            raise UserError("that is all")

        read_earlier(str(run), "tune_accuracy", suggest)

    def refit() -> None:
        runs, args = [open_run(str(run))], refitting.Refit(run=(str(run),))
        info = refitting.read_run(runs[0])
        refitting.lane_config(info)
        for member in refitting._to_train(read_ensemble(runs[0])):
            refitting._job(runs, UPath(out / "refit"), info, member, args)

    def lane() -> None:
        for folder in open_run(str(run)).glob("data/*"):
            open_prepared(run, Path("/nowhere") / folder.name)
        read_checkpoint(run / "checkpoints" / "0009" / "state.safetensors", torch.device("cpu"))

    def serve() -> None:
        voters = Voters.load([open_run(str(run))], read_ensemble(run), "cpu")
        voters(np.zeros((1, *voters.canvas.shape), np.uint8))
        Drift(voters.classes, Reference.of([run], voters.ensemble)).report()
        if (examples := Examples.of(run)) is not None:
            examples.png(0), examples.label(0)

    return {
        "select": select,
        "report": lambda: write_report([open_run(str(run))], read_ensemble(run)),
        "predict": predict,
        "compare": compare,
        "serve": serve,
        "refit": refit,
        "resume": resume,
        "warm start": warm_start,
        "lane": lane,
        "explore": lambda: explore(Explore(run=str(run), out=out / "explore.html")),
        "soup": lambda: (load_pool([open_run(str(run))]), kitchens(list_candidates(run))),
    }


# --- damage ----------------------------------------------------------------------------------------------------------

ODD = (
    None, True, False, 0, -1, 1, 2**31, -(2**63), 2**80, 0.5, -0.0, 1e308, "", "x", "../..", "/etc/passwd", "a/b",
    "http://127.0.0.1:9/x", "s3://bucket/x", "hf-hub:evil/model", "\x1b[2J", "\ud800", "é" * 300, [], [[]], [1], {},
    {"id": "../x"}, {"": None},
)  # fmt: skip

HEADERS = [
    (b"f4", b"f8"), (b"f4", b"O "), (b"i8", b"U8"), (b"(", b"(9999999,"), (b",)", b",1)"), (b"False", b"True "),
    (b"descr", b"dexcr"), (b"|u1", b"<f2"),
]  # fmt: skip


def damage(path: Path, random: random.Random) -> str:
    """Change a file in one of the ways in which files go wrong, or are made to; returns which."""
    content = path.read_bytes()
    kinds = ["flip", "cut", "empty", "zeros", "insert", "repeat", "noise"]
    if path.suffix == ".json":
        kinds += ["json"] * 14 + ["deep", "list"]
    if path.suffix == ".npy":
        kinds += ["header"] * 4 + ["array"] * 4
    kind = random.choice(kinds)
    place = random.randrange(len(content) + 1)
    if kind == "flip" and content:
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 4, 64))):
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        content = bytes(changed)
    elif kind == "cut":
        content = content[:place]
    elif kind == "empty":
        content = b""
    elif kind == "zeros":
        content = content[:place] + bytes(len(content) - place)
    elif kind == "insert":
        content = content[:place] + random.randbytes(random.choice((1, 8, 1000))) + content[place:]
    elif kind == "repeat":
        content = content * 2
    elif kind == "noise":
        content = random.randbytes(min(len(content), 4096))
    elif kind == "deep":
        content = random.choice((b"[", b'{"a":')) * 200_000
    elif kind == "list":
        content = b"[" + content + b"]"
    elif kind == "json":
        values = json.loads(content)
        mutate(values, random)
        content = json.dumps(values).encode()
    elif kind == "header":
        end = content.index(b"\n") + 1
        header = content[10:end]
        for old, new in random.sample(HEADERS, 2):
            header = header.replace(old, new, 1)
        content = content[:8] + len(header).to_bytes(2, "little") + header + content[end:]
    elif kind == "array":
        array = np.load(path)
        with open(path, "wb") as file:
            odd = [
                array[: len(array) // 2], array.astype(np.float64), -array.astype(np.float32), array[None],
                array.ravel(), np.full_like(array, 7), np.where(array == array.ravel()[0], np.nan, array),
            ]  # fmt: skip
            np.save(file, random.choice(odd))
        return f"{kind} of {path.name}"
    path.write_bytes(content)
    return f"{kind} of {path.name}"


def mutate(values: object, random: random.Random) -> None:
    """Replace, remove or add one value somewhere in nested JSON, in place."""
    places = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            places.extend((value, key) for key in value)
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            places.extend((value, i) for i in range(len(value)))
            for item in value:
                walk(item)

    walk(values)
    shallow = [(holder, key) for holder, key in places if holder is values]
    holder, key = random.choice(shallow if random.random() < 0.3 else places)
    if random.random() < 0.15:
        del holder[key]
    else:
        holder[key] = random.choice(ODD)


# --- the tests -------------------------------------------------------------------------------------------------------


def check(seed: int, origin: Path, pictures: Path, folder: Path) -> None:
    """Damage one file of a copy as `seed` says, and let some of the commands open it."""
    chance = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    run, out = folder / "run", folder / "out"
    shutil.copytree(origin, run)
    out.mkdir()
    candidates = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".html")
    by_kind: dict[str, list[Path]] = {}
    for path in candidates:
        by_kind.setdefault(path.name if "data" not in path.parts else f"data {path.name}", []).append(path)
    told = damage(chance.choice(by_kind[chance.choice(sorted(by_kind))]), chance)
    own = folder / "cache" if chance.random() < 0.5 else None  # nothing prepared: what lies beside the run is opened
    chosen = commands(UPath(run), pictures, out)
    with pytest.MonkeyPatch.context() as patch:
        (folder / "tmp").mkdir()
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        if own is not None:
            patch.setenv("NINEFOLD_CACHE", str(own))
        for name in chance.sample(sorted(chosen), 4):
            with watched(folder, default_cache()):
                try:
                    chosen[name]()
                except Exception as error:
                    if not isinstance(error, UserError) or len(str(error).splitlines()) != 1:
                        raise AssertionError(f"seed {seed}: {told}, {name}: {type(error).__name__}: {error}") from error


@given(seed=st.integers(0, 2**40))
@hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_a_damaged_run_is_opened_safely(seed: int, origin: Path, pictures: Path, tmp_path: Path) -> None:
    check(seed, origin, pictures, tmp_path / "case")


def test_the_watch_sees_what_it_is_to_see(tmp_path: Path) -> None:
    import pickle
    import socket

    def harm(action: Callable[[], object]) -> None:
        with pytest.raises(AssertionError), watched(tmp_path / "inside"):
            action()

    (tmp_path / "inside").mkdir()
    harm(lambda: (tmp_path / "outside").write_text("x"))
    harm(lambda: (tmp_path / "outside").unlink())
    harm(lambda: pickle.loads(pickle.dumps(Path)))
    harm(lambda: socket.socket().connect_ex(("127.0.0.1", 9)))
    with watched(tmp_path / "inside"):
        (tmp_path / "inside" / "x").write_text("x")
