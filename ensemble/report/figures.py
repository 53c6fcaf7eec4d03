"""The figures of a report, as plotly makes them. Points carry a trial's id as `customdata`: a click shows that trial.

Colours are Okabe and Ito's, in the shades that trainables/page.js knows a dark twin of, and cividis for scales.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from plotly import graph_objects as go

from ensemble.report.trials import Trial
from trainables.page.shell import label

BLUE, RED, GREY, ORANGE = "#0072b2", "#d55e00", "#7b8590", "#e69f00"
BLUE_BAND, RED_SCALE = "rgba(0,114,178,0.16)", [[0, "rgba(213,94,0,0.0)"], [1, "rgba(213,94,0,1.0)"]]
NUMBERED_CLASSES = 12  # up to which a confusion matrix has room for its numbers
SLICED = 8  # hyperparameters that are shown one by one: the most important ones
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


FEW = 15  # candidates, each of which has a tick of its own; else half ones would be shown, rounded


def growth(singles: list[dict[str, Any]], points: list[dict[str, Any]], chosen: dict[str, Any]) -> go.Figure:
    """Single models in the order in which they came, the best of them so far, and the ensemble of what there was.

    singles: id, name, accuracy, interval, weight (0: no member) of each; points: of `diagnosis.growth`; chosen:
    accuracy and interval of the ensemble that was written. Opens on the part where the ensemble and the best single
    model can be told apart; models below it are marked at its lower edge.
    """
    accuracies = np.array([single["accuracy"] for single in singles])
    low, high = _window(accuracies, points, chosen)
    place = np.arange(1, len(singles) + 1)
    figure = go.Figure()
    if points:
        x = [point["candidates"] for point in points]
        ends = np.array([point["interval"] for point in points])
        figure.add_scatter(
            x=[*x, *x[::-1]], y=[*ends[:, 1], *ends[::-1, 0]], fill="toself", fillcolor=BLUE_BAND, line={"width": 0},
            mode="lines", hoverinfo="skip", name="its 95 % interval", showlegend=False,
        )  # fmt: skip
    figure.add_scatter(
        x=place, y=np.maximum.accumulate(accuracies), mode="lines", line={"color": GREY, "shape": "hv", "dash": "dot"},
        name="best single model so far", hoverinfo="skip",
    )  # fmt: skip
    for name, is_member, colour in (("single model", False, GREY), ("single model, a member", True, ORANGE)):
        for below in (False, True):
            some = [
                i for i, s in enumerate(singles) if (s["weight"] > 0) == is_member and (s["accuracy"] < low) == below
            ]
            if some:
                figure.add_trace(
                    _singles([singles[i] for i in some], place[some], name, colour, low if below else None)
                )
    if points:
        figure.add_scatter(
            x=x, y=[point["accuracy"] for point in points], mode="lines+markers", line={"color": BLUE, "width": 3},
            # unseen, but larger than a model's dot: of two points in one place plotly answers a click with the smaller
            marker={"size": 16, "color": "rgba(0,0,0,0)"}, name="ensemble so far (cross-fitted)",
            customdata=[[point["members"], *point["interval"]] for point in points],
            hovertemplate="ensemble of %{x} candidates: %{y:.2%}<br>95 %: %{customdata[1]:.2%} to %{customdata[2]:.2%}"
            "<br>%{customdata[0]:.1f} members<extra></extra>",
        )  # fmt: skip
    bottom, top = chosen["interval"]
    figure.add_scatter(
        x=[len(singles) + 0.5], y=[chosen["accuracy"]], mode="markers", name="ensemble as chosen",
        error_y={"array": [top - chosen["accuracy"]], "arrayminus": [chosen["accuracy"] - bottom], "color": BLUE},
        marker={"symbol": "diamond", "size": 12, "color": BLUE},
        hovertemplate=f"ensemble as chosen: %{{y:.2%}}<br>95 %: {bottom:.2%} to {top:.2%}<extra></extra>",
    )  # fmt: skip
    return figure.update_layout(
        legend=LEGEND,
        height=460,
        xaxis={
            "title": {"text": "candidates trained so far"},
            "range": [0.3, len(singles) + 1],
            "tickformat": "d",
            **({"dtick": 1} if len(singles) <= FEW else {}),
        },
        yaxis={"title": {"text": "select accuracy"}, "tickformat": ".1%", "range": [low, high]},
    )


def _singles(
    some: list[dict[str, Any]], x: np.ndarray, name: str, colour: str, edge: float | None = None
) -> go.Scatter:
    """Single models as points with intervals; with an edge, as marks on it."""
    accuracies = np.array([single["accuracy"] for single in some])
    ends = np.array([single["interval"] for single in some])
    hover = [
        f"{label(single['id'])} {label(single['name'])}: {single['accuracy']:.2%}<br>95 %: {low:.2%} to {high:.2%}"
        for single, (low, high) in zip(some, ends.tolist(), strict=True)
    ]
    figure = go.Scatter(
        x=x, y=accuracies, mode="markers", marker={"color": colour, "size": 9}, name=name, text=hover,
        customdata=[f"{single['run']}/{single['id']}" if single["run"] else single["id"] for single in some],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    if edge is not None:
        mark = {"symbol": "triangle-down-open", "size": 11}
        return figure.update(y=np.full(len(some), edge), marker=mark, cliponaxis=False, showlegend=False)
    bars = {"array": ends[:, 1] - accuracies, "arrayminus": accuracies - ends[:, 0], "thickness": 1, "width": 0}
    return figure.update(error_y=bars | {"color": colour})


def _window(accuracies: np.ndarray, points: list[dict[str, Any]], chosen: dict[str, Any]) -> tuple[float, float]:
    """The part of the accuracies to look at: where the ensemble and the best single model can be told apart."""
    high = max([chosen["interval"][1], float(accuracies.max()), *(point["interval"][1] for point in points)])
    gain, width = chosen["accuracy"] - float(accuracies.max()), chosen["interval"][1] - chosen["interval"][0]
    low = max(float(accuracies.min()) - width / 2, high - 4 * (width + max(0.0, gain)))
    return low, high + 0.04 * (high - low)


def confusion(matrix: np.ndarray, totals: np.ndarray, classes: Sequence[str]) -> go.Figure:
    """Mistakes of a confusion matrix (or a part of one) as shares of each label's images, of which there are `totals`.

    What is right stands in the diagonal, uncoloured.
    """
    share = matrix / np.maximum(1, totals)[:, None]
    wrong = np.where(np.eye(len(matrix), dtype=bool), np.nan, share)
    names = [label(name, 14) for name in classes]
    numbers = [[str(n) if n else "" for n in row] for row in matrix.tolist()]
    figure = go.Figure(
        go.Heatmap(
            z=wrong,
            x=names,
            y=names,
            colorscale=RED_SCALE,
            zmin=0,
            zmax=max(0.01, float(np.nan_to_num(wrong).max())),
            text=numbers,
            texttemplate="%{text}" if len(matrix) <= NUMBERED_CLASSES else None,
            hoverongaps=False,
            customdata=share,
            xgap=1,
            ygap=1,
            showscale=len(matrix) > NUMBERED_CLASSES,
            colorbar={"tickformat": ".0%", "thickness": 10, "outlinewidth": 0},
            hovertemplate="%{y} called %{x}: %{text} images, %{customdata:.1%}<extra></extra>",
        )
    )
    figure.update_layout(height=460)
    figure.update_xaxes(title="called", side="bottom", tickangle=-45, showgrid=False, type="category")
    figure.update_yaxes(title="label", autorange="reversed", showgrid=False, type="category")
    return figure


def calibration(curves: dict[str, list[dict[str, Any]]]) -> go.Figure:
    """Accuracy against confidence of two models, `diagnosis.calibration` by name, with the shares of images below."""
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"}, hoverinfo="skip", name="ideal"
    )
    for (name, bins), colour, symbol in zip(curves.items(), (BLUE, ORANGE), ("circle", "square"), strict=False):
        total = sum(b["images"] for b in bins)
        x, y = [b["confidence"] for b in bins], np.array([b["accuracy"] for b in bins])
        ends = np.array([b["interval"] for b in bins])
        bars = {"array": ends[:, 1] - y, "arrayminus": y - ends[:, 0], "thickness": 1, "width": 0, "color": colour}
        figure.add_scatter(
            x=x, y=y, mode="lines+markers", name=name, line={"color": colour}, marker={"symbol": symbol, "size": 8},
            error_y=bars,
            customdata=[[b["images"]] for b in bins],
            hovertemplate="%{x:.1%} sure, %{y:.1%} right<br>%{customdata[0]} images<extra>" + name + "</extra>",
        )  # fmt: skip
        figure.add_bar(
            x=[(b["low"] + b["high"]) / 2 for b in bins], y=[b["images"] / total for b in bins], yaxis="y2",
            marker={"color": colour}, name=f"{name}: share of images", showlegend=False,
            hovertemplate="%{y:.1%} of the images<extra>" + name + "</extra>",
        )  # fmt: skip
    return figure.update_layout(
        legend=LEGEND,
        height=460,
        bargap=0.25,
        xaxis={"title": {"text": "confidence"}, "tickformat": ".0%", "range": [0, 1.02], "anchor": "y2"},
        yaxis={"title": {"text": "accuracy"}, "tickformat": ".0%", "range": [0, 1.04], "domain": [0.3, 1]},
        yaxis2={"title": {"text": "share"}, "tickformat": ".0%", "domain": [0, 0.2], "anchor": "x"},
    )


def risk(curve: list[list[float]], sure: float, level: float) -> go.Figure:
    """Wrong ones among the answers that are given, against how many are: a `curve` of ensemble.risk.measure.

    sure: the confidence from which on an answer counts as sure; level: the risk that it was chosen for.
    """
    confidence, answered, error = np.array(curve).T
    figure = go.Figure()
    figure.add_scatter(
        x=answered, y=error, mode="lines", line={"color": BLUE, "width": 3}, name="ensemble", customdata=confidence,
        hovertemplate="%{x:.1%} of the images answered, %{y:.2%} of them wrong<br>confidence at least "
        "%{customdata:.1%}<extra></extra>",
    )  # fmt: skip
    is_sure = np.flatnonzero(confidence >= sure)
    if len(is_sure):
        last = is_sure[-1]
        figure.add_scatter(
            x=answered[[last]], y=error[[last]], mode="markers", name=f"sure, at a risk of {level:.0%}",
            marker={"symbol": "diamond", "size": 12, "color": ORANGE}, hoverinfo="skip",
        )  # fmt: skip
    return figure.update_layout(
        legend=LEGEND,
        height=360,
        xaxis={"title": {"text": "answers given, of all images"}, "tickformat": ".0%", "range": [0, 1.02]},
        yaxis={"title": {"text": "wrong ones among them"}, "tickformat": ".1%", "rangemode": "tozero"},
    )


def learning_curves(trials: list[Trial], members: Sequence[str]) -> go.Figure:
    """Tune accuracy of every trial by epoch; the ensemble's members in colour."""
    figure = go.Figure()
    others = [trial for trial in trials if trial.curve and trial.id not in members]
    x: list[int | None] = []
    y: list[float | None] = []
    ids: list[str] = []
    for trial in others:  # one trace with gaps: hundreds of them would be slow
        x += [*range(1, len(trial.curve) + 1), None]
        y += [*trial.curve, None]
        ids += [trial.id] * (len(trial.curve) + 1)
    if ids:
        figure.add_scatter(
            x=x, y=y, customdata=ids, mode="lines+markers", line={"color": GREY, "width": 1}, marker={"size": 5},
            opacity=0.55, name="other trials", hovertemplate="%{customdata}, epoch %{x}: %{y:.2%}<extra></extra>",
        )  # fmt: skip
    for trial in trials:
        if trial.curve and trial.id in members:
            name = label(f"{trial.id} {trial.architecture}")
            figure.add_scatter(
                x=list(range(1, len(trial.curve) + 1)), y=list(trial.curve), customdata=[trial.id] * len(trial.curve),
                mode="lines+markers", name=name, hovertemplate=f"{name}, epoch %{{x}}: %{{y:.2%}}<extra></extra>",
            )  # fmt: skip
    return figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": -0.15, "yanchor": "top"},
        height=480,
        xaxis={"title": {"text": "epoch"}, "tickformat": "d"},
        yaxis={"title": {"text": "tune accuracy"}, "tickformat": ".0%"},
    )


def of_study(study: optuna.Study) -> dict[str, go.Figure | str]:
    """The study's own plots by title, as optuna.visualization makes them; where it cannot, a line that says why."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not study.get_trials(deepcopy=False):
        return {}
    figures: dict[str, go.Figure | str] = {}
    if len(finished) < 2:
        figures["Parameter importance"] = f"needs 2 finished trials, this study has {len(finished)}"
        figures["Timeline"] = _plotted(lambda: _timeline(study))
    else:
        importance = _plotted(lambda: _importance(study))
        params = _most_important(importance, finished)
        figures |= {
            "Parameter importance": importance,
            "Timeline": _plotted(lambda: _timeline(study)),
            "Parallel coordinates": _plotted(lambda: _parallel_coordinates(study, params)),
            "Slices": _plotted(lambda: _slices(study, params)),
        }
    return figures


def _plotted(make: Callable[[], go.Figure]) -> go.Figure | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make().update_layout(title=None)
    except Exception as error:  # values that are all the same, ...
        return f"cannot be drawn: {str(error) or type(error).__name__}"


def _importance(study: optuna.Study) -> go.Figure:
    figure = optuna.visualization.plot_param_importances(study)
    if not figure.data:
        raise ValueError("the trials differ in no parameter")
    return figure.update_traces(marker={"color": BLUE}).update_layout(
        showlegend=False, height=360, yaxis={"title": None}
    )


def _most_important(importance: go.Figure | str, finished: list[optuna.trial.FrozenTrial]) -> list[str]:
    if isinstance(importance, go.Figure):
        return [str(name) for name in importance.data[0].y[::-1][:SLICED]]
    return sorted({name for trial in finished for name in trial.params})[:SLICED]


def _parallel_coordinates(study: optuna.Study, params: list[str]) -> go.Figure:
    """A line per trial: the better its objective, the stronger."""
    figure = optuna.visualization.plot_parallel_coordinate(study, params=params)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    heights = np.array([float(line.y[0]) for line in lines])  # the first axis is the objective, scaled to 0..1
    best_last = np.argsort(heights, kind="stable")
    if study.direction == optuna.study.StudyDirection.MINIMIZE:
        best_last = best_last[::-1]
    for rank, i in enumerate(best_last.tolist(), start=1):
        lines[i].update(line={"color": BLUE, "width": 1.5}, opacity=0.1 + 0.8 * (rank / len(lines)) ** 2)
    figure.data = [lines[i] for i in best_last.tolist()]  # without the scale of the colours that it had
    axes = len(lines[0].x)
    return figure.update_layout(plot_bgcolor=None, width=110 * axes, height=340, xaxis={"range": [-0.5, axes - 0.5]})


def _slices(study: optuna.Study, params: list[str]) -> go.Figure:
    figure = optuna.visualization.plot_slice(study, params=params)
    for trace in figure.data:
        trace.customdata = [f"{int(number):04d}" for number in trace.marker.color]
        trace.hovertemplate = "%{customdata}: %{x}, %{y}<extra></extra>"
        trace.marker.update({"colorscale": "Cividis", "size": 8})
        if any(isinstance(x, str) for x in trace.x):
            trace.x = [label(str(x).strip("'"), 12) for x in trace.x]
    return figure.update_layout(width=max(400, 200 * len(params)), height=340)


def _timeline(study: optuna.Study) -> go.Figure:
    figure = optuna.visualization.plot_timeline(study)
    shades = {"COMPLETE": BLUE, "PRUNED": ORANGE, "FAIL": RED, "RUNNING": GREY, "WAITING": GREY}
    for trace in figure.data:
        trace.customdata = [f"{int(number):04d}" for number in trace.y]
        trace.text = None  # the whole trial as JSON, tracebacks included
        trace.hovertemplate = "%{customdata}<extra>" + trace.name.lower() + "</extra>"
        trace.marker.color = shades.get(trace.name, GREY)
        trace.name = trace.name.lower()
    return figure.update_layout(legend=LEGEND, height=360, xaxis={"title": None})
