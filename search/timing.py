"""Where a sweep stands in time: what it has used of its budget, what is left, and how long trials take."""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import optuna

from search.budget import Budget
from trainables.config import TrialConfig
from trainables.run_directory import Candidate

SECONDS_USED, DEVICE_SECONDS = "seconds_used", "device_seconds"  # study attributes: spent by earlier processes
SAVE_SECONDS = 5.0


class Timing:
    """Counts a sweep's seconds over all processes that work on it, and learns from candidates what an epoch takes.

    Args:
        study: keeps what was spent.
        budget: its `began`, `deadline` and `device_seconds`.
        clock: time.time(), or a simulation's.
    """

    def __init__(self, study: optuna.Study, budget: Budget, clock: Callable[[], float] = time.time) -> None:
        self.study, self.budget, self.clock = study, budget, clock
        self.lanes, self.devices = 1, 1.0
        self.began: dict[str, float] = {}  # of every running trial
        self.seconds_per_epoch: dict[tuple[str, str], float] = {}  # by what decides it, see _speed_key
        self.seconds_of_trials: list[float] = []  # that were trained to the end
        self._saved = clock()
        self._started = self._saved if budget.began is None else budget.began
        self._used = float(study.user_attrs.get(SECONDS_USED, 0.0))
        self._device_seconds = float(study.user_attrs.get(DEVICE_SECONDS, 0.0))

    def place(self, lanes: int, devices: float) -> None:
        """How many trials run at a time, and on how many devices each: what device-seconds are counted by."""
        self.lanes, self.devices = lanes, devices

    def begin(self, id: str) -> None:
        self.began[id] = self.clock()

    def end(self, id: str) -> None:
        self._device_seconds += self.devices * (self.clock() - self.began.pop(id))

    def device_seconds(self) -> float:
        """Used so far, by earlier processes and by trials that still run."""
        now = self.clock()
        return self._device_seconds + self.devices * sum(now - since for since in self.began.values())

    def left(self) -> float:
        """Seconds until the deadline, or until the device-seconds are used up with all lanes busy."""
        now = self.clock()
        left = math.inf if self.budget.deadline is None else self.budget.deadline - now
        if self.budget.device_seconds is not None:
            left = min(left, (self.budget.device_seconds - self.device_seconds()) / (self.lanes * self.devices))
        return left

    def share_used(self) -> float:
        """How much of the time is used, 0 to 1: of whichever limit is nearest."""
        shares = [0.0]
        if self.budget.deadline is not None:
            start = self._started - self._used
            shares.append((self.clock() - start) / (self.budget.deadline - start))
        if self.budget.device_seconds:
            shares.append(self.device_seconds() / self.budget.device_seconds)
        return max(shares)

    def save(self) -> None:
        """Keep what was spent with the study; cheap to call often, for it writes every few seconds alone."""
        now = self.clock()
        if now - self._saved > SAVE_SECONDS:
            self._saved = now
            self.study.set_user_attr(SECONDS_USED, self._used + now - self._started)
            self.study.set_user_attr(DEVICE_SECONDS, self.device_seconds())

    # how long trials take

    def learn(self, candidate: Candidate) -> None:
        """Median seconds of an epoch: the first may have computed what later trials find cached."""
        ends = [row["seconds"] for row in candidate.info.curve if "seconds" in row]
        if ends and candidate.info.config:
            epochs = [after - before for before, after in pairwise([0.0, *ends])]
            self.seconds_per_epoch[_speed_key(candidate.info.config.to_dict())] = statistics.median(epochs)
            self.seconds_of_trials.append(ends[-1])

    def of_epochs(self, config: dict[str, Any], epochs: int) -> float:
        """Seconds of so many epochs: as measured, else as of the slowest of its family so far; 0 when unknown."""
        family, exact = _speed_key(config)
        known = [speed for key, speed in self.seconds_per_epoch.items() if key[0] == family]
        return epochs * self.seconds_per_epoch.get((family, exact), max(known, default=0.0))

    def too_short_for_a_trial(self) -> bool:
        """Whether less is left than half of the trials so far took."""
        return bool(self.seconds_of_trials) and self.left() < statistics.median(self.seconds_of_trials)

    def fit(self, config: TrialConfig) -> TrialConfig | None:
        """The config with as many epochs as the time left allows (its schedule then still ends at zero), or None."""
        speed, left = self.of_epochs(config.to_dict(), 1), self.left()
        if left == math.inf or not speed:
            return config
        epochs = min(config.epochs, int(left / speed))
        if epochs < 1:
            return None
        values = config.to_dict()
        return TrialConfig.from_dict({**values, "epochs": epochs, "freeze_epochs": min(config.freeze_epochs, epochs)})


def _speed_key(config: dict[str, Any]) -> tuple[str, str]:
    """What an epoch's seconds depend on: much (the first part), and a little (the second)."""
    frozen = config["freeze_epochs"] >= config["epochs"]
    return f"{config['backbone']} {frozen}", f"{config['image_size']} {config['width']:.2f} {config['stem']}"
