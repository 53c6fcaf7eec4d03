"""Averages of the weights during training: an exponential moving average, and lookahead."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainables.config import TrialConfig


class WeightAverage:
    """Holds the slow weights of a model; does nothing when the config asks for neither average.

    EMA (`ema` > 0): slow weights follow the fast ones and are what is evaluated and kept. `ema` is the decay.
    Lookahead (`lookahead` = k > 0; Zhang et al., 2019): every k steps the fast weights are pulled to the slow ones,
    with a pull that grows over training as 0.95**k * progress**3 (Jordan, 2024, section 3.4).
    """

    def __init__(self, model: nn.Module, ema: float, lookahead: int) -> None:
        self.ema, self.lookahead, self.steps = ema, lookahead, 0
        self.slow = {k: v.detach().clone() for k, v in model.state_dict().items()} if ema or lookahead else {}
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None  # slow and fast, of what is averaged
        self._others: list[tuple[Tensor, Tensor]] = []  # and of what is only counted

    @classmethod
    def of(cls, model: nn.Module, config: TrialConfig, steps: int) -> "WeightAverage":
        """The averages that a configuration asks for, in a training of so many steps: config.ema is a share of it."""
        return cls(model, 1 - 1 / max(1.0, config.ema * steps) if config.ema else 0.0, config.lookahead)

    @property
    def active(self) -> bool:
        """Whether the weights to evaluate differ from the model's own."""
        return self.ema > 0

    @torch.no_grad()
    def update(self, model: nn.Module, progress: float) -> None:
        """Call after every optimiser step; `progress` runs from 0 to 1 over training."""
        if not self.slow:
            return
        self.steps += 1
        if self.ema:
            # a young average would otherwise remember the initial weights for 1 / (1 - ema) steps
            self._follow(model, min(self.ema, (1 + self.steps) / (10 + self.steps)))
        elif self.steps % self.lookahead == 0:
            self._follow(model, 0.95**self.lookahead * progress**3)
            for name, tensor in model.state_dict().items():
                tensor.copy_(self.slow[name])

    def _follow(self, model: nn.Module, decay: float) -> None:
        if self._pairs is None:  # a state_dict at every step would cost a GPU more than the average does
            pairs = [(self.slow[name], tensor) for name, tensor in model.state_dict().items()]
            averaged = [pair for pair in pairs if pair[0].dtype.is_floating_point]
            self._pairs = [slow for slow, _ in averaged], [fast for _, fast in averaged]
            self._others = [pair for pair in pairs if not pair[0].dtype.is_floating_point]
        torch._foreach_lerp_(*self._pairs, 1 - decay)
        for slow, fast in self._others:
            slow.copy_(fast)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Put the averaged weights into the model for good."""
        if self.active:
            for name, tensor in model.state_dict().items():
                tensor.copy_(self.slow[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in the model for the time of a `with`."""
        if not self.active:
            yield
            return
        fast = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.apply(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    tensor.copy_(fast[name])

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        return {"steps": self.steps, "slow": self.slow}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.steps = state["steps"]
        self.slow = {name: tensor.to(device) for name, tensor in state["slow"].items()}
        self._pairs = None
