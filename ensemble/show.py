"""An ensemble on the terminal: its members, its scores beside the best single candidate's, what latency buys."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble.file import Ensemble
from ensemble.pool import Pool
from ensemble.selection.metrics import accuracy, log_loss

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_CLASSES = 3
SCORES = ("accuracy", "95 % interval", "log-loss", "Brier", "ECE")  # columns
PLAIN_WIDTH = 130


def make_console() -> "Console":
    """Where tables are printed. A file has no width, and tables folded to 80 columns are no tables."""
    from rich.console import Console  # not while importing: many need this module without printing

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def show(pool: Pool, ensemble: Ensemble) -> None:
    """Print everything that a person would want to know about an ensemble of this pool."""
    console = make_console()
    console.print(_members(pool, ensemble))
    if ensemble.claim is not None:
        console.print(claim_in_words(ensemble.claim), style="bold")
    console.print(_scores(ensemble))
    console.print(gain_in_words(ensemble.scores["gain"]))
    if ensemble.risk is not None and "risk" in ensemble.scores:
        console.print(risk_in_words(ensemble.risk.level, ensemble.scores["risk"]))
    if "auto" in ensemble.insight:
        console.print(auto_in_words(ensemble.insight["auto"]))
    for line in _classes(ensemble.insight.get("classes", [])):
        console.print(line, markup=False)
    if len(ensemble.frontier) > 1:
        console.print(_frontier(ensemble, pool.device))
    left_out: dict[str, list[str]] = {}  # by the reason, for --keep-weights leaves out many
    for id, reason in ensemble.left_out.items():
        left_out.setdefault(reason, []).append(id)
    for reason, ids in left_out.items():
        console.print(f"left out {', '.join(ids)}: {reason}", style="yellow", markup=False)


def where(score: dict[str, Any]) -> str:
    """A score's split in words, for wherever it is printed: "select split (500 images, also used to tune)"."""
    also = ", also used to tune: optimistic" if score.get("shared") else ""
    return f"{score['split']} split ({score['images']} images{also})"


def claim_in_words(claim: dict[str, Any]) -> str:
    """One line for `scores["claim"]`: what to expect on new images."""
    low, high = claim["interval"]
    told = f"{metric_in_words(claim['metric'])} and " if "metric" in claim else ""
    return (
        f"expect {told}{claim['accuracy']:.2%} on new images (95 % {low:.2%} to {high:.2%}), "
        f"log-loss {claim['log_loss']:.4f}: cross-validated as a whole on the {where(claim)}"
    )


def metric_name(metric: dict[str, Any]) -> str:
    """The name of a score's `metric` in words."""
    return {"auroc": "AUROC", "macro_f1": "macro F1"}.get(metric["name"], metric["name"].replace("_", " "))


def metric_in_words(metric: dict[str, Any]) -> str:
    """A score's `metric` with its interval."""
    low, high = (show_metric(metric, end) for end in metric["interval"])
    return f"{metric_name(metric)} {show_metric(metric, metric['value'])} (95 % {low} to {high})"


def show_metric(metric: dict[str, Any], value: float) -> str:
    """A value of a metric: costs as they are, all others in per cent."""
    return f"{value:.4f}" if metric["name"] == "cost" else f"{value:.2%}"


def _signed(metric: dict[str, Any], value: float) -> str:
    return f"{value:+.4f}" if metric["name"] == "cost" else f"{100 * value:+.2f} points"


def gain_in_words(gain: dict[str, Any]) -> str:
    """One line for `scores["gain"]`."""
    low, high = gain["interval"]
    more = ""
    if "metric" in gain:
        found = gain["metric"]
        ends = [_signed(found, end) for end in found["interval"]]
        more = f", {metric_name(found)} {_signed(found, found['value'])} (95 % {ends[0]} to {ends[1]})"
    p = f", McNemar p = {gain['mcnemar_p']:.2g}" if "mcnemar_p" in gain else ""
    return (
        f"ensemble minus best single: {100 * gain['accuracy']:+.2f} points "
        f"(95 % {100 * low:+.2f} to {100 * high:+.2f}{p}){more} on the {where(gain)}"
    )


def risk_in_words(level: float, score: dict[str, Any]) -> str:
    """One line for `scores["risk"]`: how often the ensemble may be trusted."""
    error = "" if score["error"] is None else f", {score['error']:.2%} of them wrong"
    return (
        f"at a risk of {level:.0%} (--risk): sure of {score['answered']:.1%} of its answers{error}; the right class is "
        f"in its set, of {score['set_size']:.2f} classes on average, for {score['covered']:.2%}"
    )


def auto_in_words(report: dict[str, Any]) -> str:
    """One line for `insight["auto"]`: what auto chose, and among how much."""
    size = f" of at most {report['k']} members" if report["k"] > 1 else ""
    heat = {"none": ", no temperatures", "free": ", free temperatures"}.get(report.get("temperatures", ""), "")
    chosen = f"auto chose {report['selector']}{size}{heat}"
    if not report["options"]:
        return f"{chosen}: there was nothing to compare (one candidate, or too few images)"
    own = [option["loss"] for option in report["options"] if option["error"] == 0]
    better = any(option["loss"] < min(own, default=0.0) for option in report["options"])
    close = "; lower ones are within a standard error of it, and it comes first" if better else ""
    return f"{chosen}: held-out log-loss decided among {len(report['options'])} options{close}"


def _members(pool: Pool, ensemble: Ensemble) -> Any:
    from rich.table import Table

    places = {(pool.run_of(m), candidate.id): m for m, candidate in enumerate(pool.candidates)}
    table = Table(
        title=f"{ensemble.selector}: {len(ensemble.members)} of {len(pool.candidates)} candidates",
        title_justify="left",
        caption="without it: how the ensemble's accuracy changes, in points; fixes: errors of the best single model"
        + (f"\nand the average itself has temperature {ensemble.temperature:.2f}" if ensemble.temperature != 1 else ""),
        caption_justify="left",
    )
    scaled = any(member.temperature != 1 for member in ensemble.members)
    for heading in ("weight", "accuracy", "log-loss", *(["temperature"] if scaled else []), "without it", "fixes"):
        table.add_column(heading, justify="right")
    table.add_column("candidate")
    table.add_column("architecture")
    for k, member in enumerate(ensemble.members):
        m = places[member.run, member.id]
        probs = np.asarray(pool.probs[m])
        table.add_row(
            f"{member.weight:.3f}",
            f"{accuracy(probs, pool.labels):.2%}",
            f"{log_loss(probs, pool.labels):.4f}",
            *([f"{member.temperature:.2f}"] if scaled else []),
            _points(ensemble.insight["leave_one_out"][k]["accuracy"]),
            str(ensemble.insight["repairs"]["by_member"][k]["fixed"]),
            f"{member.run}/{member.id}" if member.run else member.id,
            pool.candidates[m].architecture,
        )
    return table


def _points(loss: float | None) -> str:
    """How an ensemble's accuracy changes without a member, in points; nothing for a lone one: there is no "without"."""
    if loss is None:
        return ""
    change = round(-100 * loss, 2)
    return f"{change:+.2f}" if change else "0.00"


def score_rows(scores: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The scores on the select split that a table compares, by name: like with like, and what is fitted says so."""
    if "claim" not in scores:
        return [("best single", scores["best_single"]), ("ensemble, fitted", scores["select"])]
    rows = [("best single", "best_single"), ("best single, calibrated", "best_single_calibrated")]
    named = [(label, scores[key]) for label, key in rows if key in scores]
    return [*named, ("ensemble", scores["claim"]), ("ensemble, fitted", scores["select"])]


def _scores(ensemble: Ensemble) -> Any:
    from rich.table import Table

    table = Table(title=f"on the {where(ensemble.scores['select'])}", title_justify="left")
    metric = ensemble.scores["select"].get("metric")
    for heading in ("", *([metric_name(metric)] if metric else []), *SCORES):
        table.add_column(heading, justify="right" if heading else "left")
    for label, score in score_rows(ensemble.scores):
        low, high = score["interval"]
        table.add_row(
            label,
            *([show_metric(score["metric"], score["metric"]["value"])] if metric else []),
            f"{score['accuracy']:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{score['log_loss']:.4f}",
            f"{score['brier']:.4f}",
            f"{score['ece']:.4f}",
        )
    if ensemble.claim is not None:
        table.caption = "all but the last line: every image by what was chosen and fitted without it"
        table.caption_justify = "left"
    return table


def _frontier(ensemble: Ensemble, device: str) -> Any:
    from rich.table import Table

    of = f" ({device})" if device else ""
    table = Table(title=f"what latency buys{of}, on the {where(ensemble.scores['select'])}", title_justify="left")
    for heading in ("ms per image", "members", "accuracy", "log-loss"):
        table.add_column(heading, justify="right")
    for point in ensemble.frontier:
        table.add_row(
            f"{point['latency_ms']:.2f}",
            str(point["members"]),
            f"{point['accuracy']:.2%}",
            f"{point['log_loss']:.4f}",
        )
    return table


def _classes(gains: list[dict[str, Any]]) -> list[str]:
    """The classes that win and lose most against the best single model, a line each; none for no difference."""
    ranked = sorted(gains, key=lambda entry: -entry["gain"])
    lines = []
    for verb, some in (("gain", ranked[:SHOWN_CLASSES]), ("lose", ranked[::-1][:SHOWN_CLASSES])):
        told = [
            f"{entry['class']} {100 * entry['gain']:+.1f} points of {entry['images']}"
            for entry in some
            if (entry["gain"] > 0) == (verb == "gain") and entry["gain"] != 0
        ]
        if told:
            lines.append(f"classes that {verb} most: {', '.join(told)}")
    return lines
