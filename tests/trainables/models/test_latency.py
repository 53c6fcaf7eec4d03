"""Latencies are of what is served: every view, one figure for equal networks; and what selects takes them."""

from pathlib import Path

import pytest
import torch
from upath import UPath

from ensemble.pool import load_pool
from ensemble.select import Select, choose
from tests.ensemble.test_select import make_run
from trainables.config import TrialConfig
from trainables.models import latency
from trainables.models.latency import ROUNDS, describe_device, measure_latencies
from trainables.run.latencies import Latencies, Latency, read_latencies, write_latencies
from trainables.run_directory import Candidate, CandidateInfo


def candidate(id: str, backbone: str = "speednet", size: int = 32, **config: object) -> Candidate:
    made = TrialConfig(backbone=backbone, image_size=size, width=0.25, **config)  # type: ignore[arg-type]
    return Candidate(id, UPath("/nowhere"), CandidateInfo(id, made, num_classes=3))


def test_every_kind_is_measured_with_its_views_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: dict[str, int] = {}
    kinds: list[latency.Kind] = []
    real = latency._build

    def build(kind: latency.Kind, classes: int) -> torch.nn.Module:
        kinds.append(kind)
        net = real(kind, classes)
        net.register_forward_hook(lambda *_: passes.update({kind[4]: passes.get(kind[4], 0) + 1}))
        return net

    monkeypatch.setattr(latency, "_build", build)
    found = measure_latencies(
        [
            candidate("0"), candidate("1", lr=0.5, epochs=9), candidate("2", tta="mirror"),
            candidate("3", tta="mirror_shift"), Candidate("4", UPath("/nowhere"), CandidateInfo("4")),
            candidate("5", "network_of_another_tool"),
        ],
        (30, 20, 3), 3, "cpu",
    )  # fmt: skip
    assert len(kinds) == 3
    assert passes == {"none": ROUNDS + 1, "mirror": 2 * (ROUNDS + 1), "mirror_shift": 6 * (ROUNDS + 1)}
    assert sorted(found.candidates) == ["0", "1", "2", "3"]
    assert found.candidates["0"] == found.candidates["1"]
    for measured in found.candidates.values():
        assert 0 < measured.low <= measured.ms <= measured.high
    assert found.device.startswith(describe_device(torch.device("cpu")))
    assert "threads" in found.device


def test_what_was_measured_together_replaces_what_each_trial_took(tmp_path: Path) -> None:
    run, *_ = make_run(tmp_path / "run")
    assert load_pool([run]).device == ""
    slow_first = {f"c{m}": Latency(20.0 - m, 1.0, 30.0) for m in range(7)}  # of c7 there is none
    write_latencies(run, Latencies("a quiet machine", slow_first))
    assert read_latencies(run) == Latencies("a quiet machine", slow_first)
    pool = load_pool([run])
    assert pool.device == "a quiet machine"
    assert pool.numbers("latency_ms").tolist() == [20.0, 19.0, 18.0, 17.0, 16.0, 15.0, 14.0, 8.0]
    for budget, cheapest in ((8.5, {"c7"}), (14.5, {"c6", "c7"})):
        members = choose(Select(run=(str(run),), max_latency_ms=budget)).members
        assert {member.id for member in members} <= cheapest
    for damage in ("{", '{"candidates": {"c0": {"ms": "fast"}}}', "[]"):
        (tmp_path / "run" / "latencies.json").write_text(damage)
        assert load_pool([run]).device == ""


@pytest.mark.parametrize(("slowest", "said"), [(2.5, False), (4.0, True)])
def test_a_machine_that_was_not_quiet_is_told(monkeypatch: pytest.MonkeyPatch, slowest: float, said: bool) -> None:
    """A newcomer read 79, 146 and 1,311 ms for one network, without a word."""
    monkeypatch.setattr(latency, "_measure", lambda kinds, *_: [Latency(1.2, 1.0, slowest)] * len(kinds))
    found = measure_latencies([candidate("0"), candidate("1")], (12, 12, 3), 3, "cpu")
    assert found.device.endswith(", beside other work") is said
