"""Which machine gets the next lane, without Ray."""

import pytest

from cluster import pool as module
from cluster.lane import LaneSpec
from cluster.pool import LanePool, Places
from tests.errand import PaperLane


class Machines:
    """Some that hold lanes, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **lanes: int) -> None:
        self.lanes: dict[str | None, int] = {**lanes}
        self.now, self.spec = 100.0, LaneSpec()
        self.started: list[PaperLane] = []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def places(self) -> Places:
        return dict(self.lanes)

    def start(self, spec: LaneSpec, machine: str | None) -> PaperLane:
        self.started.append(PaperLane(spec, machine))
        return self.started[-1]

    def pool(self, notice_s: float = 30.0) -> LanePool:
        pool = LanePool(self.start, lambda: self.spec, self.places, notice_s)  # type: ignore[arg-type]
        pool.look()
        return pool


def take_all(pool: LanePool) -> list:
    lanes = []
    while pool.has_room():
        lanes.append(pool.take())
    return lanes


def test_lanes_fill_the_machines_and_are_lent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(monkeypatch, a=1, b=2, c=0)
    pool = machines.pool()
    lanes = take_all(pool)
    assert sorted(lane.machine for lane in lanes) == ["a", "b", "b"]
    with pytest.raises(LookupError):
        pool.take()
    pool.give_back(lanes[1])
    assert pool.take() is lanes[1]
    machines.lanes["c"] = 1
    pool.look()
    assert pool.take().machine == "c"
    assert len(machines.started) == 4


def test_a_machine_that_lost_a_lane_gets_no_new_one_before_it_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: each loss closed all machines for half a minute, and each new one for another."""
    machines = Machines(monkeypatch, a=2, b=2)
    pool = machines.pool()
    lanes = take_all(pool)
    on_a, on_b = [[lane for lane in lanes if lane.machine == name] for name in "ab"]
    assert pool.lose(on_a[0])
    pool.give_back(on_b[0])
    assert pool.take() is on_b[0]  # the other machine goes on
    assert not pool.has_room()
    pool.give_back(on_a[1])
    assert pool.take() is on_a[1]  # this lane is there
    assert not pool.lose(on_a[1])  # the same machine's loss
    pool.look()
    assert not pool.has_room()
    machines.now += 31
    assert [lane.machine for lane in take_all(pool)] == ["a", "a"]


def test_lanes_of_a_machine_that_left_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(monkeypatch, a=1, b=1)
    pool = machines.pool()
    idle, busy = take_all(pool)
    pool.give_back(idle)
    machines.lanes = {"c": 1}
    pool.look()
    assert idle.killed  # type: ignore[attr-defined]
    assert busy.killed  # type: ignore[attr-defined]  # whoever waits for it hears of that
    assert pool.take().machine == "c"
    assert not pool.has_room()


def test_idle_lanes_end_where_trials_no_longer_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with GPUs has joined: those without get no more trials, and what runs there comes to its end."""
    machines = Machines(monkeypatch, cpus=2)
    pool = machines.pool()
    busy, idle = take_all(pool)
    pool.give_back(idle)
    machines.lanes = {"cpus": 0, "gpus": 1}
    pool.look()
    assert pool.take().machine == "gpus"
    assert not pool.has_room()
    assert pool.idle == []
    assert not busy.killed  # type: ignore[attr-defined]


def test_a_spread_lane_keeps_its_trial_when_a_machine_joins_that_holds_whole_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machines = Machines(monkeypatch)
    machines.lanes = {None: 2}
    pool = machines.pool()
    busy, idle = take_all(pool)
    pool.give_back(idle)
    machines.lanes = {"big": 1}
    idle.is_closed = lambda wait_s=0.0: False
    pool.look()
    assert not busy.killed  # type: ignore[attr-defined]
    assert pool.closing == [idle]
    pool.give_back(busy)
    pool.look()
    assert pool.closing == [idle, busy]
    assert pool.take().machine == "big"


def test_lanes_of_another_size_and_lanes_that_have_ended_are_not_lent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(monkeypatch)
    machines.lanes = {None: 2}  # spread over CPU machines, and now over machines with GPUs
    pool = machines.pool()
    old, ended = take_all(pool)
    pool.give_back(ended)
    ended.has_ended = True  # type: ignore[misc]
    pool.look()
    pool.look()
    assert pool.idle == []
    pool.give_back(pool.take())
    machines.spec = LaneSpec(workers=2, gpus=1)
    pool.look()
    pool.look()
    assert pool.take().spec == machines.spec
    pool.give_back(old)
    pool.look()
    assert [lane.spec for lane in pool.idle] == []


def test_machines_that_go_together_are_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(monkeypatch, a=1, b=1, c=1)
    pool = machines.pool()
    lanes = take_all(pool)
    assert [pool.lose(lane) for lane in lanes] == [True, False, False]
    machines.now += 31
    pool.look()
    assert pool.lose(pool.take())


def test_a_lane_that_its_trial_has_broken_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: after a trial that hung, or ran out of memory on one rank, the machine stood idle for half a minute."""
    pool = Machines(monkeypatch, a=1).pool()
    lane = pool.take()
    pool.give_up(lane)
    pool.look()
    assert pool.take() is not lane


def test_the_room_of_a_lost_lane_is_free_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(monkeypatch, a=1)
    pool = machines.pool(notice_s=0.0)
    lane = pool.take()
    closed = False
    lane.is_closed = lambda wait_s=0.0: closed  # type: ignore[method-assign]
    pool.lose(lane)
    pool.look()
    assert not pool.has_room()
    closed = True
    pool.look()
    assert pool.take() is not lane
