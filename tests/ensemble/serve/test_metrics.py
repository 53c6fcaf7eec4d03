"""ensemble.serve.metrics: what a real server counts, and says about drift."""

import json
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.server import Server, encoded

Labels = tuple[str, ...]


def read_metrics(server: Server) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, in the order of their names."""
    status, body, headers = server.ask("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_everything_is_counted(wary: Server, pictures: Path, picture: Image.Image) -> None:
    before = read_metrics(wary)
    assert before["ninefold_images_refused_total", "415"] == 0
    contents = [path.read_bytes() for path in sorted((pictures / "test").glob("*/*.png"))[::8]]
    told = [wary.post(content)[1] for content in contents]
    told += wary.post_batch([*contents, b"text"])[1]["answers"][:-1]
    assert wary.post(b"text")[0] == 415
    assert wary.post(bytes(3 * 2**20))[0] == 413
    assert wary.ask("GET", "/health", Host="evil.example")[0] == 421
    assert wary.ask("GET", "/made/up")[0] == 404
    assert wary.ask_page(0, wary.upload(encoded(picture, "PNG")))["success"]
    after = read_metrics(wary)

    def more(name: str, *labels: str) -> float:
        return after[(name, *labels)] - before.get((name, *labels), 0)

    unsure = sum(answer["unsure"] for answer in told)
    assert len(told) == 2 * len(contents) == 24
    assert 0 < unsure < len(told)
    assert more("ninefold_images_answered_total") == len(told) + 1, "the page's, too"
    assert more("ninefold_images_unsure_total") - unsure in (0, 1), "the page's may be"
    assert more("ninefold_images_refused_total", "415") == 2
    assert more("ninefold_images_refused_total", "503") == 0
    assert more("ninefold_batch_images_sum") == len(told) + 1
    assert 12 + 1 < more("ninefold_batch_images_count") <= len(told) + 1
    for route, status, number in (
        ("/predict", "200", 12), ("/predict", "415", 1), ("/predict", "413", 1), ("/predict/batch", "200", 1),
        ("/health", "421", 1), ("page", "404", 1), ("/metrics", "200", 1),
    ):  # fmt: skip
        assert more("ninefold_requests_total", route, status) == number
    assert more("ninefold_request_seconds_count", "/predict") == 14
    assert more("ninefold_request_seconds_bucket", "+Inf", "/predict") == 14
    assert more("ninefold_request_seconds_sum", "/predict") > 0
    assert ("ninefold_request_seconds_count", "page") not in after, "streams of the page stay open"
    assert not any("/made/up" in labels for labels in after)


def test_other_pictures_are_noticed(wary: Server, pictures: Path) -> None:
    kinds = [[path.read_bytes() for path in sorted((pictures / "test" / kind).glob("*.png"))] for kind in
             ("across", "down", "grid")]  # fmt: skip
    status, body, _ = wary.ask("GET", "/drift")
    assert status == 200
    select = json.loads(body)["select"]
    assert select["images"] == 360
    while (left := 1000 - read_metrics(wary)["ninefold_drift_images",]) > 0:
        told = wary.post_batch(kinds[2][: min(30, int(left))])[1]["answers"]
    assert wary.process.stdout is not None
    line = wary.process.stdout.readline()
    assert line.startswith("drift: the last 1,000 answers differ from those to the select split: ")
    assert "most often grid" in line

    drift = json.loads(wary.ask("GET", "/drift")[1])
    assert drift["answers"]["images"] == drift["window"] == 1000
    assert drift["select"] == select
    assert drift["tests"]["classes"]["clear"]
    assert drift["answers"]["classes"]["grid"] > 0.8
    assert told[-1]["label"] == "grid"
    metrics = read_metrics(wary)
    for of in ("answers", "select"):
        assert metrics["ninefold_confidence", of] == pytest.approx(drift[of]["confidence"], abs=1e-5)
        for name, share in drift[of]["classes"].items():
            assert metrics["ninefold_class_share", name, of] == pytest.approx(share, abs=1e-5)
    for test, found in drift["tests"].items():
        assert metrics["ninefold_drift_p", test] == pytest.approx(found["p"])


def test_an_ensemble_that_does_not_know_its_risk_counts_none_unsure(server: Server, picture: Image.Image) -> None:
    assert "unsure" not in server.post(encoded(picture, "PNG"))[1]
    metrics = read_metrics(server)
    assert metrics["ninefold_images_answered_total",] == 1
    assert ("ninefold_images_unsure_total",) not in metrics
