"""Where a sweep stands in time: what it has used of its budget, what is left, and how long trials take."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from search.budget import Budget
from search.costs import Costs, whole_epochs_elsewhere
from trainables.config import TrialConfig
from trainables.run.records import Spent
from trainables.run_directory import Candidate

ENOUGH = 10_000  # images in training that are worth a trial where there is no time for a whole epoch


@dataclass(frozen=True)
class Speed:
    """Seconds of a trial before its body learns, and of an epoch of the whole network."""

    start: float
    epoch: float


class Timing:
    """Counts a sweep's seconds over all processes that work on it, and learns from candidates what an epoch takes.

    Args:
        used: what earlier processes have spent.
        budget: its `began`, `deadline` and `device_seconds`.
        clock: time.time(), or a simulation's.
    """

    def __init__(self, used: Spent, budget: Budget, clock: Callable[[], float] = time.time) -> None:
        self.used, self.budget, self.clock = used, budget, clock
        self.lanes, self.devices, self.device = 1, 1.0, ""
        self.began: dict[str, float] = {}  # of every running trial
        self.speeds: dict[tuple[str, str], Speed] = {}  # by what decides them, see _speed_key
        self.costs: Costs | None = None  # of backbones that nothing was trained with yet
        self.seconds_of_trials: list[float] = []  # that were trained to the end
        self.candidates: list[Candidate] = []
        self._started = clock() if budget.began is None else budget.began
        self._device_seconds = used.device_seconds

    def place(self, lanes: int, devices: float, device: str = "") -> None:
        """How many trials run at a time, and on how many devices each: what device-seconds are counted by.

        device: "cuda" or "cpu"; what trials took on the other kind says nothing and is forgotten.
        """
        self.lanes, self.devices = lanes, devices
        if device != self.device:
            self.device, seen = device, self.candidates
            self.candidates, self.speeds, self.seconds_of_trials = [], {}, []
            if self.costs is not None:
                self.costs.forget()
            for candidate in seen:
                self.learn(candidate)

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
            start = self._started - self.used.seconds
            shares.append((self.clock() - start) / (self.budget.deadline - start))
        if self.budget.device_seconds:
            shares.append(self.device_seconds() / self.budget.device_seconds)
        return max(shares)

    def spent(self) -> Spent:
        """By all processes so far."""
        return Spent(self.used.seconds + self.clock() - self._started, self.device_seconds())

    # how long trials take

    def know(self, costs: Costs | None) -> None:
        """Fall back on these where nothing was measured; they learn from all candidates seen so far."""
        self.costs = costs
        if costs is not None:
            for candidate in self.candidates:
                costs.learn(candidate)

    def learn(self, candidate: Candidate) -> None:
        """Note what a candidate took. The first of its kind may have computed what later ones find stored."""
        self.candidates.append(candidate)
        if self.device and candidate.info.device and (candidate.info.device == "cuda") != (self.device == "cuda"):
            return
        config, ends = candidate.info.config, [row["seconds"] for row in candidate.info.curve if "seconds" in row]
        if not ends or config is None:
            return
        key, epochs = _speed_key(config), [after - before for before, after in pairwise([0.0, *ends])]
        known, first = self.speeds.get(key), whole_epochs_elsewhere(candidate)
        body = epochs[config.freeze_epochs :] or epochs
        if first:  # perhaps on another kind of device
            here = epochs[max(first, config.freeze_epochs) :]
            if not here:
                return
            each = statistics.median(here)
            start = 0.0 if known is None else known.start
        else:
            each = 0.0 if config.is_probe else statistics.median(body)
            start = max(0.0, ends[-1] - each * len(body))
            start = start if known is None else min(known.start, start)
        self.speeds[key] = Speed(start, each)
        self.seconds_of_trials.append(start + each * len(body) if first else ends[-1])
        if self.costs is not None:
            self.costs.learn(candidate)

    def seconds(self, config: TrialConfig) -> Speed | None:
        """What a trial takes: as measured, else as its backbone costs, else as the slowest of its family; or None."""
        family, exact = _speed_key(config)
        if (family, exact) in self.speeds:
            return self.speeds[family, exact]
        if self.costs is not None and config.pretrained and config.backbone in self.costs.gflops:
            cost, costs = self.costs.of(config.backbone), self.costs
            features = cost.features(costs.images, config.image_size)
            epoch = costs.trainings * cost.epoch(costs.train_images, config.image_size)
            if costs.trainings == 1:  # and then goes on with all images
                epoch *= 1 + config.refit * costs.images / costs.train_images
            return Speed(features, epoch if config.epochs else 0.0)
        known = [speed for (other, _), speed in self.speeds.items() if other == family]
        return max(known, key=lambda speed: speed.epoch, default=None)

    def to_finish(self, config: TrialConfig, done: int) -> float:
        """Seconds that a trial with `done` epochs behind it still takes; 0 when that is not known."""
        speed = self.seconds(config)
        return 0.0 if speed is None else speed.epoch * (config.all_epochs - done)

    def too_short_for_a_trial(self) -> bool:
        """Whether less is left than half of the trials so far took."""
        return bool(self.seconds_of_trials) and self.left() < statistics.median(self.seconds_of_trials)

    def room_for(self, config: TrialConfig) -> float:
        """How many trials like this one the time left has room for, in one lane."""
        speed, left = self.seconds(config), self.left()
        took = 0.0 if speed is None else speed.start + config.epochs * speed.epoch
        return math.inf if not took else left / took

    def fit(self, config: TrialConfig) -> TrialConfig | None:
        """The config with as many epochs as the time left allows (its schedule then still ends at zero), or None.

        A part of an epoch is worth while where it is ENOUGH images; the trial's own deadline cuts it. Beside other
        candidates less than half of a pretrained network's epochs is not, unless it is ENOUGH, too: what comes out is
        below its own probe.
        """
        speed, left = self.seconds(config), self.left()
        if left == math.inf or speed is None:
            return config
        if config.epochs == 0:  # the head alone
            return config if speed.start + config.all_epochs * speed.epoch <= left else None
        epochs = config.epochs if not speed.epoch else min(config.epochs, int((left - speed.start) / speed.epoch))
        if self.costs is not None:
            if epochs < 1:
                epochs = int(self.costs.train_images * (left - speed.start) / speed.epoch >= ENOUGH)
            hardly_tuned = config.pretrained and epochs < config.epochs / 2
            if hardly_tuned and self.candidates and epochs * self.costs.train_images < ENOUGH:
                return None
        return replace(config, epochs=epochs) if epochs >= 1 else None


def _speed_key(config: TrialConfig) -> tuple[str, str]:
    """What an epoch's seconds depend on: much (the first part), and a little (the second)."""
    kind = "whole" if config.epochs else "head" if config.freeze_epochs else "probe"
    return f"{config.backbone} {kind}", f"{config.image_size} {config.width:.2f} {config.stem}"
