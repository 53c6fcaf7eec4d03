"""ensemble.serve under attack: honest clients are answered, and memory stays bounded."""

import contextlib
import dataclasses
import functools
import http.client
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
from PIL import Image

from tests.server import Server, bomb, encoded, head, lying_tiff, many_scans, read_all


@dataclasses.dataclass
class Siege:
    """What attackers and honest clients together did to a server."""

    seconds: list[float] = dataclasses.field(default_factory=list)  # that each honest request took
    failures: list[Any] = dataclasses.field(default_factory=list)  # of honest requests
    attacks: Counter[str] = dataclasses.field(default_factory=Counter)  # by kind, and by the status of the answer
    before: int = 0  # bytes of memory of the process
    peak: int = 0


def besiege(server: Server, seconds: float, picture: Image.Image) -> Siege:
    """25 clients send pictures, 25 others attack in every way known."""
    siege = Siege()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (1500, 1500, 3), np.uint8))
    pictures = [encoded(picture, "PNG"), encoded(noise.resize((600, 600)), "JPEG"), encoded(noise, "JPEG")]
    colours = Image.fromarray(rng.integers(0, 256, (175, 175, 4), np.uint8)).resize((7000, 7000), Image.Resampling.BOX)
    largest = [  # 49 megapixels are allowed, and take the most memory in these formats
        encoded(Image.new("1", (7000, 7000)), "PNG"),
        encoded(colours, "PNG", compress_level=1),
        encoded(Image.new("RGBA", (7000, 7000)), "WEBP", lossless=True, method=0, quality=0),  # in 46 bytes
    ]
    bombs = [bomb(), lying_tiff(10_000), encoded(picture, "JPEG2000"), many_scans(picture)]
    end = time.time() + seconds

    def pause_until_over() -> bool:
        time.sleep(0.1)
        return time.time() < end

    def be_honest(number: int) -> None:
        start = time.time()
        try:
            status, answer = server.post(pictures[number % len(pictures)])
        except (OSError, ValueError) as error:
            status, answer = 0, {"error": repr(error)}
        siege.seconds.append(time.time() - start)
        if status != 200:
            siege.failures.append((status, answer))

    def post(content: bytes, **headers: str) -> None:
        siege.attacks[f"status {server.post(content, **headers)[0]}"] += 1

    def send_largest(number: int) -> None:
        post(largest[number % len(largest)])

    def send_batches(number: int) -> None:
        siege.attacks[f"status {server.post_batch([largest[2]] * 3 + bombs * 7)[0]}"] += 1

    def send_bombs(number: int) -> None:
        post(bombs[number % len(bombs)])

    def send_much(number: int) -> None:
        post(bytes(20 * 2**20))

    def rebind(number: int) -> None:
        post(pictures[0], Host="evil.example")

    def trickle(number: int) -> None:
        with server.connect() as connection:
            connection.sendall(head("/predict", f"Content-Length: {20 * 2**20}") + bytes(2**19 * (number % 3)))
            while pause_until_over():
                connection.sendall(b"x")

    def send_half_heads(number: int) -> None:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(server.connect(timeout=3)) for _ in range(20)]
            for connection in connections:
                connection.sendall(b"POST /predict HTTP/1.1\r\nX: ")
            read_all(connections[0])

    def lie_about_length(number: int) -> None:
        length, content = ((10**11, b""), (10, bytes(2**20)), (1000, b"half"))[number % 3]
        with server.connect(timeout=3) as connection:
            connection.sendall(head("/predict", f"Content-Length: {length}") + content)
            read_all(connection)

    def send_huge_head(number: int) -> None:
        siege.attacks[f"status {server.send(head('/predict', *['X: ' + 'x' * 10_000] * 100))[0]}"] += 1

    def leave_early(number: int) -> None:
        with server.connect() as connection:
            connection.sendall(head("/predict", f"Content-Length: {len(largest[0])}") + largest[0])
        pause_until_over()

    def fill_page(number: int) -> None:
        value = server.upload(largest[number % 2])
        for _ in range(20):
            body = json.dumps({"data": [value], "fn_index": 0, "session_hash": str(time.time_ns())})
            server.ask("POST", "/gradio_api/queue/join", body, Content_Type="application/json")

    attacks: list[Callable[[int], None]] = [
        *[send_largest] * 5, *[send_bombs] * 3, *[send_much] * 3, *[rebind] * 2, *[trickle] * 4, *[send_half_heads] * 3,
        send_batches, lie_about_length, send_huge_head, leave_early, fill_page,
    ]  # fmt: skip
    assert len(attacks) == 25

    def repeat(act: Callable[[int], None], number: int) -> None:
        while time.time() < end:
            act(number)
            number += 1

    def attack_as(act: Callable[[int], None], number: int) -> None:
        siege.attacks[act.__name__] += 1
        with contextlib.suppress(OSError, http.client.HTTPException, IndexError, AssertionError):
            act(number)  # the server may answer, refuse, or close

    process = psutil.Process(server.process.pid)
    siege.before = process.memory_info().rss
    with ThreadPoolExecutor(50) as pool:
        futures = [pool.submit(repeat, be_honest, number) for number in range(25)]
        futures += [pool.submit(repeat, functools.partial(attack_as, act), n) for n, act in enumerate(attacks)]
        while not all(future.done() for future in futures):
            family = [process, *process.children(recursive=True)]
            siege.peak = max(siege.peak, sum(member.memory_info().rss for member in family))
            time.sleep(0.05)
        for future in futures:
            future.result()
    print(f"memory {siege.before / 2**30:.2f} GiB, then at most {siege.peak / 2**30:.2f} GiB")
    print(f"{len(siege.seconds)} honest requests, of which {len(siege.failures)} failed")
    print(f"an answer took {np.median(siege.seconds):.2f} s, at most {max(siege.seconds):.2f} s")
    print(dict(sorted(siege.attacks.items())))
    return siege


def check_siege(siege: Siege) -> None:
    assert siege.failures == []
    assert len(siege.seconds) >= 25
    assert siege.peak - siege.before < 1.2 * 2**30, "the largest picture alone takes 0.8 GiB"
    statuses = {name for name in siege.attacks if name.startswith("status")}
    assert {"status 200", "status 400", "status 415", "status 421"} <= statuses


def test_a_short_siege(hasty: Server, picture: Image.Image) -> None:
    check_siege(besiege(hasty, 8, picture))
    assert hasty.post(encoded(picture, "PNG"))[0] == 200
