"""What an ensemble may consist of: how many members, at what cost, from which architectures."""

from dataclasses import dataclass, replace

import numpy as np

from trainables.errors import UserError

NOTHING_FITS = "no candidate fits the budget on its own; raise --max-latency-ms or --max-params"


@dataclass(frozen=True)
class Limits:
    """Constraints on the set of members; M is the number of candidates.

    Attributes:
        k: most distinct members, at least 1.
        costs: (R, M) non-negative, what each candidate adds to each of R resources (latency, parameters); NaN counts as
            infinite, for a candidate of unknown cost must not slip past a budget. None: no budgets.
        budgets: (R,) the largest sum of costs over the distinct members.
        groups: (M,) integer code of each candidate's architecture; needed for `min_per_group` only.
        min_per_group: at least so many members of every group.
    """

    k: int = 9
    costs: np.ndarray | None = None
    budgets: np.ndarray | None = None
    groups: np.ndarray | None = None
    min_per_group: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"--top-k is {self.k}, expected at least 1 member")

    def allowed(self, members: np.ndarray) -> np.ndarray:
        """Which candidates may be given (more) weight once `members` are in; both bool (M,)."""
        if members.sum() >= self.k:
            return members.copy()
        if self.costs is None or self.budgets is None:
            return np.ones_like(members)
        costs = np.nan_to_num(self.costs, nan=np.inf)
        spent = costs[:, members].sum(axis=1)
        fits = (spent[:, None] + costs <= self.budgets[:, None] * (1 + 1e-9)).all(axis=0)
        return members | fits

    def at_most(self, k: int) -> "Limits":
        """The same limits for at most k members."""
        return replace(self, k=k)

    def subset(self, candidates: np.ndarray) -> "Limits":
        """The same limits for some of the candidates only (indices)."""
        return replace(
            self,
            costs=None if self.costs is None else self.costs[:, candidates],
            groups=None if self.groups is None else self.groups[candidates],
        )

    def quota(self, order: np.ndarray) -> list[int]:
        """The members that min_per_group demands: the best of each group that fit, as indices (best first).

        order: (M,) candidates from best to worst. Raises UserError when the quota cannot be met.
        """
        if self.min_per_group == 0 or self.groups is None:
            if not self.allowed(np.zeros(len(order), bool)).any():
                raise UserError(NOTHING_FITS)
            return []
        present = np.unique(self.groups)
        need = self.min_per_group * len(present)
        if need > self.k:
            raise UserError(
                f"--min-per-architecture {self.min_per_group} needs {need} members for {len(present)} architectures, "
                f"--top-k allows {self.k}; raise --top-k or lower --min-per-architecture"
            )
        members = np.zeros(len(order), bool)
        chosen = []
        for group in present:
            for _ in range(self.min_per_group):
                fits = self.allowed(members)
                best = next((i for i in order if self.groups[i] == group and fits[i] and not members[i]), None)
                if best is None:
                    raise UserError(
                        f"--min-per-architecture {self.min_per_group} cannot be met: an architecture has too few "
                        "candidates, or they do not fit the budget; lower it or raise the budget"
                    )
                members[best] = True
                chosen.append(int(best))
        return sorted(chosen, key=list(order).index)
