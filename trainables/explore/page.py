"""explore.html: what there is to see in a data set, laid out for a person."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from plotly import graph_objects as go

from trainables.data.duplicates import Group, Signatures
from trainables.explore.images import Images
from trainables.page.shell import label, percent, render

TEMPLATE = Path(__file__).with_name("explore.html")
SAMPLES = 100  # images of the sample grid, spread over the classes
GROUPS, PER_GROUP = 40, 4  # duplicates shown, and images of each
SHOWN_SUSPECTS = 60
EXTREMES = 10  # darkest, brightest and flattest images
SHADES = ("#0072b2", "#e69f00", "#009e73", "#d55e00")  # of the splits; Okabe and Ito's, which trainables/page.js knows


def explore_page(found: dict[str, Any], images: Images, signatures: Signatures, groups: list[Group]) -> bytes:
    """The page as UTF-8. found: as of `trainables.explore.explore`."""
    counts = [sum(by_split.values()) for by_split in found["counts"].values()]
    brightness, contrast = signatures.brightness, signatures.contrast
    return render(
        TEMPLATE,
        found=found,
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(found["created"])),
        balance=max(counts) / max(1, min(counts)),
        plots={
            "classes": _classes(found["counts"]),
            "brightness": _distribution(brightness, images, "mean luminance, 0 to 255"),
            "contrast": _distribution(contrast, images, "spread of luminance"),
            "sizes": _sizes(found["original_sizes"]) if len(found["original_sizes"]) > 1 else None,
        },
        samples=_samples(images),
        extremes={
            "Darkest": [_shot(images, int(i)) for i in np.argsort(brightness, kind="stable")[:EXTREMES]],
            "Brightest": [_shot(images, int(i)) for i in np.argsort(-brightness, kind="stable")[:EXTREMES]],
            "Least contrast": [_shot(images, int(i)) for i in np.argsort(contrast, kind="stable")[:EXTREMES]],
        },
        groups=_groups(found, images, groups),
        suspects=_suspects(found, images),
    )


def _shot(images: Images, i: int, note: str | None = None) -> dict[str, Any]:
    """Image i as parts.html shows it."""
    split = images.splits[int(images.split[i])]
    return {"image": images[i], "title": images.label(i) or split, "note": note or "", "right": None}


def _samples(images: Images) -> list[dict[str, Any]]:
    """The same number of every class, drawn at random; with many classes one of each of the first hundred."""
    labels = images.data.labels
    classes = range(min(SAMPLES, len(images.data.classes)))
    each = max(1, SAMPLES // len(classes))
    random = np.random.default_rng(0)
    rows = [random.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    return [_shot(images, int(i)) for i in np.concatenate(rows)[:SAMPLES]]


def _groups(found: dict[str, Any], images: Images, groups: list[Group]) -> list[dict[str, Any]]:
    """Groups of duplicates: those across splits first, then those of several labels."""
    order = sorted(
        range(len(groups)), key=lambda g: (not found["groups"][g]["across"], not found["groups"][g]["contradictory"])
    )
    shown = []
    for g in order[:GROUPS]:
        rows = groups[g].rows
        splits = images.split[list(rows)]
        # one of every split first, so that a leak is seen
        first = [int(np.flatnonzero(splits == s)[0]) for s in np.unique(splits)]
        chosen = (first + [k for k in range(len(rows)) if k not in first])[:PER_GROUP]
        shown.append(
            found["groups"][g]
            | {
                "shots": [_shot(images, rows[k], images.splits[int(splits[k])]) for k in sorted(chosen)],
                "size": len(rows),
            }
        )
    return shown


def _suspects(found: dict[str, Any], images: Images) -> list[dict[str, Any]]:
    if not found["suspects"]:
        return []
    return [
        _shot(images, suspect["row"], f"rather {suspect['suggested']}, {percent(suspect['confidence'], 0)}")
        | {"title": f"{suspect['label']}?"}
        for suspect in found["suspects"]["images"][:SHOWN_SUSPECTS]
    ]


def _classes(counts: dict[str, dict[str, int]]) -> go.Figure:
    """Images of every class, stacked by split."""
    names = [label(name) for name in counts]
    figure = go.Figure()
    for split, colour in zip(next(iter(counts.values())), SHADES, strict=False):
        figure.add_bar(
            y=names, x=[by_split[split] for by_split in counts.values()], orientation="h", name=split,
            marker={"color": colour}, hovertemplate="%{y}: %{x} " + split + "<extra></extra>",
        )  # fmt: skip
    return figure.update_layout(
        barmode="stack",
        height=max(260, min(3000, 120 + 22 * len(counts))),
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"title": {"text": "images"}},
        yaxis={"autorange": "reversed", "type": "category", "dtick": 1},
    )


def _distribution(values: np.ndarray, images: Images, title: str) -> go.Figure:
    """A number of each image as a line per split: shares of the split's images in 40 bins."""
    edges = np.linspace(float(values.min()), float(values.max()) + 1e-3, 41)
    figure = go.Figure()
    for s, (split, colour) in enumerate(zip(images.splits, SHADES, strict=False)):
        own = values[images.split == s]
        figure.add_scatter(
            x=(edges[:-1] + edges[1:]) / 2, y=np.histogram(own, edges)[0] / max(1, len(own)), mode="lines", name=split,
            line={"color": colour, "shape": "spline"},
            hovertemplate="%{x:.0f}: %{y:.1%} of " + split + "<extra></extra>",
        )  # fmt: skip
    return figure.update_layout(
        height=300,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        xaxis={"title": {"text": title}},
        yaxis={"tickformat": ".0%", "title": {"text": "share of images"}},
    )


def _sizes(sizes: list[list[int]]) -> go.Figure:
    """Original widths and heights; a dot is as large as the share of images that have it."""
    width, height, count = np.array(sizes).T
    figure = go.Figure(
        go.Scatter(
            x=width, y=height, mode="markers", customdata=count,
            marker={"size": 6 + 24 * np.sqrt(count / count.max()), "opacity": 0.5, "color": SHADES[0]},
            hovertemplate="%{x} x %{y}: %{customdata} images<extra></extra>",
        )
    )  # fmt: skip
    return figure.update_layout(
        height=300, xaxis={"title": {"text": "width in pixels"}}, yaxis={"title": {"text": "height in pixels"}}
    )
