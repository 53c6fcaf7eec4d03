"""When torch.compile is used, and that it changes nothing but the time. On a CPU here, on a GPU in tests/gpu."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainables.models.classic import build_classic
from trainables.training import compiled as module
from trainables.training.compiled import Careful, Compiling, Training, compiled

CPU = torch.device("cpu")
LONG = Training("speednet", (4, 3), 16, "fp32", accumulates=False, steps=10**8, seconds=math.inf)


def small() -> nn.Module:
    torch.manual_seed(0)
    return build_classic("speednet", 3, 0.125, 0.0, 0.0)


@pytest.mark.parametrize("short", [{"steps": 1000}, {"seconds": 200.0}])
def test_a_short_training_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: dict[str, Any]
) -> None:
    monkeypatch.setattr(module.torch, "compile", lambda *_, **__: pytest.fail("it was"))
    assert compiled(small(), replace(LONG, **short), CPU, tmp_path) is None
    assert not list(tmp_path.rglob("*.json"))  # so a long one is measured


def test_steps_must_win_back_what_compiling_takes() -> None:
    known = Compiling("default", compile_s=60.0, plain_step_s=0.010, step_s=0.007)
    assert known.saves(19_000) < 0 < known.saves(21_000)
    assert Compiling("default", 0.0, 0.010, None).saves(10**9) < 0


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nfound"), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_cannot_be_compiled_trains_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(model: nn.Module, **_: object) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            model(x)  # its statistics move
            raise error

        return forward

    monkeypatch.setattr(module.torch, "compile", fails)
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert compiled(model, LONG, CPU, tmp_path) is None
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(parameter.grad is None for parameter in model.parameters())
    (memory,) = tmp_path.rglob("*.json")
    assert [row["step_s"] for row in json.loads(memory.read_text())["modes"]] == [None, None]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_measure", lambda *_: pytest.fail("measured again"))
        assert compiled(model, LONG, CPU, tmp_path) is None
    memory.write_text("[1")  # damaged: it is
    assert compiled(model, LONG, CPU, tmp_path) is None
    assert len(json.loads(memory.read_text())["modes"]) == 2


def test_gradients_that_are_added_up_are_not_left_in_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be overwritten by the next micro-batch, as torch says with an error."""
    modes: list[str] = []
    monkeypatch.setattr(module, "_measure", lambda model, mode, *_: modes.append(mode) or Compiling(mode, 0, 1, 2))
    compiled(small(), replace(LONG, accumulates=True), CPU, tmp_path)
    assert modes == ["default"]


def test_an_error_of_the_compiler_costs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module, **_: object) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if len(x) == 3:
                raise RuntimeError("this size cannot be compiled")
            return model(x)

        return forward

    monkeypatch.setattr(module.torch, "compile", fails)
    model = small().eval()
    careful = Careful(model, "default")
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(careful(x), model(x))
    assert torch.equal(careful(x[:3]), model(x[:3]))
    assert not careful.fast
    assert not list(careful.parameters())


@pytest.mark.slow
def test_a_compiled_network_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiling, "saves", lambda known, steps: 1.0 if known.step_s else -1.0)  # whatever it takes
    model, plain = small(), small()
    model.load_state_dict(plain.state_dict())
    faster = compiled(model, LONG, CPU, tmp_path)
    assert isinstance(faster, Careful)
    for name, tensor in plain.state_dict().items():  # measuring moved nothing
        assert torch.equal(model.state_dict()[name], tensor)
    for images in LONG.sizes:  # batches of an epoch differ by one image
        x = torch.randn(images, 3, 16, 16)
        ours, theirs = faster(x), plain(x)
        assert torch.allclose(ours, theirs, atol=1e-4)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    assert faster.fast
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None
            assert torch.allclose(one.grad, other.grad, rtol=1e-2, atol=1e-3), name
