"""Is the sweep worth it? Its ensemble against the best configuration trained with as many seeds, model for model.

    python -m benchmarks.equal_compute --run runs/folder-auto [--draws 20] [--json FILE]

Takes a finished sweep of K candidates, trains its best configuration (by tune log-loss) with K new seeds in the run
directory RUN-seeds, and compares, at K trained models each: the best single model, the average of all seeds, the best
ensemble of at most --top-k members of the seeds, and of the sweep. Ensembles are chosen on one half of the select split
and scored on the other; the halves are redrawn, and the table gives means over draws. Differences are paired by draw.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from ensemble.pool import load_pool
from ensemble.selection.auto import auto
from ensemble.selection.blend import Blend
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from ensemble.selection.selectors import best_single, greedy
from ensemble.show import make_console
from search.config import SearchConfig
from search.run import run_sweep
from trainables.errors import UserError, exit_on_user_error
from trainables.run_directory import list_candidates, open_run, read_run

SPACE = '''"""The best configuration of a sweep, again and again with other seeds."""
from trainables.config import TrialConfig

TRIALS = {trials}
BACKBONES = {{{backbone!r}: {start!r}}}


def suggest(trial, task):
    trial.suggest_int("seed", 0, 1)  # a study wants a parameter
    return TrialConfig.from_dict({{**{config!r}, "seed": 10_000 + trial.number}})
'''


@dataclass(frozen=True)
class EqualCompute:
    """The ensemble of a sweep against its best configuration with as many seeds."""

    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """The finished sweep; default: the newest under runs/."""
    top_k: int = 9
    """Most members of an ensemble."""
    draws: int = 20
    """How often the halves of the select split are drawn."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the same figures."""


def train_seeds(run: Any, trials: int) -> Any:
    """The run directory with `trials` candidates of the best configuration of `run`, trained now where missing."""
    info = read_run(run)
    best = min(list_candidates(run), key=lambda c: float(c.info.metrics["tune_log_loss"]))
    config = best.info.config
    assert config is not None
    asked = info.search
    target = run.parent / f"{run.name}-seeds"
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder) / "seeds.py"
        start = "pretrained" if config.pretrained else "scratch"
        space.write_text(SPACE.format(trials=trials, backbone=config.backbone, start=start, config=config.to_dict()))
        data_dir = asked.get("data_dir")
        run_sweep(
            SearchConfig(
                data=asked["data"], data_dir=Path(data_dir) if data_dir else None, stored_size=asked["stored_size"],
                space=str(space), run=str(target), sampler="random", pruner="none", split_seed=asked["split_seed"],
            )
        )  # fmt: skip
    return target


def compare(run: Any, seeds: Any, top_k: int, draws: int) -> list[dict[str, Any]]:
    """A row per way to spend the same number of trained models: mean accuracy and log-loss, and the gain over the best
    single model in points with its 95 % interval over draws."""
    swept, seeded = load_pool([run]), load_pool([seeds])
    labels, limits = swept.labels, Limits(k=top_k)
    ways = {
        "best single model of the sweep": (swept.probs, lambda p, y: best_single(p, y, limits, "accuracy")),
        "best configuration, one seed": (seeded.probs, lambda p, y: np.eye(len(p))[0]),
        "best configuration, all seeds averaged": (seeded.probs, lambda p, y: np.full(len(p), 1 / len(p))),
        f"best configuration, seeds chosen by auto (at most {top_k})": (seeded.probs, lambda p, y: auto(p, y, limits)),
        f"sweep, greedy on log-loss (at most {top_k})": (swept.probs, lambda p, y: greedy(p, y, limits)),
        f"sweep, auto (at most {top_k})": (swept.probs, lambda p, y: auto(p, y, limits)),
    }
    scores: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(labels))
        fit, held = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
        for way, (probs, choose) in ways.items():
            found = choose([np.asarray(p[fit]) for p in probs], labels[fit])
            blend = found if isinstance(found, Blend) else Blend(found)
            average = blend([np.asarray(p[held]) for p in probs])
            scores[way].append((accuracy(average, labels[held]), log_loss(average, labels[held])))
    first = np.array(scores[next(iter(ways))])
    rows = []
    for way, values in scores.items():
        mean, gain = np.mean(values, axis=0), 100 * (np.array(values)[:, 0] - first[:, 0])
        rows.append(
            {
                "way": way, "models": len(ways[way][0]), "accuracy": float(mean[0]), "log_loss": float(mean[1]),
                "gain": float(gain.mean()), "interval": np.percentile(gain, [2.5, 97.5]).tolist(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(EqualCompute, description=__doc__, prog="python -m benchmarks.equal_compute")
        run = open_run(args.run).absolute()
        trials = len(list_candidates(run))
        if trials < 2:
            raise UserError(f"{run} has {trials} candidates, expected at least 2; sweep longer first")
        rows = compare(run, train_seeds(run, trials), args.top_k, args.draws)
        images = len(load_pool([run]).labels) // 2
        table = Table(
            title=f"{trials} trained models each; chosen and scored on {images} select images, {args.draws} draws"
        )
        table.add_column("how the models are spent")
        for heading in ("models", "accuracy", "log-loss", "gain in points", "95 % of draws"):
            table.add_column(heading, justify="right")
        for row in rows:
            low, high = row["interval"]
            table.add_row(
                row["way"], str(row["models"]), f"{row['accuracy']:.2%}", f"{row['log_loss']:.4f}",
                f"{row['gain']:+.2f}", f"{low:+.2f} to {high:+.2f}",
            )  # fmt: skip
        make_console().print(table)
        if args.json:
            args.json.write_text(json.dumps({"run": run.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
