"""What a server counts for Prometheus: requests, latency, batches of the network, answers, and how they drift.

All of it is counted in the process that fronts the requests, so with replicas of Ray Serve, too, the numbers are of the
whole server; what only a replica knows comes along with its answer.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from ensemble.serve.answer import BATCH_SIZE, LARGEST_BATCH
from ensemble.serve.drift import MOST_CLASSES, Drift
from ensemble.serve.page import Answer

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # upper ends of the latency's buckets
REFUSED = (415, 503)  # statuses of pictures that are not answered


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, drift: Drift, has_risk: bool) -> None:
        """has_risk: whether the ensemble says when it is unsure; without that there is no counter of it."""
        self.drift = drift
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "ninefold", "registry": self.registry}
        self.requests = Counter("requests", "Requests by route and status.", ["route", "status"], **own)
        self.seconds = Histogram(
            "request_seconds", "From a request's head to the end of its answer.", ["route"], buckets=SECONDS, **own
        )
        sizes = [2**n for n in range(LARGEST_BATCH.bit_length())]
        self.batches = Histogram("batch_images", "Images that the network took at a time.", buckets=sizes, **own)
        self.answered = Counter("images_answered", "Pictures that were answered.", **own)
        self.unsure = Counter("images_unsure", "Answers that were unsure.", **own) if has_risk else None
        self.refused = Counter("images_refused", "Pictures that arrived and were refused.", ["status"], **own)
        for status in REFUSED:  # from the start on, or the first of each would be no increase
            self.refused.labels(status)
        self.registry.register(_DriftGauges(drift))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def note_request(self, route: str, status: str, seconds: float | None) -> None:
        """Count a request. seconds: that it took, None where that means nothing. Routes and statuses have to be few."""
        self.requests.labels(route, status).inc()
        if seconds is not None:
            self.seconds.labels(route).observe(seconds)

    def counted(self, answer: Answer) -> Answer:
        """The same answers, which are counted, as they come, and looked at for drift."""

        async def answer_and_count(content: bytes) -> dict[str, Any]:
            result = await answer(content)
            if (size := result.pop(BATCH_SIZE, None)) is not None:
                self.batches.observe(size)
            if "error" in result:
                self.refused.labels(result["status"]).inc()
                return result
            self.answered.inc()
            if self.unsure is not None and result["unsure"]:
                self.unsure.inc()
            if (line := self.drift.add(result["label"], result["probability"])) is not None:
                with contextlib.suppress(OSError):  # nobody reads the log any longer
                    print(line, flush=True)
            return result

        return answer_and_count


class _DriftGauges:
    """The drift as it is when Prometheus asks."""

    def __init__(self, drift: Drift) -> None:
        self._drift = drift

    def collect(self) -> Iterable[Metric]:
        drift = self._drift
        yield GaugeMetricFamily("ninefold_drift_images", "Last answers that are compared.", value=len(drift))
        confidence = GaugeMetricFamily("ninefold_confidence", "Mean confidence of answers.", labels=["of"])
        if len(drift):
            confidence.add_metric(["answers"], float(drift.confidence().mean()))
        if drift.reference is not None:
            confidence.add_metric(["select"], float(drift.reference.confidence.mean()))
        yield confidence
        if (
            len(drift.classes) <= MOST_CLASSES
        ):  # a series for each, which Prometheus keeps; /drift names those that matter
            shares = GaugeMetricFamily(
                "ninefold_class_share", "Shares of classes among answers.", labels=["of", "label"]
            )
            for of, values in drift.shares().items():
                for name, value in values.items():
                    shares.add_metric([of, name], value)
            yield shares
        p = GaugeMetricFamily("ninefold_drift_p", "p-value of a difference from the select split.", labels=["test"])
        for test, difference in drift.differences().items():
            if difference is not None:
                p.add_metric([test], difference.p)
        yield p
