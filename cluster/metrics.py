"""A sweep's figures among Ray's own metrics, for Prometheus and the dashboard in grafana.json.

Ray exports them, with the prefix `ray_`, at the metrics port of the node that the sweep runs on.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

GAUGES = {
    "ninefold_trials": "Trials of this process, by state: running, or how they ended",
    "ninefold_best_select_accuracy": "Best single candidate's accuracy on the select split, 0 to 1",
    "ninefold_ensemble_select_accuracy": "Accuracy of the ensemble so far on the select split, 0 to 1",
    "ninefold_images_per_second": "Training images a second, of all running trials together",
}


class SweepMetrics:
    """The gauges of one sweep; Ray must be connected."""

    def __init__(self, run: str) -> None:
        self.gauges = {name: Gauge(name, text, ("run", "state")) for name, text in GAUGES.items()}
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": run, "state": ""})

    def publish(self, trials: Mapping[str, int], **values: float | None) -> None:
        """Trials by state, and the other gauges by their names without `ninefold_`; None: not known yet."""
        for state, count in trials.items():
            self.gauges["ninefold_trials"].set(count, {"state": state})
        for name, value in values.items():
            if value is not None:
                self.gauges[f"ninefold_{name}"].set(value)
