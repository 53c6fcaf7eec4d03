"""A real run without Ray: a few tiny nets trained in this process, their records, and the ensemble."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
from upath import UPath

from ensemble.file import Ensemble, write_ensemble
from ensemble.select import Select, choose
from search import run as search_run
from search.config import SearchConfig
from search.plan import make_plan
from tests.errand import Hear
from trainables.config import TrialConfig
from trainables.job import DataSource, Job, Outcome
from trainables.run.records import Records, TrialRecord
from trainables.run_directory import list_candidates
from trainables.storage import write_array
from trainables.trial import run_trial


def train_run(path: Path, data_dir: Path, trials: int = 3, epochs: int = 4) -> tuple[UPath, Ensemble]:
    """A run directory as `search.run` leaves it, of `trials` candidates, a pruned trial and two that failed."""
    config = SearchConfig(data="folder", data_dir=data_dir, space="auto", backbones=("speednet",), run=str(path))
    plan = make_plan(config)
    search_run._open_run(plan, config)
    records, random = Records(plan.run), np.random.default_rng(0)
    source = DataSource(str(plan.data.path), "folder", str(data_dir))
    for _ in range(trials):
        record = _proposed(records, random, epochs)
        assert record.config is not None

        def report(metrics: dict, id: str = record.id) -> bool:
            if "tune_accuracy" in metrics:
                records.note(records[id].scored(metrics["epoch"], metrics["tune_accuracy"]))
            return False

        result = run_trial(Job(record.id, record.config, str(plan.run), source), Hear(report))
        value = result.metrics["tune_accuracy"]
        records.put(records[record.id].ends(result.outcome, value=value, ended=time.time()))
    error = "ValueError: <script>alert(1)</script>"
    records.put(_proposed(records, random, epochs).ends(Outcome.DIVERGED, error="loss is nan in epoch 1, step 3"))
    records.put(
        _proposed(records, random, epochs).ends(Outcome.BUG, error=error, traceback="Traceback ...\n  in <module>")
    )
    records.put(_proposed(records, random, epochs).scored(1, 0.4).ends(Outcome.PRUNED))
    records.put(replace(_proposed(records, random, epochs), config=None).ends(Outcome.NOT_STARTED))
    ensemble = choose(Select(run=(str(plan.run),), selector="greedy"))
    write_ensemble(plan.run, ensemble)
    return plan.run, ensemble


def _proposed(records: Records, random: np.random.Generator, epochs: int) -> TrialRecord:
    lr = float(10 ** random.uniform(-2.5, -1.5))
    config = TrialConfig(
        backbone="speednet", width=0.25, image_size=16, epochs=epochs, batch_size=8, weight_decay=0.0,
        lr=lr, seed=records.next_number, precision="fp32",
    )  # fmt: skip
    distribution = optuna.distributions.FloatDistribution(10**-2.5, 10**-1.5, log=True)
    return records.put(
        TrialRecord(
            records.next_number, {"lr": lr}, {"lr": optuna.distributions.distribution_to_json(distribution)},
            config=config, began=time.time(),
        )
    )  # fmt: skip


def doubt_first(run: UPath) -> None:
    """Let every candidate give the first image of the tune and select splits to another class than it did."""
    for candidate in list_candidates(run):
        for split in ("tune", "select"):
            probs = np.array(candidate.probs(split))
            probs[0] = np.roll(probs[0], 1)
            write_array(candidate.path / f"{split}_probs.npy", probs)


def change(path: Path, edit: Callable[[dict], object]) -> None:
    """Edit a JSON file in place."""
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
