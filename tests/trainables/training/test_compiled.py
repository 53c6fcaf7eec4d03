"""When torch.compile is used, and that it changes nothing but the time. On a CPU here, on a GPU in tests/gpu."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from trainables.models.classic import build_classic
from trainables.training import compiled as module
from trainables.training.compiled import Compiling, compiled

CPU, SHAPE = torch.device("cpu"), (4, 3, 16, 16)


def small() -> nn.Module:
    torch.manual_seed(0)
    return build_classic("speednet", 3, 0.125, 0.0, 0.0)


def test_a_short_training_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch, "compile", lambda *_, **__: pytest.fail("it was"))
    assert compiled(small(), "speednet", SHAPE, 20, CPU, "fp32", tmp_path) is None
    assert not list(tmp_path.rglob("*.json"))  # so a long one is measured


def test_steps_must_win_back_what_compiling_takes() -> None:
    known = Compiling("default", compile_s=60.0, plain_step_s=0.010, step_s=0.007)
    assert not known.pays(19_000)
    assert known.pays(21_000)
    assert not Compiling("default", 0.0, 0.010, math.inf).pays(10**9)


def test_what_cannot_be_compiled_trains_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(module.torch, "compile", fail)
    assert compiled(small(), "speednet", SHAPE, 10**6, CPU, "fp32", tmp_path) is None
    (memory,) = tmp_path.rglob("*.json")
    assert [row["step_s"] for row in json.loads(memory.read_text())] == [math.inf, math.inf]
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("measured again"))
    assert compiled(small(), "speednet", SHAPE, 10**6, CPU, "fp32", tmp_path) is None


@pytest.mark.slow
def test_a_compiled_network_computes_the_same(tmp_path: Path) -> None:
    model, plain = small(), small()
    model.load_state_dict(plain.state_dict())
    faster = compiled(model, "speednet", SHAPE, 10**8, CPU, "fp32", tmp_path)
    assert faster is not None
    for name, tensor in plain.state_dict().items():  # measuring moved nothing
        assert torch.equal(model.state_dict()[name], tensor)
    for images in (4, 3):  # batches of an epoch differ by one image
        x = torch.randn(images, *SHAPE[1:])
        ours, theirs = faster(x), plain(x)
        assert torch.allclose(ours, theirs, atol=1e-4)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None
            assert torch.allclose(one.grad, other.grad, rtol=1e-2, atol=1e-3), name
