"""Short trials by the thousand on real lanes, of which one is lost every minute, or its machine, or a store.

Machines are Ray nodes on this one; some join, some leave as if their power had failed; the run lies in an object store
and the study in PostgreSQL, which go away for seconds. NINEFOLD_HOUR_MINUTES chooses how long (5).
"""

import contextlib
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
import yaml
from upath import UPath

from cluster.local import LocalCluster
from tests.search.study.test_mirror import PostgreSQL, server  # noqa: F401
from tests.tiny_space import write_space
from tests.trainables.test_s3 import ROOT, Store, store  # noqa: F401
from trainables.job import Outcome
from trainables.run.records import Stage, read_records
from trainables.run_directory import list_candidates, open_run, study_name
from trainables.storage import list_folder

MINUTES = float(os.environ.get("NINEFOLD_HOUR_MINUTES", "5"))
SEED = int(os.environ.get("NINEFOLD_FAULT_SEED", "0"))
EPOCHS, BETWEEN_S, LONGEST_AWAY = 9, 60.0, 8.0
NODES = (1, 3)  # fewest and most of those that train
RUN = "s3://bucket/hour"
MIB = 2**20


class Storm:
    """Somebody who takes something away every minute; `struck` says what, `used` what the driver's memory was then."""

    def __init__(self, cluster: LocalCluster, server: PostgreSQL, store: Store) -> None:
        self.cluster, self.server, self.store = cluster, server, store
        self.choice = random.Random(SEED)
        self.nodes = [cluster.add_node(cpus=1) for _ in range(2)]
        self.struck: list[str] = []
        self.used: list[tuple[int, float]] = []

    def strike(self) -> None:
        choice, kinds = self.choice, ["lane", "lane", "store", "database"]
        kinds += ["leave"] * (len(self.nodes) > NODES[0]) + ["join", "join"] * (len(self.nodes) < NODES[1])
        kind = choice.choice(kinds)
        if kind == "lane":
            workers = [process for process in self.processes() if "RayTrainWorker" in process.name()]
            if not workers:
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                choice.choice(workers).kill()
        elif kind == "leave":
            self.nodes.pop(choice.randrange(len(self.nodes))).kill()
        elif kind == "join":
            self.nodes.append(self.cluster.add_node(cpus=1))
        elif kind == "store":
            self.store.away(choice.uniform(1, LONGEST_AWAY)).join()
        else:
            self.server.away(choice.uniform(1, LONGEST_AWAY)).join()
        self.struck.append(kind)

    def processes(self) -> list[psutil.Process]:
        """Of the nodes that train."""
        found: list[psutil.Process] = []
        for node in self.nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += node.process.children(recursive=True)
        return sorted(found, key=lambda process: process.pid)

    def driver(self) -> psutil.Process | None:
        """The command, on the head; None where there is none."""
        for process in self.cluster.nodes[0].process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[1:3] == ["-m", "search.run"]:
                    return process
        return None

    def look(self) -> None:
        """Note the driver's memory, MiB, by the number of trials that it has begun."""
        begun = [int(path.stem) + 1 for path in list_folder(UPath(RUN) / "trials") if path.stem.isdigit()]
        with contextlib.suppress(psutil.NoSuchProcess):
            if begun and (driver := self.driver()) is not None:
                self.used.append((max(begun), driver.memory_info().rss / MIB))


def test_lanes_machines_and_stores_are_lost_every_minute_and_every_trial_is_accounted_for(
    server: PostgreSQL, store: Store, tmp_path: Path
) -> None:
    space = write_space(tmp_path / "space.py", trials=100_000, epochs=EPOCHS, batch_size=64)
    environment = yaml.safe_load((ROOT / "cluster/launch/runtime_env.yaml").read_text())
    environment.pop("pip")
    with LocalCluster() as cluster:
        storm = Storm(cluster, server, store)
        cluster.ray(
            "job", "submit", "--no-wait", "--submission-id", "hour", "--working-dir", str(ROOT),
            "--runtime-env-json", json.dumps(environment), "--",
            "python", "-m", "search.run", "--data", "digits", "--space", str(space), "--run", RUN,
            "--storage", server.url, "--minutes", str(MINUTES),
        )  # fmt: skip
        end = time.monotonic() + 60 * (2 * MINUTES + 10)
        strike_at = time.monotonic() + BETWEEN_S
        while storm.driver() is not None or not storm.used:
            assert time.monotonic() < end, cluster.ray("job", "logs", "hour").stdout[-4000:]
            time.sleep(1)
            if time.monotonic() > strike_at:
                strike_at += BETWEEN_S * storm.choice.uniform(0.5, 1.5)
                storm.strike()
                storm.look()
                print(f"{storm.struck[-1:]} {storm.used[-1:]} {len(storm.nodes)} nodes", flush=True)
        time.sleep(10)
        logs = cluster.ray("job", "logs", "hour").stdout
        assert "succeeded" in cluster.ray("job", "status", "hour").stdout, logs[-4000:]
    print(logs[-3000:])
    assert len(storm.struck) > 0.9 * MINUTES - 1

    records = read_records(UPath(RUN))
    assert [record.number for record in records] == list(range(len(records)))
    stages = [record.stage for record in records]
    assert Stage.RUNNING not in stages
    outcomes = {record.outcome for record in records if record.stage is Stage.ENDED}
    assert not outcomes & {Outcome.BUG, Outcome.STORAGE_LOST}, [record for record in records if record.error][:3]
    finished = {
        record.id: record for record in records if record.outcome is not None and record.outcome.leaves_candidate
    }
    candidates = list_candidates(open_run(RUN))
    print(Counter(str(record.outcome or record.stage) for record in records), len(candidates), "candidates")
    assert len(candidates) > 2 * MINUTES
    there_is = {candidate.id for candidate in candidates}
    assert there_is == set(finished), [record for record in records if record.id in there_is ^ set(finished)]
    for candidate in candidates:
        assert finished[candidate.id].value == pytest.approx(candidate.info.metrics["tune_accuracy"])
        epochs = [row["epoch"] for row in candidate.info.curve]
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) == candidate.info.config.epochs or finished[candidate.id].outcome is Outcome.TIME
    study = optuna.load_study(study_name=study_name(UPath(RUN)), storage=server.url)
    there = {trial.user_attrs["id"]: trial.value for trial in study.get_trials(deepcopy=False)}
    assert there == {record.id: record.value for record in records if record.stage is Stage.ENDED and record.counts}

    last = storm.used[-1][0]  # by then trials have ended, and the ensemble is being selected
    begun, used = zip(*[point for point in storm.used if point[0] < last], strict=True)
    early = next(i for i, number in enumerate(begun) if number > begun[-1] / 4)
    growth = 1024 * (used[-1] - used[early]) / max(1, begun[-1] - begun[early])
    print(f"{len(records)} trials, {len(candidates)} candidates, {Counter(storm.struck)}, {growth:.0f} KiB a trial")
    # a record, its trial for Optuna, and what Tune keeps: 10 KiB, and twice that where a trial is lost or promoted
    assert growth < 50 or used[-1] - used[early] < 30, f"{growth:.0f} KiB a trial"
