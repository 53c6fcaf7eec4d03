"""Does the claim hold: simulated sweeps, of which the truth is known, in cells of few to many candidates and rows.

    python -m benchmarks.coverage [--candidates N ...] [--rows N ...] [--draws N] [--json FILE]

A draw is a sweep: candidates with predictions on select rows, from which `auto` chooses and claims. What the chosen
ensemble is truly worth is measured on 20 times as many fresh rows, 20,000 at least. Per cell the table says:

- coverage: how often the claim's 95 % interval holds the truth, with its own 99 % interval (Clopper and Pearson 1934);
  the same of the gain over the best single model, the one that the tune rows name;
- claim - truth: the mean difference in points of accuracy; fitted - truth: what the fitted score would have claimed;
- nats: how much lower the ensemble's true log-loss is than the best single model's; negative where it is higher.

Candidates are networks as linear-Gaussian models of an image: each sees the true class through noise, of which a large
part is the same for all (images are difficult for everybody), a part is shared by an architecture, and a part is its
own. They differ in skill and in calibration. With a search on the rows, half of the candidates are variations of the
ones that scored best on the tune rows so far, and each is the best of several epochs there; select rows are others.

Each draw is appended to FILE as a line of JSON; draws that it holds already are not made again. A draw takes about
three seconds: 1,000 a cell (200 above 1,000 candidates) take a day of one core, a hundred of one cell five minutes.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import beta

from ensemble.selection.auto import choose_selector
from ensemble.selection.blend import softmax
from ensemble.selection.claim import claim
from ensemble.selection.limits import Limits
from ensemble.selection.metrics import accuracy, log_loss
from trainables.errors import UserError, exit_on_user_error

CANDIDATES, ROWS = (5, 40, 300, 2000), (60, 200, 1000, 5000)
MANY, DRAWS, FEWER_DRAWS = 1000, 1000, 200
TRUTH_ROWS, TRUTH_SHARE = 20_000, 20
EPOCHS = 4  # that a search picks the best of
ARCHITECTURES = 4
SHARED, OF_ARCHITECTURE = 0.6, 0.15  # parts of the noise's variance
LEAST = 0.93  # coverage that no cell may be significantly below
WIDTH = 130


@dataclass(frozen=True)
class Coverage:
    """How often the claim's interval holds the truth, on simulated sweeps.

    Attributes:
        candidates, rows: the cells are all pairs of these.
        search: on: candidates are tuned on the tune rows; off: they are not; both: both.
        classes: of the simulated images.
        miscalibration: standard deviation of the logarithm of the candidates' temperatures.
        draws: a cell; default: 1,000, and 200 above 1,000 candidates.
        seed: of the first draw.
        json: file of the draws, one a line, that is continued.
    """

    candidates: tuple[int, ...] = CANDIDATES
    rows: tuple[int, ...] = ROWS
    search: str = "both"
    classes: int = 4
    miscalibration: float = 0.3
    draws: int | None = None
    seed: int = 0
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


@dataclass(frozen=True, order=True)
class Cell:
    candidates: int
    rows: int
    search: bool
    classes: int = 4
    miscalibration: float = 0.3


@dataclass(frozen=True)
class Network:
    """A simulated candidate.

    Attributes:
        skill: distance of the true class from the others, in standard deviations of the noise.
        temperature: by which its calibrated log-probabilities are divided.
        architecture: whose noise it shares.
        ancestry: (seed, share) of its own noise: a variation has most of its parent's.
    """

    skill: float
    temperature: float
    architecture: int
    ancestry: tuple[tuple[int, float], ...] = field(default=())


class Images:
    """Rows of one split: labels, and the noise that all candidates share, or all of an architecture."""

    def __init__(self, rows: int, classes: int, seed: tuple[int, ...]) -> None:
        self.seed, self.shape = seed, (rows, classes)
        rng = np.random.default_rng([*seed, 0])
        self.labels = rng.integers(0, classes, rows)
        common = rng.standard_normal(self.shape, np.float32) * np.float32(SHARED**0.5)
        kinds = rng.standard_normal((ARCHITECTURES, *self.shape), np.float32) * np.float32(OF_ARCHITECTURE**0.5)
        self.noise = common + kinds

    def predict(self, network: Network) -> np.ndarray:
        """Probabilities, float32 (N, C): the posterior of the class given what the network sees, at its temperature."""
        own = np.zeros(self.shape, np.float32)
        for seed, share in network.ancestry:
            own += np.float32(share) * np.random.default_rng([*self.seed, 1, seed]).standard_normal(
                self.shape, np.float32
            )
        seen = self.noise[network.architecture] + own * np.float32((1 - SHARED - OF_ARCHITECTURE) ** 0.5)
        seen[np.arange(len(seen)), self.labels] += np.float32(network.skill)
        return softmax(seen * np.float32(network.skill / network.temperature)).astype(np.float32)


def sweep(cell: Cell, tune: Images, rng: np.random.Generator) -> tuple[list[Network], list[float]]:
    """The networks of a sweep and the tune accuracy of each."""
    networks: list[Network] = []
    scores: list[float] = []
    seeds = iter(range(10**9))

    def propose() -> Network:
        skill = max(0.2, 2.0 - float(rng.exponential(0.3)))
        heat = float(np.exp(cell.miscalibration * rng.standard_normal()))
        return Network(skill, heat, int(rng.integers(ARCHITECTURES)), ((next(seeds), 1.0),))

    def vary(parent: Network, part: float) -> Network:
        """The same network with a part of its own noise anew, and a skill nearby."""
        kept = tuple((seed, share * (1 - part) ** 0.5) for seed, share in parent.ancestry)
        skill = max(0.2, parent.skill + 0.1 * part * float(rng.standard_normal()))
        return Network(skill, parent.temperature, parent.architecture, (*kept, (next(seeds), part**0.5)))

    for i in range(cell.candidates):
        if not cell.search:
            networks.append(propose())
            scores.append(accuracy(tune.predict(networks[-1]), tune.labels))
            continue
        if i < cell.candidates // 2 or i < 2:
            start = propose()
        else:
            best = np.argsort(-np.array(scores), kind="stable")[: max(1, i // 10)]
            young = [b for b in best.tolist() if len(networks[b].ancestry) < 6] or [0]
            start = vary(networks[young[int(rng.integers(len(young)))]], 0.5)
        epochs = [start, *(vary(start, 0.15) for _ in range(EPOCHS - 1))]
        tried = [accuracy(tune.predict(network), tune.labels) for network in epochs]
        networks.append(epochs[int(np.argmax(tried))])
        scores.append(max(tried))
    return networks, scores


def draw(cell: Cell, seed: int) -> dict[str, float]:
    """One sweep: what is claimed, and what is true."""
    rng = np.random.default_rng([seed, cell.candidates, cell.rows, cell.search])
    tune, select, test = (
        Images(rows, cell.classes, (seed, cell.candidates, cell.rows, part))
        for part, rows in enumerate((cell.rows, cell.rows, max(TRUTH_ROWS, TRUTH_SHARE * cell.rows)))
    )
    networks, tuned = sweep(cell, tune, rng)
    probs = [select.predict(network) for network in networks]
    best = int(np.argmax(tuned))
    began = time.perf_counter()
    choice = choose_selector(probs, select.labels, Limits(9), single=best)
    seconds = time.perf_counter() - began
    assert choice.held_out is not None
    found = claim(choice.held_out)
    members = np.flatnonzero(choice.blend.weights)
    together = choice.blend.only(members)([test.predict(networks[m]) for m in members.tolist()])
    alone = test.predict(networks[best])
    true, single = accuracy(together, test.labels), accuracy(alone, test.labels)
    low, high = found["interval"]
    gain_low, gain_high = found["gain"]["interval"]
    return {
        "claim": found["accuracy"], "low": low, "high": high, "truth": true, "fitted": choice.fitted["accuracy"],
        "log_loss_claim": found["log_loss"], "log_loss": log_loss(together, test.labels),
        "single_log_loss": log_loss(alone, test.labels), "gain": found["gain"]["accuracy"], "gain_low": gain_low,
        "gain_high": gain_high, "true_gain": true - single, "members": len(members), "seconds": seconds,
    }  # fmt: skip


def summarise(draws: list[dict[str, float]]) -> dict[str, float]:
    """One cell's row of the table."""
    column = {key: np.array([d[key] for d in draws]) for key in draws[0]}
    covered = int(((column["low"] <= column["truth"]) & (column["truth"] <= column["high"])).sum())
    low, high = clopper_pearson(covered, len(draws))
    gain_covered = (column["gain_low"] <= column["true_gain"]) & (column["true_gain"] <= column["gain_high"])
    gain = column["single_log_loss"] - column["log_loss"]
    return {
        "draws": len(draws), "coverage": covered / len(draws), "coverage_low": low, "coverage_high": high,
        "gain_coverage": float(gain_covered.mean()), "truth": float(column["truth"].mean()),
        "claim_minus_truth": float((column["claim"] - column["truth"]).mean()),
        "fitted_minus_truth": float((column["fitted"] - column["truth"]).mean()),
        "error": float(standard_error(column["claim"] - column["truth"])),
        "width": float((column["high"] - column["low"]).mean()),
        "nats": float(gain.mean()), "nats_error": float(standard_error(gain)),
        "true_gain": float(column["true_gain"].mean()), "members": float(column["members"].mean()),
        "seconds": float(column["seconds"].mean()),
    }  # fmt: skip


def clopper_pearson(right: int, n: int, level: float = 0.99) -> tuple[float, float]:
    """Exact interval of a fraction."""
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, right, n - right + 1)) if right else 0.0
    return low, float(beta.ppf(1 - tail, right + 1, n - right)) if right < n else 1.0


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def cells(args: Coverage) -> Iterator[Cell]:
    searches = {"off": (False,), "on": (True,), "both": (False, True)}[args.search]
    for rows in args.rows:
        for candidates in args.candidates:
            for search in searches:
                yield Cell(candidates, rows, search, args.classes, args.miscalibration)


def read_draws(path: Path | None) -> dict[tuple[Cell, int], dict[str, float]]:
    """What a file holds already; a last line that was cut off is left out."""
    found: dict[tuple[Cell, int], dict[str, float]] = {}
    for line in path.read_text().splitlines() if path is not None and path.exists() else []:
        try:
            values: dict[str, Any] = json.loads(line)
            found[Cell(**values["cell"]), values["seed"]] = values["draw"]
        except (ValueError, KeyError, TypeError):
            print(f"{path}: a line is not a draw and is left out", file=sys.stderr)
    return found


def show(rows: list[tuple[Cell, dict[str, float]]]) -> None:
    console = Console(highlight=False, width=max(WIDTH, Console().width))
    table = Table(title="coverage of the 95 % claim; * significantly below 93 %", title_justify="left", box=SIMPLE)
    for heading in (
        "models", "rows", "search", "draws", "coverage", "99 %", "gain's", "truth", "claim - truth", "fitted", "nats",
        "s",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, row in rows:
        table.add_row(
            f"{cell.candidates:,}", f"{cell.rows:,}", "on" if cell.search else "off", str(row["draws"]),
            f"{row['coverage']:.1%}{'*' if row['coverage_high'] < LEAST else ' '}",
            f"{row['coverage_low']:.1%} to {row['coverage_high']:.1%}", f"{row['gain_coverage']:.1%}",
            f"{row['truth']:.2%}", f"{100 * row['claim_minus_truth']:+.2f} +- {100 * row['error']:.2f}",
            f"{100 * row['fitted_minus_truth']:+.2f}", f"{row['nats']:+.4f}", f"{row['seconds']:.2f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Coverage, description=__doc__, prog="python -m benchmarks.coverage")
        if args.search not in ("on", "off", "both"):
            raise UserError(f"--search is {args.search!r}, expected on, off or both")
        if min(args.candidates) < 1 or min(args.rows) < 10 or args.classes < 2:
            raise UserError("--candidates is at least 1, --rows 10, --classes 2")
        made = read_draws(args.json)
        rows = []
        for cell in cells(args):
            count = args.draws or (FEWER_DRAWS if cell.candidates > MANY else DRAWS)
            draws = []
            for seed in range(args.seed, args.seed + count):
                if (cell, seed) not in made:
                    made[cell, seed] = draw(cell, seed)
                    if args.json is not None:
                        with args.json.open("a") as file:
                            line = {"cell": vars(cell), "seed": seed, "draw": made[cell, seed]}
                            file.write(json.dumps(line, allow_nan=False) + "\n")
                draws.append(made[cell, seed])
            rows.append((cell, summarise(draws)))
            print(f"{cell}: coverage {rows[-1][1]['coverage']:.1%} of {count}", file=sys.stderr, flush=True)
        show(rows)


if __name__ == "__main__":
    main()
