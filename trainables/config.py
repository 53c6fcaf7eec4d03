"""TrialConfig: everything that makes one candidate, and nothing that belongs to the sweep.

Standard library only, so that a search space, a test or another tool can build one without importing torch.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from trainables.errors import UserError

Optimizer = Literal["sgd", "adamw", "muon"]
Schedule = Literal["cosine", "onecycle", "triangular", "constant", "plateau"]
Flip = Literal["none", "random", "alternating"]
TestTimeAugmentation = Literal["none", "mirror", "mirror_shift"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Stem = Literal["default", "small"]


@dataclass(frozen=True)
class TrialConfig:
    """The hyperparameters of one trial. Fractions are of 1, sizes in pixels, lengths in epochs unless said otherwise.

    A pretrained backbone starts from its probe: the head is first fitted exactly, on features of the frozen body
    (linear probing, then fine-tuning: Kumar et al., 2022). `freeze_epochs` train that head further, `epochs` the whole
    network. With neither the probe itself is the candidate, and its head is fitted once more on all labelled images.

    Attributes:
        backbone: a timm model name, squeezenet1_0/1_1 of torchvision, or one of trainables.models.classic.
        pretrained: start from pretrained weights (a source must exist) or from a random initialisation.
        image_size: side to which images are resized on the device.
        progressive: image sizes over the epochs, spread evenly; the last should be image_size. Empty: image_size.
        stem: "small" keeps the resolution of a ResNet- or DenseNet-like stem, for inputs of 32 pixels.
        width: width multiplier of the from-scratch networks of trainables.models.classic.
        epochs: passes over the train split in which the whole network learns.
        frozen_norm: while the whole network learns, BatchNorms keep the statistics that they were pretrained with:
            those of a few batches of random crops are worse. Their factors and offsets learn.
        refit: epochs over all labelled images after the held-out ones were predicted, as a share of `epochs`; see
            trainables/all_images.py.
        freeze_epochs: passes before these in which only the head learns, on stored features where that is possible,
            with a schedule of their own.
        batch_size: effective batch, over all workers and accumulation steps. An epoch is cut into
            round(images / batch_size) batches of nearly equal size, so they may be a little smaller or larger.
        accumulate: micro-batches per optimiser step; an out-of-memory error doubles it.
        lr: peak learning rate of the head; the body's is lr * body_lr.
        body_lr: factor on lr for everything but the head.
        layer_decay: lr of a block is body_lr * layer_decay ** (blocks above it).
        weight_decay: decoupled (AdamW, Muon); for SGD, added to the gradient. Not on biases, norms and what else the
            network names, speednet's biases excepted.
        momentum: of SGD (Nesterov) and Muon.
        schedule: "cosine", "onecycle" (up for `warmup`, then cosine to 0), "triangular" (up for `warmup`, then linear
            to 0), "constant", "plateau" (halved when the tune log-loss has not improved for 2 epochs).
        warmup: fraction of all steps over which lr rises linearly; for "onecycle" and "triangular" the rising part.
        label_smoothing: 0 to 1.
        lora: rank of the adapters through which the body then learns, 1 to 1024 (see trainables/models/adapters.py): a
            fraction of the memory, for pretrained transformers and ConvNeXts. 0: its weights themselves learn.
        dropout: probability, 0 to 1.
        drop_path: probability of stochastic depth, 0 to 1; without effect on networks that have none: squeezenet, those
            of trainables.models.classic but vit_scratch, and a few families of timm.
        mixup, cutmix: Beta(a, a) parameter; 0 switches it off. With both, each batch takes one of them at random. They
            end after four fifths of the training, which then sees images as they are.
        flip: mirror "random"ly, or "alternating" (every image is mirrored every second epoch).
        crop: largest shift in pixels of the *stored* image, reflected at the border.
        scale: smallest share of an image's area that a random resized crop shows; 1 is off. Not with crop.
        jitter: brightness, contrast and saturation are changed by a factor of 1 - jitter to 1 + jitter.
        erase: probability that a random rectangle of an image is replaced by noise.
        trivial: one random operation of random strength on every image (TrivialAugment).
        randaugment: two random operations of this magnitude, 0 (off) to 10, on every image. Not with trivial.
        ema: horizon of a moving average of the weights, as a share of the training; the average is then what is
            evaluated and kept; 0 is off.
        lookahead: pull towards slow weights every that many steps, harder as training goes on; 0 is off. Not with ema.
        clip_norm: largest norm of the whole gradient; 0 is off.
        class_weights: weigh the loss by inverse class frequency.
        balanced: draw every class equally often.
        patience: stop after that many epochs without a better tune log-loss and keep the best epoch; 0 is off.
        tta: what predictions average over: nothing, the mirror image, or mirror and one-pixel shifts.
        precision: "auto" takes the fastest that is safe: on a CPU by measuring a few steps, on CUDA bf16 or else fp16.
        seed: of initialisation, order and augmentation.
    """

    backbone: str = "resnet18"
    pretrained: bool = False
    image_size: int = 32
    progressive: tuple[int, ...] = ()
    stem: Stem = "default"
    width: float = 1.0
    epochs: int = 5
    frozen_norm: bool = False
    refit: float = 0.0
    freeze_epochs: int = 0
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 1e-3
    body_lr: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    momentum: float = 0.9
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "onecycle"
    warmup: float = 0.2
    label_smoothing: float = 0.0
    lora: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    flip: Flip = "none"
    crop: int = 0
    scale: float = 1.0
    jitter: float = 0.0
    erase: float = 0.0
    trivial: bool = False
    randaugment: float = 0.0
    ema: float = 0.0
    lookahead: int = 0
    clip_norm: float = 0.0
    class_weights: bool = False
    balanced: bool = False
    patience: int = 0
    tta: TestTimeAugmentation = "none"
    precision: Precision = "auto"
    seed: int = field(default=0)

    @property
    def all_epochs(self) -> int:
        """Epochs of the head alone and of the whole network together: what a trial reports."""
        return self.freeze_epochs + self.epochs

    def is_same(self, other: "TrialConfig | None") -> bool:
        """Whether the same is trained: in how many micro-batches, memory decides."""
        return other is not None and replace(self, accumulate=1) == replace(other, accumulate=1)

    @property
    def is_probe(self) -> bool:
        """Whether nothing is trained but the head, which is fitted exactly."""
        return self.all_epochs == 0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise UserError(f"{name} is {value}, expected {low} to {high}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} is {value!r}, expected {', '.join(choices)}")
        for one, other in (("ema", "lookahead"), ("trivial", "randaugment")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"{one} and {other} are both on, expected at most one of them")
        if self.crop and self.scale < 1:
            raise UserError("crop and scale are both on, expected at most one of them")
        if self.is_probe and not self.pretrained:
            raise UserError("epochs and freeze_epochs are both 0, expected 1 or more without pretrained weights")
        if self.frozen_norm and not self.pretrained:
            raise UserError("frozen_norm is on, expected pretrained weights: there are no statistics to keep")
        if self.lora and not self.pretrained:
            raise UserError(f"lora is {self.lora}, expected 0 without pretrained weights: nothing would learn to see")
        if self.pretrained and self.optimizer == "muon":
            raise UserError("muon keeps weights at the norm of a random start and would rescale pretrained ones away")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrialConfig":
        """The inverse of `to_dict`; raises UserError on keys it does not know."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"unknown hyperparameter {', '.join(unknown)}; see trainables/config.py for the known ones")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(TrialConfig).items() if get_origin(hint) is Literal
}
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("image_size", 8, 1024),
    ("width", 0.05, 16),
    ("epochs", 0, 10_000),
    ("refit", 0.0, 1.0),
    ("freeze_epochs", 0, 10_000),
    ("batch_size", 1, 1_000_000),
    ("accumulate", 1, 65_536),
    ("lr", 1e-9, 100.0),
    ("body_lr", 0.0, 100.0),
    ("layer_decay", 0.01, 1.0),
    ("weight_decay", 0.0, 10.0),
    ("momentum", 0.0, 0.9999),
    ("warmup", 0.0, 1.0),
    ("label_smoothing", 0.0, 0.9),
    ("lora", 0, 1024),
    ("dropout", 0.0, 0.95),
    ("drop_path", 0.0, 0.95),
    ("mixup", 0.0, 10.0),
    ("cutmix", 0.0, 10.0),
    ("crop", 0, 1024),
    ("scale", 0.01, 1.0),
    ("jitter", 0.0, 0.9),
    ("erase", 0.0, 1.0),
    ("randaugment", 0.0, 10.0),
    ("ema", 0.0, 1.0),
    ("lookahead", 0, 1000),
    ("clip_norm", 0.0, 1e6),
    ("patience", 0, 10_000),
)
