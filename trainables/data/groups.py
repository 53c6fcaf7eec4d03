"""Images that stay on one side of every split: of one patient, video or burst (--group-by), and twins.

A *unit* is what moves as one: an image alone, or all images that are linked by a group or by being twins.
"""

import re
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trainables.data.duplicates import Group
from trainables.errors import UserError

FEWEST_UNITS = 3  # of a class: below, none could be held out by each of two splits and some be learned
LARGEST_TWINS = 50  # images, and
LARGEST_TWIN_SHARE = 0.05  # of all: larger groups of near twins are pictures of one kind, and not of one thing


def unit_of_each(twins: Sequence[Group], groups: np.ndarray | None, images: int) -> np.ndarray | None:
    """The unit of each image, int64 (N,), numbered by first appearance; None when every image is alone.

    groups: int (N,), equal where images belong together, below 0 for an image of no group.
    """
    a: list[int] = []
    b: list[int] = []
    for twin in twins:
        if twin.kind != "exact" and len(twin.rows) > max(LARGEST_TWINS, LARGEST_TWIN_SHARE * images):
            continue  # pages of white paper, or digits of one form, chain up to half a data set
        a += [twin.rows[0]] * (len(twin.rows) - 1)
        b += twin.rows[1:]
    if groups is not None:
        order = np.argsort(groups, kind="stable")
        order = order[groups[order] >= 0]
        same = np.diff(groups[order]) == 0
        a += order[:-1][same].tolist()
        b += order[1:][same].tolist()
    if not a:
        return None
    links = coo_array((np.ones(len(a)), (a, b)), shape=(images, images))
    return connected_components(links, directed=False)[1].astype(np.int64)


def draw_units(labels: np.ndarray, units: np.ndarray, fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Disjoint stratified draws of whole units, one per fraction: sorted int64 indices.

    A unit counts as of the rarest class in it. Of every class with at least FEWEST_UNITS units each draw takes at
    least one, and as near to its fraction of the images as whole units come. Where every image is alone, this is
    `splits.draw`.
    """
    random = np.random.RandomState(seed)  # whose stream is frozen, see splits.draw
    _, first, unit, sizes = np.unique(units, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)  # in the order in which they appear
    counts = np.bincount(labels)
    rarest = np.full(len(first), labels.max() + 1)
    by_count = np.argsort(np.argsort(counts, kind="stable"), kind="stable")  # the rank of each class
    np.minimum.at(rarest, unit, by_count[labels])
    label = np.argsort(counts, kind="stable")[rarest]
    side = np.full(len(first), -1)
    for c in np.unique(label):
        members = random.permutation(order[label[order] == c])
        if len(members) < FEWEST_UNITS:
            continue
        total = int(sizes[members].sum())
        for s, fraction in enumerate(fractions):
            free = members[side[members] < 0]
            missing = max(1, round(fraction * total))
            chosen = 0
            for member in free:
                if chosen < len(free) - (len(fractions) - s) and abs(missing - sizes[member]) < missing:
                    side[member] = s
                    missing -= int(sizes[member])
                    chosen += 1
                if missing <= 0:
                    break
            if not chosen:
                side[free[np.argmin(sizes[free])]] = s
    return [np.flatnonzero(side[unit] == s).astype(np.int64) for s in range(len(fractions))]


def count_leaks(units: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> int:
    """How many of the images `held_out` share a unit with one in `train`; both are indices into `units`."""
    return int(np.isin(units[held_out], units[train]).sum())


def group_numbers(names: Sequence[str], pattern: str) -> np.ndarray:
    """Groups by a regular expression on the images' paths: int64 (N,), -1 where it does not match.

    Images belong together when what the first bracket of the pattern matches (without one: all that it matches) is the
    same. Raises UserError for a pattern that is none, or that matches no path or all paths alike.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group-by {pattern!r} is no regular expression ({error})") from None
    keys = [None if (match := regex.search(name)) is None else match.group(min(1, regex.groups)) for name in names]
    return number_groups(keys, pattern, names[0] if names else "")


def number_groups(keys: Sequence[str | None], what: str, example: str = "") -> np.ndarray:
    """Equal keys as equal numbers, int64 (N,); None and "" are of no group, -1."""
    numbers: dict[str, int] = {}
    result = np.array([numbers.setdefault(key, len(numbers)) if key else -1 for key in keys], np.int64)
    if len(numbers) < 2:
        found = "one group of all images" if numbers else "no group"
        hint = f"; paths look like {example}" if example else ""
        raise UserError(f"--group-by {what!r} gives {found}, expected at least {FEWEST_UNITS} of each class{hint}")
    return result
