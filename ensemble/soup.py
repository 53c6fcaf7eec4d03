"""Weight soups: members merged into one network, at one network's cost.

    python -m ensemble.soup

takes the newest run and, for every architecture, averages the weights of its candidates greedily: from the best on,
each is stirred in and kept only if the tune log-loss strictly improves. A soup that improved is written as a candidate
of its own, so that `ensemble.select` weighs it like any other. The tune split decides; the select split stays unseen.

Soups work among networks that were fine-tuned from the same pretrained weights. Those that started from different
random weights do not meet in one valley, so they are not tried.

Source: Wortsman et al. 2022, "Model soups", recipe 1 (greedy soup). BatchNorm statistics are measured anew on train
images (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima"): those of an average are not the average's,
unless training has left them alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import tyro
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from upath import UPath

from trainables.data.dataset import Data
from trainables.data.share import open_run_data
from trainables.data.splits import Splits
from trainables.errors import UserError, exit_on_user_error
from trainables.inference import pick_device, predict_probs, scores
from trainables.models.backbones import takes_image_size
from trainables.models.weights import load_model, load_weights
from trainables.run_directory import Candidate, list_candidates, open_run, write_candidate
from trainables.training.augment import Pixels

State = dict[str, Tensor]
INGREDIENTS = 12  # best candidates of an architecture that are tried; each costs a pass over train samples and tune
BATCHNORM_IMAGES = 4096
BATCHNORM_BATCH = 128


def average(states: Sequence[State]) -> State:
    """The mean of networks' weights: state dicts with the same names, shapes and types. Inputs stay as they are.

    Floating-point tensors are averaged in float64 and come back in their own type; counters are the first one's.
    Raises ValueError when the networks differ.
    """
    first = states[0]
    for other in states[1:]:
        if other.keys() != first.keys() or any(other[name].shape != first[name].shape for name in first):
            raise ValueError("only networks with the same weights, name by name and shape by shape, can be averaged")
    mixed = {}
    for name, tensor in first.items():
        if tensor.dtype.is_floating_point:
            total = sum((state[name].double() for state in states), torch.zeros_like(tensor, dtype=torch.float64))
            mixed[name] = (total / len(states)).to(tensor.dtype)
        else:
            mixed[name] = tensor.clone()
    return mixed


def greedy_soup(states: Sequence[State], loss: Callable[[State], float]) -> tuple[list[int], float]:
    """Which of these networks to average, as indices, and the loss of their average.

    states: the best first. loss: of one network, lower is better. Each is added to those already in, and stays when
    that strictly improves the loss: a tie adds cost and nothing else.
    """
    chosen, best = [0], loss(states[0])
    for i in range(1, len(states)):
        tried = loss(average([states[j] for j in [*chosen, i]]))
        if tried < best:
            chosen, best = [*chosen, i], tried
    return chosen, best


@torch.no_grad()
def measure_batchnorm(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set the running statistics of every BatchNorm to the means over these normalised inputs (N, 3, S, S).

    The rest of the model works as in evaluation, without dropout. Nothing happens without a BatchNorm.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@dataclass(frozen=True)
class Soup:
    """What one architecture's candidates made: `members` are ids, best first; one alone means that nothing helped."""

    backbone: str
    members: tuple[str, ...]
    tune_log_loss: float
    best_single_log_loss: float
    candidate: str = ""


def cook(run: UPath, candidates: list[Candidate], data: Data, splits: Splits, device: torch.device) -> Soup:
    """The greedy soup of candidates that share architecture and pretrained weights; written to the run if it is one.

    Its images have the size of the best one's. Raises UserError when a candidate's weights are damaged or do not fit.
    """
    ranked = sorted(candidates, key=lambda c: (_tune_log_loss(c), c.id))[:INGREDIENTS]
    best = ranked[0]
    model = load_model(best, device)
    config = best.info.config
    assert config is not None  # load_model has refused it
    assert best.info.mean is not None
    assert best.info.std is not None
    size = best.info.image_size or config.image_size  # progressive sizes may have been cut short
    pixels = Pixels.of(best.info.mean, best.info.std, device)
    precision = best.info.precision if device.type == "cuda" else "fp32"
    sample = np.random.default_rng(0).permutation(splits.train)[:BATCHNORM_IMAGES]
    batches = [
        pixels(torch.from_numpy(data.images[np.sort(part)]).to(device), size)
        for part in np.array_split(sample, max(1, len(sample) // BATCHNORM_BATCH))
    ]
    labels = data.labels

    def predict(split: np.ndarray) -> np.ndarray:
        return predict_probs(model, data.images, split, pixels, size, config.tta, precision)

    def loss(state: State) -> float:
        model.load_state_dict(state)
        if state is not states[0] and not config.frozen_norm:  # a candidate's own statistics are right as they are
            measure_batchnorm(model, batches)
        return float(scores(predict(splits.tune), labels[splits.tune], "tune")["tune_log_loss"])

    states = [load_weights(c, before=True) for c in ranked]
    single = loss(states[0])
    chosen, mixed_loss = greedy_soup(states, loss)
    members = tuple(ranked[i].id for i in chosen)
    if len(chosen) == 1:
        return Soup(config.backbone, members, single, single)

    loss(average([states[i] for i in chosen]))  # leaves the model as the soup
    probs = {split: predict(getattr(splits, split)) for split in ("tune", "select")}
    metrics: dict[str, float] = {}
    for split, predicted in probs.items():
        metrics |= scores(predicted, labels[getattr(splits, split)], split)
    stem = [config.stem] if config.stem != "default" else []
    sizes = [str(config.image_size)] if takes_image_size(config.backbone) else []
    id = "-".join(["soup", config.backbone, *stem, *sizes])  # a run may have one of each kitchen
    info = replace(best.info, id=id, soup=members, refitted=False, metrics=metrics, curve=(), finished=time.time())
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_candidate(run, info, probs["select"], probs["tune"], save_safetensors(state))
    return Soup(config.backbone, members, mixed_loss, single, id)


def kitchens(candidates: list[Candidate]) -> list[list[Candidate]]:
    """The candidates that may be averaged with each other, from groups of two on: one pretrained architecture each.

    Soups themselves are no ingredients, and neither is what has no weights or no tune score.
    """
    groups: dict[tuple, list[Candidate]] = {}
    for candidate in candidates:
        config = candidate.info.config
        usable = candidate.has_weights and "tune_log_loss" in candidate.info.metrics
        unseen = not candidate.info.refitted or candidate.has_weights_before  # by the weights that can be averaged
        if usable and unseen and not candidate.info.soup and config is not None and config.pretrained:
            # position embeddings are as many as the patches of an image
            size = config.image_size if takes_image_size(config.backbone) else None
            key = (config.backbone, config.stem, config.width, size, config.frozen_norm)
            groups.setdefault(key, []).append(candidate)
    return [group for _, group in sorted(groups.items(), key=lambda item: str(item[0])) if len(group) > 1]


def _tune_log_loss(candidate: Candidate) -> float:
    return candidate.info.metrics["tune_log_loss"]


@dataclass(frozen=True)
class Cook:
    """Merge the weights of each architecture's candidates where that makes one better network of them."""

    run: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Run directory; default: the newest under runs/."""
    device: str | None = None
    """cuda, mps or cpu; default: the first that there is."""


def main() -> None:
    with exit_on_user_error():
        args = tyro.cli(Cook, description=Cook.__doc__, prog="python -m ensemble.soup")
        run = open_run(args.run)
        groups = kitchens(list_candidates(run))
        if not groups:
            raise UserError(
                f"{run} has no two pretrained candidates of one architecture with weights; nothing to merge"
            )
        data, splits = open_run_data(run)
        for group in groups:
            soup = cook(run, group, data, splits, pick_device(args.device))
            told = f"{soup.backbone}: best single tune log-loss {soup.best_single_log_loss:.4f}"
            if soup.candidate:
                print(f"{told}, soup of {len(soup.members)} {soup.tune_log_loss:.4f}, written as {soup.candidate}")
            else:
                print(f"{told}; no soup of its {len(group)} candidates is better")


if __name__ == "__main__":
    main()
