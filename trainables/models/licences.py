"""Under what licence a backbone's pretrained weights may be used, as far as timm and torchvision say."""

from trainables.models.architecture import SQUEEZENETS
from trainables.models.classic import NETWORKS

UNKNOWN = "unknown"
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause"}
TORCHVISION = "bsd-3-clause"  # of the repository that SqueezeNet's weights are published with


def licence_of(name: str) -> str:
    """The licence of a backbone's pretrained weights, such as "apache-2.0", or UNKNOWN."""
    import timm

    if name in NETWORKS:
        return UNKNOWN
    if name in SQUEEZENETS:
        return TORCHVISION
    config = timm.get_pretrained_cfg(name)
    return UNKNOWN if config is None or not config.license else str(config.license).lower()


def is_restricted(name: str) -> bool:
    """Whether a backbone's weights are known to be under terms that are not permissive: no commercial use, or others
    of their own."""
    return licence_of(name) not in {*PERMISSIVE, UNKNOWN}


def source_of(name: str) -> str:
    """Where the weights were first published: the hub repository of timm, or torchvision."""
    import timm

    if name in SQUEEZENETS:
        return "torchvision"
    config = timm.get_pretrained_cfg(name)
    return f"https://huggingface.co/{config.hf_hub_id}" if config is not None and config.hf_hub_id else UNKNOWN
