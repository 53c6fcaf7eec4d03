"""What training costs on this sweep's devices: as measured on its own trials, else by counted operations."""

import math
import statistics

from search.config import Cost
from trainables.run_directory import Candidate

# How much faster operations run when features are computed than in a training step: nothing is kept for a backward
# pass, and BatchNorms are folded away. Measured with tf_efficientnet_lite0 on two cores: 1.5.
FORWARD_GAIN = 1.5
BACKWARD = 3  # a training step does three times the operations of its forward pass


class Costs:
    """Learns from candidates how long trials take.

    Args:
        native, gflops: by backbone, its pretrained side in pixels and its operations per image (1e9) at that side.
        rate: operations per second (1e9) of a lane in training, to begin with.
        images, train_images: how many are labelled, and how many are trained on.
        trainings: networks that are trained for one candidate.
    """

    def __init__(
        self, native: dict[str, int], gflops: dict[str, float], rate: float, images: int, train_images: int,
        trainings: int = 1,
    ) -> None:  # fmt: skip
        self.native, self.gflops, self.images, self.train_images = native, gflops, images, train_images
        self.rate, self.trainings = rate, trainings
        self.forward_rates: dict[str, list[float]] = {}  # by backbone, as measured
        self.training_rates: dict[str, list[float]] = {}

    def of(self, backbone: str) -> Cost:
        """As measured with this backbone, else with the others, else by the rate to begin with."""
        work = self.gflops[backbone]
        training = _middle(self.training_rates, backbone) or self.rate
        forward = _middle(self.forward_rates, backbone) or FORWARD_GAIN * training
        return Cost(self.native[backbone], work / forward, BACKWARD * work / training)

    def forget(self) -> None:
        """What candidates took: other devices train from now on."""
        self.forward_rates, self.training_rates = {}, {}

    def table(self) -> dict[str, Cost]:
        return {backbone: self.of(backbone) for backbone in self.gflops}

    def learn(self, candidate: Candidate) -> None:
        config, curve = candidate.info.config, candidate.info.curve
        if config is None or not config.pretrained or config.backbone not in self.gflops:
            return
        work = self.gflops[config.backbone] * (config.image_size / self.native[config.backbone]) ** 2
        if config.is_probe and curve and curve[-1]["seconds"] > 0:
            rate = 2 * self.images * work / curve[-1]["seconds"]
            known = self.forward_rates.setdefault(config.backbone, [])
            if not known or rate < 10 * known[0]:  # features that were stored already cost next to nothing
                known.append(rate)
        first = max(config.freeze_epochs, whole_epochs_elsewhere(candidate))
        speeds = [row["images_per_second"] for row in curve if row["epoch"] > first]
        if config.epochs and speeds:
            rate = BACKWARD * work * statistics.median(speeds)
            self.training_rates.setdefault(config.backbone, []).append(rate)


def whole_epochs_elsewhere(candidate: Candidate) -> int:
    """How many of a candidate's first epochs ended before it was last taken up, maybe by a lane of another kind."""
    resumed = candidate.info.resumed_after_epochs
    return math.ceil(resumed[-1]) if resumed else 0


def _middle(rates: dict[str, list[float]], backbone: str) -> float | None:
    """The median of a backbone's rates, else of all others'."""
    known = rates.get(backbone) or [rate for own in rates.values() for rate in own]
    return statistics.median(known) if known else None
