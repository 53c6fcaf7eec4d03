"""ensemble.serve for minutes: a long siege, many parallel requests, replicas of Ray Serve."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from upath import UPath

from tests.contract import check_contract
from tests.ensemble.serve.conftest import picture, run, server, wary, wary_run  # noqa: F401
from tests.ensemble.serve.test_metrics import read_metrics
from tests.ensemble.serve.test_siege import besiege, check_siege
from tests.server import Server, bomb, encoded


def test_a_siege_of_a_minute(run: UPath, picture: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the limits that a user gets: memory stays below 2 GiB and every honest request is answered."""
    with Server(run, tmp_path_factory.mktemp("temporary")) as server:
        siege = besiege(server, 60, picture)
        check_siege(siege)
        assert siege.peak < 2 * 2**30
        assert server.post(encoded(picture, "PNG"))[0] == 200
        assert server.stop() == "", "nothing went wrong unseen"


def test_fifty_parallel_requests_for_a_minute(server: Server, picture: Image.Image) -> None:
    """Good pictures, bad ones and bombs mixed; every request is answered, and memory does not grow with them."""
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8))
    contents = [
        (encoded(picture, "PNG"), 200),
        (encoded(large, "JPEG"), 200),
        (encoded(Image.new("1", (7000, 7000)), "PNG"), 200),  # 49 megapixels are still allowed
        (b"just some text", 415),
        (bomb(), 415),
        (bytes(3 * 2**20), 413),
    ]
    process = psutil.Process(server.process.pid)
    start = time.time()
    end = start + 60
    peaks = [0, 0]  # bytes, of either half of the minute

    def work(number: int) -> int:
        answered = 0
        while time.time() < end:
            content, expected = contents[(number + answered) % len(contents)]
            status, told = server.post(content)
            assert status == expected, told
            answered += 1
        return answered

    with ThreadPoolExecutor(50) as pool:
        working = [pool.submit(work, number) for number in range(50)]
        while time.time() < end:
            half = int(time.time() > start + 30)
            peaks[half] = max(peaks[half], process.memory_info().rss)
            time.sleep(0.2)
        answered = sum(future.result() for future in working)
    print(f"{answered} requests answered, peak memory {peaks[0] / 2**30:.2f} GiB, then {peaks[1] / 2**30:.2f} GiB")
    assert answered > 100
    assert max(peaks) < 2 * 2**30
    assert peaks[1] < 1.25 * peaks[0]
    assert server.post(contents[0][0])[0] == 200


def test_replicas_of_ray_serve_answer_alike(
    run: UPath, server: Server, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    replicated = Server(run, tmp_path_factory.mktemp("ray"), "--ray-serve", "--replicas", "2")
    family = psutil.Process(replicated.process.pid).children(recursive=True)
    paths = sorted((pictures / "test").glob("*/*.png"))[::3]
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = list(pool.map(lambda path: replicated.post(path.read_bytes()), paths))
    for (status, told), path in zip(answers, paths, strict=True):
        assert status == 200
        assert told["probs"] == pytest.approx(server.post(path.read_bytes())[1]["probs"], abs=1e-3)
    assert sum("ServeReplica" in " ".join(process.cmdline()) for process in family) == 2
    assert replicated.post(b"text")[0] == 415
    assert replicated.post(bomb())[0] == 415
    status, told = replicated.post_batch([path.read_bytes() for path in paths[:8]] + [b"text"])
    assert status == 200
    assert [answer["label"] for answer in told["answers"][:-1]] == [answer["label"] for _, answer in answers[:8]]
    metrics = read_metrics(replicated)
    assert metrics["ninefold_images_answered_total",] == len(paths) + 8, "of both replicas"
    assert metrics["ninefold_batch_images_sum",] == len(paths) + 8
    assert metrics["ninefold_images_refused_total", "415"] == 3
    assert metrics["ninefold_drift_images",] == len(paths) + 8
    replicated.stop()
    assert psutil.wait_procs(family, timeout=60)[1] == [], "Ray's processes have ended"


def test_schemathesis_finds_no_fault_in_2000_cases(wary: Server, tmp_path: Path) -> None:
    assert check_contract(wary, tmp_path, 1000) >= 2000
