"""The lanes of a sweep: which of them are free, and on which machine the next may start."""

import time
from collections import Counter
from collections.abc import Callable, Mapping

from cluster.lane import Lane, LaneSpec

CLOSE_S = 10.0  # for all lanes to end, when the sweep has

Machine = str | None
Places = Mapping[Machine, int]  # how many lanes each holds, by Ray's ids; under None those wherever Ray finds room


class LanePool:
    """Lanes, started when a trial wants one and its machine has room; all calls come from the thread of run_trials.

    A lane that dies may have died with its machine: until `notice_s` later no machine that lost one gets more trials
    than it has left. Others are not touched by that.
    """

    def __init__(
        self, start: Callable[[LaneSpec, Machine], Lane], spec: Callable[[], LaneSpec], places: Callable[[], Places],
        notice_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.start, self.spec, self.places, self.notice_s = start, spec, places, notice_s
        self.room: Places = {}
        self.idle: list[Lane] = []
        self.busy: list[Lane] = []
        self.closing: list[Lane] = []
        self.limits: dict[Machine, tuple[int, float]] = {}  # trials at a time, and until when that counts

    def look(self) -> None:
        """Count the machines again, and forget what has gone; raises what `places` raises."""
        self.room = self.places()
        self.closing = [lane for lane in self.closing if not lane.is_closed()]
        for lane in [*self.idle, *self.busy]:
            if lane.machine is not None and lane.machine not in self.room:
                lane.kill()  # its mailbox may not even have started, and then its trial would wait
        for lane in list(self.idle):
            # trials may have other machines now, those with GPUs or that hold whole lanes
            if not self.room.get(lane.machine) or lane.spec != self.spec() or lane.has_ended:
                self.idle.remove(lane)
                self._end(lane)

    def has_room(self) -> bool:
        """Whether `take` has a lane."""
        return self._free() is not None

    def take(self) -> Lane:
        """A lane for one trial, warm if there is one; raises LookupError without room (`has_room`)."""
        free = self._free()
        if free is None:
            raise LookupError("no machine has room for a lane")
        machine, lane = free
        if lane is None:
            lane = self.start(self.spec(), machine)
        else:
            self.idle.remove(lane)
        self.busy.append(lane)
        return lane

    def give_back(self, lane: Lane) -> None:
        """Its trial has ended; of a lane that was lost meanwhile nothing is heard again."""
        if lane in self.busy:
            self.busy.remove(lane)
            self.idle.append(lane)

    def give_up(self, lane: Lane) -> None:
        """The lane can no longer be used, through what its trial did; its machine is there."""
        self.busy.remove(lane)
        self._end(lane)

    def lose(self, lane: Lane) -> bool:
        """The lane has died, perhaps with its machine; False when others just have: machines may go together."""
        now = time.monotonic()
        first = all(now >= until for _, until in self.limits.values())
        self.give_up(lane)
        left = sum(other.machine == lane.machine for other in self.busy)
        self.limits[lane.machine] = (left, now + self.notice_s)
        return first

    def close(self, gently: bool) -> None:
        """End all lanes; `gently`, and wait a moment until their room is free. Ray may have died otherwise, and then it
        would soon end this process, too."""
        lanes = [*self.idle, *self.busy, *self.closing]
        if gently:
            for lane in [*self.idle, *self.busy]:
                lane.close()
            end = time.monotonic() + CLOSE_S
            lanes = [lane for lane in lanes if not lane.is_closed(max(0.0, end - time.monotonic()))]
        for lane in lanes:
            lane.kill()
        self.idle, self.busy, self.closing = [], [], []

    def _end(self, lane: Lane) -> None:
        lane.close()
        self.closing.append(lane)

    def _free(self) -> tuple[Machine, Lane | None] | None:
        """Where the next trial would run, and in which idle lane; the machine with most room if none is idle."""
        busy, idle = Counter(lane.machine for lane in self.busy), Counter(lane.machine for lane in self.idle)
        closing, now = Counter(lane.machine for lane in self.closing), time.monotonic()
        trials = {}  # that each machine may still get
        for machine, count in self.room.items():
            limit, until = self.limits.get(machine, (0, float("-inf")))
            trials[machine] = (min(count, limit) if now < until else count) - busy[machine]
        for lane in reversed(self.idle):  # the warmest first
            if trials.get(lane.machine, 0) > 0:
                return lane.machine, lane
        free = {
            machine: min(count, self.room[machine] - busy[machine] - idle[machine] - closing[machine])
            for machine, count in trials.items()
        }
        machine = max(free, key=lambda machine: free[machine], default=None)
        return (machine, None) if free and free[machine] > 0 else None
