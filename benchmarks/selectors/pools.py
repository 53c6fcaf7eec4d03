"""Pools of classifiers to select from: what a sweep left, and scikit-learn's classifiers on real features.

A pool is the predictions of M models on the same N rows, which none of them was trained on. Those of scikit-learn are
made once, in minutes, and kept under the cache folder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ensemble.pool import load_pool
from trainables.data.dataset import default_cache
from trainables.run_directory import open_run, read_run

ALL = 10**6  # images of a class: more than there are
FORMAT = 1  # of the kept pools; raise it when a pool is made otherwise


@dataclass(frozen=True, eq=False)
class Predictions:
    """probs: float32 (M, N, C); labels: int64 (N,)."""

    name: str
    probs: np.ndarray
    labels: np.ndarray


def of_run(path: str) -> Predictions:
    """The usable candidates of a run directory on its select split, named after the run's data set and folder."""
    run = open_run(path)
    pool = load_pool([run])
    return Predictions(
        f"sweep {read_run(run).data.name} {run.name}", np.stack([np.asarray(p) for p in pool.probs]), pool.labels
    )


def of_scikit_learn(cifar10: Path | None, intel: Path | None, trash: Path | None) -> Iterator[Predictions]:
    """Pools on data sets of scikit-learn's, and on each image folder (ROOT/train/<class>/*) that is given.

    "breast cancer" has two classes and few rows, "trash both" a class of 5 %, "cifar10 many" 140 models.
    """
    yield _kept("digits pixels", lambda: _digits(hog=False), train=600)
    yield _kept("digits gradients", lambda: _digits(hog=True), train=300)
    yield _kept("breast cancer", _breast_cancer, train=150)
    if trash is not None:
        yield _kept("trash both", lambda: _folder(trash, ALL, 48, "both"), train=800)
    if cifar10 is not None:
        yield _kept("cifar10 many", lambda: _folder(cifar10, 450, 32, "both"), train=2500, make=_many_classifiers)
        yield _kept("cifar10 gradients", lambda: _folder(cifar10, 450, 32, "gradients"), train=2500)
        yield _kept("cifar10 colours", lambda: _folder(cifar10, 450, 32, "colours"), train=2500)
    if intel is not None:
        yield _kept("intel gradients", lambda: _folder(intel, 600, 48, "gradients"), train=1600)
        yield _kept("intel both", lambda: _folder(intel, 600, 48, "both"), train=1600)


def _kept(
    name: str,
    features: Callable[[], tuple[np.ndarray, np.ndarray]],
    train: int,
    make: Callable[[int], list[Any]] | None = None,
) -> Predictions:
    """The pool of that name, made now unless it is kept: `train` rows to learn from, all others predicted.

    make: classifiers for that number of features; default: `_classifiers`.
    """
    path = default_cache() / "pools" / f"{name.replace(' ', '-')}-{FORMAT}.npz"
    if not path.exists():
        x, labels = features()
        order = np.random.default_rng(0).permutation(len(labels))
        learn, rest = order[:train], order[train:]
        probs = []
        for model in (make or _classifiers)(x.shape[1]):
            model.fit(x[learn], labels[learn])
            predicted = np.asarray(model.predict_proba(x[rest]), np.float32)
            probs.append(predicted / predicted.sum(axis=1, keepdims=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part.npz")
        np.savez(temporary, probs=np.stack(probs), labels=labels[rest])
        temporary.replace(path)
    with np.load(path, allow_pickle=False) as file:
        return Predictions(name, file["probs"], file["labels"])


def _classifiers(features: int) -> list[Any]:
    """About forty classifiers of eleven kinds, good and bad, from cheap settings of each."""
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
    from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    def scaled(model: Any) -> Any:
        return make_pipeline(StandardScaler(), model)

    def reduced(model: Any) -> Any:
        return make_pipeline(PCA(min(30, features - 1), random_state=0), model)

    models = [scaled(LogisticRegression(C=c, max_iter=200)) for c in (1e-3, 1e-2, 1e-1, 1)]
    models += [scaled(KNeighborsClassifier(k, weights="distance")) for k in (3, 10, 30)]
    models += [reduced(KNeighborsClassifier(k)) for k in (5, 20)]
    models += [RandomForestClassifier(100, max_depth=d, random_state=0) for d in (5, 12, None)]
    models += [RandomForestClassifier(100, max_features=f, random_state=1) for f in (0.05, 0.1)]
    models += [ExtraTreesClassifier(100, max_depth=d, random_state=0) for d in (8, 16, None)]
    models += [
        reduced(HistGradientBoostingClassifier(learning_rate=rate, max_leaf_nodes=leaves, max_iter=30, random_state=0))
        for rate, leaves in ((0.1, 15), (0.2, 8))
    ]
    for hidden, penalty in (((32,), 1.0), ((64,), 1e-4), ((128,), 1e-2), ((256,), 1e-1), ((64, 64), 1e-2)):
        models += [scaled(MLPClassifier(hidden, alpha=penalty, max_iter=40, random_state=seed)) for seed in (0, 1, 2)]
    models += [LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s) for s in ("auto", 0.5)]
    models += [reduced(QuadraticDiscriminantAnalysis(solver="eigen", shrinkage=s)) for s in (0.1, 0.5)]
    models += [GaussianNB(), DecisionTreeClassifier(max_depth=8, random_state=0)]
    return models


def _many_classifiers(features: int, count: int = 140) -> list[Any]:
    """A search's worth of classifiers: networks, linear layers and trees of random settings on random features."""
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    rng = np.random.default_rng(0)
    models = []
    for seed in range(count):
        columns = np.sort(rng.permutation(features)[: int(features * rng.uniform(0.3, 1))])
        kind = rng.choice(["network", "network", "linear", "trees"])
        if kind == "network":
            hidden, penalty = int(2 ** rng.uniform(3, 7)), 10 ** rng.uniform(-4, 1)
            rate, epochs = 10 ** rng.uniform(-3.5, -2), int(rng.integers(5, 30))
            model: Any = MLPClassifier(
                (hidden,), alpha=penalty, learning_rate_init=rate, max_iter=epochs, random_state=seed
            )
        elif kind == "linear":
            model = LogisticRegression(C=10 ** rng.uniform(-4, 0), max_iter=100)
        else:
            depth = int(rng.integers(4, 20))
            model = ExtraTreesClassifier(40, max_depth=depth, random_state=seed)
        part = FunctionTransformer(np.take, kw_args={"indices": columns, "axis": 1})
        models.append(make_pipeline(part, StandardScaler(), model))
    return models


def _breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    return found.data, found.target


def _digits(hog: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    if not hog:
        return digits.data, digits.target
    images = (digits.images * 15.9).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return _gradients(images[..., None].repeat(3, axis=3)), digits.target


def _folder(root: Path, per_class: int, side: int, features: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of `per_class` random images of each class below ROOT/train, resized to `side`."""
    images, labels = [], []
    for label, folder in enumerate(sorted(path for path in (root / "train").iterdir() if path.is_dir())):
        files = sorted(folder.iterdir())
        for i in np.random.default_rng(label).permutation(len(files))[:per_class]:
            with Image.open(files[i]) as image:
                images.append(np.asarray(image.convert("RGB").resize((side, side))))
            labels.append(label)
    pixels = np.stack(images)
    found = {"gradients": _gradients, "colours": _colours}
    parts = [make(pixels) for name, make in found.items() if features in (name, "both")]
    return np.hstack(parts), np.array(labels)


def _gradients(images: np.ndarray, cells: int = 4, directions: int = 8) -> np.ndarray:
    """Histograms of gradient directions in cells x cells parts of uint8 (N, S, S, 3), float32 (N, cells^2 directions).

    Source: Dalal and Triggs 2005, "Histograms of Oriented Gradients for Human Detection", without overlapping blocks.
    """
    grey = images.astype(np.float32).mean(axis=3)
    across, down = np.zeros_like(grey), np.zeros_like(grey)
    across[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    strength = np.hypot(across, down)
    direction = (np.arctan2(down, across) % np.pi / np.pi * directions).astype(int) % directions
    found = np.stack([_cells(strength * (direction == d), cells) for d in range(directions)], axis=-1)
    length = np.sqrt((found**2).sum(axis=(1, 2, 3), keepdims=True) + 1)
    return (found / length).reshape(len(images), -1)


def _colours(images: np.ndarray, cells: int = 4) -> np.ndarray:
    """Mean colours of cells x cells parts of uint8 (N, S, S, 3), float32 (N, 3 cells^2)."""
    pixels = images.astype(np.float32) / 255
    return np.stack([_cells(pixels[..., c], cells) for c in range(3)], axis=-1).reshape(len(images), -1)


def _cells(values: np.ndarray, cells: int) -> np.ndarray:
    side = values.shape[1] // cells
    cut = values[:, : cells * side, : cells * side]
    return cut.reshape(len(values), cells, side, cells, side).mean(axis=(2, 4))
