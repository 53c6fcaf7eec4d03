"""ensemble.serve: a real server in a process of its own, on a free port of the loopback interface."""

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psutil
import pytest
from PIL import Image
from upath import UPath

from ensemble.file import Member, read_ensemble, write_ensemble
from ensemble.predict import Voters
from ensemble.selection.blend import scale
from ensemble.serve import answer as answering
from ensemble.serve import app as serving
from ensemble.serve.answer import LARGEST_BATCH, Batcher, Busy, Decoders
from ensemble.serve.app import Serve, gpu_share
from ensemble.serve.page import answer_html, build_page
from trainables.errors import UserError

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds that a start may take on a busy machine


class Server:
    """`python -m ensemble.serve` as a user would start it, with its temporary files in a folder of their own."""

    def __init__(self, run: UPath, temporary: Path, *args: str, **environment: str) -> None:
        self.temporary = temporary
        command = [sys.executable, "-m", "ensemble.serve", "--run", str(run), "--port", "0", "--device", "cpu", *args]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment, "TMPDIR": str(temporary), "RAY_TMPDIR": "/tmp"},  # sockets: short names
        )  # fmt: skip
        watch = threading.Timer(PATIENCE, self.process.kill)
        watch.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        watch.cancel()
        assert "http://" in line, self.process.stderr and self.process.stderr.read()[-3000:]
        self.address = next(word for word in line.split() if word.startswith("http://"))
        self.port = int(self.address.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, bytes, Message]:
        """Status, body and headers of an answer; an underscore in a header's name stands for a hyphen."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, content, named)
            response = connection.getresponse()
            return response.status, response.read(), response.headers

    def post(self, content: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        status, body, _ = self.ask("POST", "/predict", content, **headers)
        return status, json.loads(body)

    def connect(self, *, timeout: float = 60) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def send(self, *parts: bytes) -> tuple[int, dict[str, Any]]:
        """Status and error of the answer to these very bytes, which is read until the server closes."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            answer = read_all(connection)
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    def ask_page(self, function: int, value: Any) -> dict[str, Any]:
        """What the page's own script would send to a function of it, and what comes back."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            session = str(time.time_ns())
            body = json.dumps({"data": [value], "fn_index": function, "session_hash": session})
            connection.request("POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read()
            connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
            for line in connection.getresponse():
                if line.startswith(b"data: ") and (told := json.loads(line[6:]))["msg"] == "process_completed":
                    return told
        raise AssertionError("no answer")

    def upload(self, content: bytes) -> dict[str, Any]:
        """A file given to the page: what its functions take as a value."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            head = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            form = {"Content-Type": "multipart/form-data; boundary=cut"}
            connection.request("POST", "/gradio_api/upload", head + content + b"\r\n--cut--\r\n", form)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            return {"path": json.loads(response.read())[0], "meta": {"_type": "gradio.FileData"}}

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # a test failed
            self.process.kill()
            self.process.communicate()

    def stop(self) -> str:
        """SIGTERM, and what it had to say on stderr."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def run(small_run: UPath, tmp_path_factory: pytest.TempPathFactory) -> UPath:
    """A run whose ensemble has temperatures, as `auto` chooses them."""
    run = UPath(shutil.copytree(str(small_run), tmp_path_factory.mktemp("runs") / "tempered"))
    ensemble = read_ensemble(run)
    members = zip(ensemble.members, (0.5, 0.3, 0.2), (0.7, 1.0, 2.5), strict=True)
    tempered = tuple(Member(m.id, weight, temperature=temperature) for m, weight, temperature in members)
    write_ensemble(run, dataclasses.replace(ensemble, members=tempered, temperature=0.6))
    return run


@pytest.fixture(scope="module")
def server(run: UPath, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(run, tmp_path_factory.mktemp("temporary"), "--most-mib", "2") as server:
        yield server
        assert server.process.poll() is None, "it stayed up"
        assert server.stop() == "", "nothing went wrong unseen"
        assert server.process.returncode == 0
        assert list(server.temporary.iterdir()) == []


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def picture(pictures: Path) -> Image.Image:
    image = Image.open(pictures / "test/grid/0.png")
    image.load()
    return image


def bomb(side: int = 10_000) -> bytes:
    """A PNG of side x side pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_an_answer_is_what_the_ensemble_predicts(server: Server, run: UPath, picture: Image.Image) -> None:
    status, told = server.post(encoded(picture, "PNG"))
    assert status == 200
    voters = Voters.load([run], read_ensemble(run), "cpu")
    votes = voters.votes(np.asarray(picture)[None])
    probs = voters.ensemble.predict(votes)[0]
    assert list(told["probs"]) == list(voters.classes)
    np.testing.assert_allclose(list(told["probs"].values()), probs, atol=1e-4)
    assert told["label"] == voters.classes[int(probs.argmax())]
    assert told["probability"] == pytest.approx(float(probs.max()), abs=1e-4)
    assert [m["id"] for m in told["members"]] == [m.id for m in voters.ensemble.members]
    for shown, member, vote in zip(told["members"], voters.ensemble.members, votes, strict=True):
        assert shown["label"] == voters.classes[int(vote[0].argmax())]
        assert shown["probability"] == pytest.approx(float(scale(vote, member.temperature).max()), abs=1e-4)
        assert shown["weight"] == member.weight


def test_odd_pictures_are_answered(server: Server, picture: Image.Image) -> None:
    same = [  # the same pixels in other clothes
        encoded(picture, "PNG"),
        encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)] * 3),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture, "TIFF"),
    ]
    answers = [server.post(content) for content in same]
    assert [status for status, _ in answers] == [200] * 4
    for _, told in answers[2:]:
        assert told["probs"] == pytest.approx(answers[0][1]["probs"], abs=1e-4)
    assert answers[1][1]["probs"] == pytest.approx(answers[0][1]["probs"], abs=0.2), "the first frame, in 256 colours"

    turned = Image.Exif()
    turned[0x0112] = 6
    upright = server.post(encoded(picture, "PNG"))[1]
    assert server.post(encoded(picture.rotate(90), "PNG", exif=turned))[1]["probs"] == pytest.approx(
        upright["probs"], abs=1e-4
    )

    sixteen = np.linspace(0, 65535, 900, dtype=np.uint16).reshape(30, 30)
    for content in (
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(sixteen), "PNG"),
        encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        encoded(Image.new("1", (5000, 2)), "PNG"),
        encoded(picture.convert("P"), "PNG", transparency=0),
    ):
        status, told = server.post(content)
        assert status == 200
        assert sum(told["probs"].values()) == pytest.approx(1, abs=1e-3)


def test_what_is_no_picture_is_refused_in_words(server: Server, picture: Image.Image) -> None:
    png = encoded(picture, "PNG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file"
    for content, expected in (
        (b"", "not an image"),
        (b"just some text", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (eps, "not an image"),
        (png[: len(png) // 2], "truncated"),
        (bomb(), "100,000,000 pixels, expected at most 50,000,000"),
        (bomb(40_000), "pixels"),  # Pillow itself refuses this one
    ):
        status, told = server.post(content)
        assert status == 415
        assert expected in told["error"]
        assert len(told["error"]) < 200


def test_large_uploads_are_refused_before_they_are_read(server: Server) -> None:
    status, told = server.post(bytes(2 * 2**20 + 1))
    assert (status, told) == (413, {"error": "the upload is too large, expected at most 2 MiB"})
    status, told = server.post(iter([bytes(2**20)] * 3))  # chunked: no length announced
    assert status == 413

    # a client that announces much and sends nothing is answered at once
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_client_that_leaves_early_harms_nobody(server: Server, picture: Image.Image) -> None:
    content = encoded(picture, "PNG")
    for sent in (0, 10, len(content)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            connection.sendall(head + content[:sent])
    assert server.post(content)[0] == 200


def test_the_page_opens_uploads_alone(server: Server, pictures: Path) -> None:
    """Whoever can reach the page must not get at other files of this machine, nor at addresses through it."""
    picture = pictures / "test/grid/0.png"
    told = server.ask_page(0, server.upload(picture.read_bytes()))
    assert told["success"]
    assert "Votes:" in told["output"]["data"][0]
    kept = sorted(server.temporary.rglob("*.png"))
    assert kept
    named = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    fetched = {**named, "path": "https://127.0.0.1/a.png"}
    upload, slider = 0, 1
    for function, value in (
        (upload, named), (upload, {**named, "is_stream": True}), (upload, fetched), (slider, named), (slider, fetched),
    ):  # fmt: skip
        told = server.ask_page(function, value)
        assert not told["success"]
        assert "nothing else is opened" in told["output"]["error"]
    assert sorted(server.temporary.rglob("*.png")) == kept, "nothing was copied into reach"
    with pytest.raises(AssertionError, match="the upload is too large, expected at most 2 MiB"):
        server.upload(bytes(3 * 2**20))


def test_many_at_once_get_each_their_own_answer(server: Server, pictures: Path, run: UPath) -> None:
    paths = sorted((pictures / "test").glob("*/*.png"))[::2]
    voters = Voters.load([run], read_ensemble(run), "cpu")
    expected = voters(np.stack([np.asarray(Image.open(path)) for path in paths]))
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = list(pool.map(lambda path: server.post(path.read_bytes()), paths))
    assert len(answers) == 45
    assert {status for status, _ in answers} == {200}
    found = np.array([list(told["probs"].values()) for _, told in answers])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_it_listens_on_the_loopback_interface_alone(server: Server) -> None:
    addresses = {c.laddr.ip for c in psutil.Process(server.process.pid).net_connections("inet") if c.status == "LISTEN"}
    assert addresses == {"127.0.0.1"}


# --- who may ask, for how long, with how much -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty(run: UPath, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits 2 s for a request, with the largest upload and picture that it allows by default."""
    with Server(run, tmp_path_factory.mktemp("temporary"), "--most-seconds", "2") as server:
        yield server
        assert server.process.poll() is None, "it stayed up"
        assert server.stop() == "", "nothing went wrong unseen"


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes; it may do so while it has unread bytes, which is a reset."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    """A request's head, after whose answer the server closes."""
    lines = (f"{method} {path} HTTP/1.1", "Connection: close", *lines)
    if not any(line.startswith("Host:") for line in lines):
        lines += ("Host: localhost",)
    return "\r\n".join([*lines, "", ""]).encode()


def test_health(server: Server, run: UPath) -> None:
    status, body, _ = server.ask("GET", "/health")
    assert status == 200
    assert json.loads(body) == {"status": "ok", "run": run.name, "ensemble": "equal", "members": 3}


def test_requests_to_other_names_are_refused(server: Server, picture: Image.Image) -> None:
    """A page of another site whose name resolves to 127.0.0.1 must not read answers."""
    png = encoded(picture, "PNG")
    for host in ("evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", ""):
        for method, path in (("POST", "/predict"), ("GET", "/"), ("GET", "/health"), ("GET", "/config")):
            status, body, _ = server.ask(method, path, png if method == "POST" else None, Host=host)
            assert status == 421
            assert "Host header names another server" in json.loads(body)["error"]
    assert server.send(b"GET /health HTTP/1.0\r\n\r\n")[0] == 421
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:7860", "[::1]:7860"):
        assert server.post(png, Host=host)[0] == 200


def test_pages_of_other_sites_send_nothing(server: Server, picture: Image.Image) -> None:
    png = encoded(picture, "PNG")
    status, told = server.post(png, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")
    assert (status, told) == (403, {"error": "pages of other sites may not send requests to this server"})
    assert server.post(png, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 403, "a form"
    assert server.post(png, Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")[0] == 200
    assert server.ask("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200, "a link"


@pytest.fixture
def open_server(run: UPath, tmp_path: Path) -> Iterator[Server]:
    """A server that other machines can reach."""
    with Server(run, tmp_path, "--host", "0.0.0.0", NINEFOLD_TOKEN=f"{TOKEN}\n") as server:
        yield server
        assert server.stop() == "", "nothing went wrong unseen"


TOKEN = "a%secret &é"


def test_a_token_is_asked_of_all(open_server: Server, picture: Image.Image) -> None:
    server, png = open_server, encoded(picture, "PNG")
    assert server.process.stdout is not None
    line = server.process.stdout.readline()
    assert "/?token=$NINEFOLD_TOKEN (page) and 'Authorization: Bearer TOKEN'" in line
    assert "secret" not in line

    for method, path in (("POST", "/predict"), ("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/upload")):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN[:2]}, {"Cookie": "ninefold=a"}):
            status, body, answer = server.ask(method, path, png, **headers)
            assert status == 401
            assert answer["WWW-Authenticate"] == "Bearer"
            assert "Authorization: Bearer TOKEN" in json.loads(body)["error"]
    assert server.ask("GET", "/?token=wrong")[0] == 401
    assert server.ask("GET", "/health")[0] == 200
    bearer = f"Bearer {TOKEN}".encode().decode("latin-1")
    assert server.post(png, Authorization=bearer)[0] == 200
    assert server.post(png, Authorization=bearer, Host="any.example")[0] == 200, "the token protects"
    assert server.send(head("/predict", "Content-Length: 1000"))[0] == 401, "nothing is read from who may not ask"

    status, _, answer = server.ask("GET", f"/?__theme=dark&token={quote(TOKEN)}")
    assert (status, answer["Location"]) == (303, "/?__theme=dark")
    cookie, *attributes = answer["Set-Cookie"].split("; ")
    assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    assert quote(TOKEN) not in cookie
    for path in ("/", "/config", "/theme.css"):
        assert server.ask("GET", path, Cookie=f"other=1; {cookie}")[0] == 200
    assert server.ask("GET", "/", Cookie=cookie[:-1])[0] == 401


def test_slow_requests_end(hasty: Server) -> None:
    """Each of these sockets was kept for ever."""
    reason = {"error": "the request did not arrive within 2 s"}
    bodies = [
        (head("/predict", "Content-Length: 1000"), b"half"),
        (head("/predict", "Transfer-Encoding: chunked"), b"4\r\nhalf\r\n"),
        (head("/gradio_api/upload", "Content-Length: 1000"), b"--cut\r\n"),
    ]
    # of the last, uvicorn's own limit, which is between requests, ends with the first byte
    heads = [b"", b"POST /predict HTTP/1.1\r\nHost: localho", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"]

    def trickle() -> bytes:
        with hasty.connect() as connection:
            connection.sendall(head("/predict", "Content-Length: 1000"))
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    connection.sendall(b"x")
                    time.sleep(0.1)
            return read_all(connection)

    def answer_to(start: bytes) -> bytes:
        with hasty.connect() as connection:
            connection.sendall(start)
            return read_all(connection)

    with ThreadPoolExecutor() as pool:
        trickled = pool.submit(trickle)
        answers = [pool.submit(answer_to, start) for start in heads]
        assert list(pool.map(lambda parts: hasty.send(*parts), bodies)) == [(408, reason)] * 3
        assert b" 408 " in trickled.result(), "a body that never pauses has no more time"
        assert [future.result().count(b"HTTP/1.1 200") for future in answers] == [0, 0, 1]


def test_who_does_not_read_is_dropped(hasty: Server) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", hasty.port))
        port = connection.getsockname()[1]
        connection.sendall(b"GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)

        def is_open() -> bool:
            connections = psutil.Process(hasty.process.pid).net_connections("tcp")
            return any(c.raddr and c.raddr.port == port and c.status == "ESTABLISHED" for c in connections)

        wait_for(is_open)
        wait_for(lambda: not is_open())


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def test_slow_sockets_lock_nobody_out(server: Server, picture: Image.Image) -> None:
    png = encoded(picture, "PNG")
    with contextlib.ExitStack() as stack:
        for number in range(250):  # of 128, the server answered nobody else
            connection = stack.enter_context(server.connect())
            connection.sendall(head("/predict", "Content-Length: 2000000")[: None if number % 2 else 20])
            if number % 25 == 0:
                assert server.post(png)[0] == 200
                assert server.ask("GET", "/health")[0] == 200
        assert [server.post(png)[0] for _ in range(10)] == [200] * 10
        assert "Votes:" in server.ask_page(0, server.upload(png))["output"]["data"][0]


def test_only_pictures_may_be_large(server: Server) -> None:
    """JSON takes twenty times its length once it is parsed, and Gradio keeps it for each session."""
    join, page = "/gradio_api/queue/join", {"Content-Type": "application/json"}
    status, body, _ = server.ask("POST", join, json.dumps({"data": [0] * 9000, "session_hash": "a"}), **page)
    assert (status, json.loads(body)) == (413, {"error": "the request is too large, expected at most 8 KiB"})
    status, told = server.send(head("/predict", *(f"X-{i}: {'x' * 1000}" for i in range(20)), "Content-Length: 0"))
    assert status in (400, 431), "h11 refuses what comes in pieces"
    assert "head is too large" in told["error"]


def test_what_is_no_http_is_refused(server: Server) -> None:
    refusal = {"error": "this is no HTTP request, or its head is too large"}
    assert server.send(b"hello\r\n\r\n") == (400, refusal)
    assert server.send(head("/predict", "Content-Length: -5")) == (400, refusal)
    assert server.send(head("/predict", "Content-Length: 9" + "9" * 30)) == (400, refusal)
    assert server.send(head("/predict", "Transfer-Encoding: chunked"), b"no size\r\n") == (400, refusal)
    with server.connect() as connection:  # the body goes wrong after it was answered
        connection.sendall(b"POST / HTTP/1.1\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 421")
        connection.sendall(b"no size\r\n")
        assert b"HTTP" not in read_all(connection)
    status, body, told = server.ask("GET", "/predict")
    assert (status, told["Allow"]) == (405, "POST")
    assert "POST" in json.loads(body)["error"]


def lying_tiff(tile: int) -> bytes:
    """A TIFF of 64x64 pixels, cut out of a tile of tile x tile."""
    content = zlib.compress(bytes(tile * tile), 9)
    tags = {
        256: (4, 64), 257: (4, 64), 258: (3, 8), 259: (3, 8), 262: (3, 1), 277: (3, 1), 322: (4, tile), 323: (4, tile),
        324: (4, 8 + 2 + 12 * 10 + 4), 325: (4, len(content)),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def many_scans(picture: Image.Image) -> bytes:
    """A progressive JPEG whose last scan is there 100 times."""
    jpeg = encoded(picture, "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + 100 * jpeg[last:-2] + jpeg[-2:]


def test_pictures_that_hide_their_cost_are_refused(server: Server, picture: Image.Image) -> None:
    for content, expected in (
        (encoded(picture, "JPEG2000"), "JPEG2000 is not accepted"),
        (encoded(picture, "AVIF"), "AVIF is not accepted"),
        (lying_tiff(10_000), "tiles of 100,000,000 pixels, expected at most 50,000,000"),
        (many_scans(picture), "more than 50 scans"),
    ):
        status, told = server.post(content)
        assert status == 415
        assert expected in told["error"]
    assert server.post(lying_tiff(64))[0] == 200
    assert server.post(encoded(picture, "JPEG", progressive=True))[0] == 200


def test_uploads_to_the_page_are_bounded_together(server: Server) -> None:
    """They stay for ten minutes, and those that Gradio does not know of longer."""
    for number in range(60):
        server.upload(bytes([number]) * (2**21 - 100))
    form = {"Content-Type": "multipart/form-data; boundary=cut"}
    part = b'--cut\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\n' + bytes(2**21 - 100)
    for _ in range(60):
        server.ask("POST", "/gradio_api/upload", part + b"\r\n--cut--\r\n", **form)
    assert sum(path.stat().st_size for path in server.temporary.rglob("*") if path.is_file()) <= 50 * 2**21


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
        *[send_largest] * 6, *[send_bombs] * 3, *[send_much] * 3, *[rebind] * 2, *[trickle] * 4, *[send_half_heads] * 3,
        lie_about_length, send_huge_head, leave_early, fill_page,
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


@pytest.mark.slow
def test_a_siege_of_a_minute(run: UPath, picture: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the limits that a user gets: memory stays below 2 GiB and every honest request is answered."""
    with Server(run, tmp_path_factory.mktemp("temporary")) as server:
        siege = besiege(server, 60, picture)
        check_siege(siege)
        assert siege.peak < 2 * 2**30
        assert server.post(encoded(picture, "PNG"))[0] == 200
        assert server.stop() == "", "nothing went wrong unseen"


@pytest.mark.slow
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


@pytest.mark.slow
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
    replicated.stop()
    assert psutil.wait_procs(family, timeout=60)[1] == [], "Ray's processes have ended"


# --- without a server ------------------------------------------------------------------------------------------------


def test_waiting_images_are_predicted_together() -> None:
    sizes = []
    taken, go = threading.Event(), threading.Event()

    def votes(images: np.ndarray) -> list[np.ndarray]:
        taken.set()
        go.wait()
        sizes.append(len(images))
        return [images.reshape(len(images), -1)[:, :2] / 255] * 3

    batcher = Batcher(votes)
    futures = [batcher.submit(np.full((2, 2, 3), 0, np.uint8))]
    assert taken.wait(30)
    futures += [batcher.submit(np.full((2, 2, 3), i, np.uint8)) for i in range(1, 50)]
    go.set()
    for i, future in enumerate(futures):
        np.testing.assert_allclose(future.result(timeout=30), np.full((3, 2), i / 255))
    assert sizes == [1, LARGEST_BATCH, 49 - LARGEST_BATCH]


def test_a_failed_batch_and_a_cancelled_request_are_not_the_end() -> None:
    calls = []
    taken, go = threading.Event(), threading.Event()

    def votes(images: np.ndarray) -> list[np.ndarray]:
        taken.set()
        go.wait()
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return [np.ones((len(images), 2))]

    batcher = Batcher(votes)
    image = np.zeros((2, 2, 3), np.uint8)
    failing = batcher.submit(image)
    assert taken.wait(30)  # it is in the first batch now
    cancelled = [batcher.submit(image) for _ in range(3)]
    assert all(future.cancel() for future in cancelled)
    go.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.result(timeout=30)
    assert batcher.submit(image).result(timeout=30).shape == (1, 2)


def test_large_pictures_are_decoded_one_by_one_and_small_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    begun: list[bytes] = []
    gates = {name: threading.Event() for name in (b"first", b"large", b"middle", b"small", b"least")}

    def decode(content: bytes) -> np.ndarray:
        begun.append(content)
        gates[content].wait()
        return np.zeros(1)

    decoders = Decoders(decode, 100)
    futures = [decoders.submit(b"first", 90)]
    wait_for(lambda: begun == [b"first"])
    futures += [decoders.submit(b"large", 95), decoders.submit(b"middle", 60), decoders.submit(b"small", 30)]
    futures += [decoders.submit(b"least", 10)]
    wait_for(lambda: begun == [b"first", b"least"])
    gates[b"first"].set()
    wait_for(lambda: set(begun[2:]) == {b"small", b"middle"})
    for name in (b"least", b"small", b"middle"):
        assert b"large" not in begun, "95 pixels have no room beside any other"
        gates[name].set()
        futures[{b"least": 4, b"small": 3, b"middle": 2}[name]].result(timeout=30)
    gates[b"large"].set()
    assert futures[1].result(timeout=30).shape == (1,)


def test_of_too_many_waiting_pictures_the_largest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "WAITING", 3)
    taken, go = threading.Event(), threading.Event()
    decoded = []

    def decode(content: bytes) -> np.ndarray:
        taken.set()
        go.wait()
        decoded.append(content)
        if content == b"damaged":
            raise ValueError("damaged")
        return np.zeros(1)

    decoders = Decoders(decode, 10)
    first = decoders.submit(b"first", 10)
    assert taken.wait(30)
    large, damaged, cancelled = (decoders.submit(name, 10) for name in (b"large", b"damaged", b"cancelled"))
    cancelled.cancel()
    small = decoders.submit(b"small", 1)  # takes the place of who has left
    smaller = decoders.submit(b"smaller", 1)
    with pytest.raises(Busy):
        damaged.result(timeout=30)
    damaged = decoders.submit(b"damaged", 1)
    with pytest.raises(Busy):
        large.result(timeout=30)
    go.set()
    with pytest.raises(ValueError, match="damaged"):
        damaged.result(timeout=30)
    for future in (first, small, smaller):
        assert future.result(timeout=30).shape == (1,)
    assert set(decoded) == {b"first", b"small", b"smaller", b"damaged"}


def test_who_has_left_is_not_answered() -> None:
    left = asyncio.Event()
    cancelled = []

    async def answer(content: bytes) -> dict[str, Any]:
        left.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(content)
            raise
        return {}

    messages = iter([{"type": "http.request", "body": b"picture", "more_body": False}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        message = next(messages)
        if message["type"] == "http.disconnect":
            await left.wait()
        return message

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}

    async def ask() -> None:
        await serving.make_app(answer, {})(scope, receive, send)
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert cancelled == [b"picture"]


def test_the_page_has_few_uploads_in_memory(small_run: UPath, tmp_path: Path) -> None:
    """A request for the answer takes a hundred bytes, and names an upload of 20 MiB."""
    at_a_time, most = 0, 0

    async def answer(content: bytes) -> dict[str, Any]:
        nonlocal at_a_time, most
        at_a_time += 1
        most = max(most, at_a_time)
        await asyncio.sleep(0.01)
        at_a_time -= 1
        return {"error": "no"}

    page = build_page(small_run, read_ensemble(small_run), None, answer, tmp_path)
    (tmp_path / "a.png").write_bytes(b"picture")
    function: Any = page.fns[0].fn

    async def ask() -> list[str]:
        return await asyncio.gather(*[function(str(tmp_path / "a.png")) for _ in range(20)])

    assert len(asyncio.run(ask())) == 20
    assert most == 4


def test_other_machines_need_a_token(small_run: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NINEFOLD_TOKEN", " ")
    for token in (None, "", " "):
        with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 lets .* set NINEFOLD_TOKEN or give --token"):
            serving.serve(Serve((str(small_run),), host="0.0.0.0", port=0, token=token))


@pytest.mark.parametrize(
    ("gpus", "replicas", "share"), [(0, 2, 0), (1, 1, 1), (1, 3, 1 / 3), (2, 3, 1 / 2), (4, 2, 1), (3, 7, 1 / 3)]
)
def test_replicas_share_gpus_so_that_all_find_room(gpus: float, replicas: int, share: float) -> None:
    assert gpu_share(gpus, replicas) == pytest.approx(share)


def test_names_of_classes_and_files_are_no_markup() -> None:
    evil = "<script>alert(1)</script>"
    member = {"id": evil, "architecture": evil, "weight": 1.0, "label": evil, "probability": 0.9}
    answer = {"label": evil, "probability": 0.9, "probs": {evil: 0.9, "b": 0.1}, "members": [member]}
    for page in (answer_html(answer, evil), answer_html({"error": evil})):
        assert "<script>" not in page
        assert "&lt;script&gt;" in page


def test_mistakes(small_run: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="choose another --port"):
            serving.serve(Serve((str(small_run),), port=port))
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:99999 .*choose another --port"):
        serving.serve(Serve((str(small_run),), port=99999))
    with pytest.raises(UserError, match="has no ensemble best; it has equal"):
        serving.serve(Serve((str(small_run),), "best"))
    with pytest.raises(UserError, match="--replicas is 0"):
        serving.serve(Serve((str(small_run),), port=0, ray_serve=True, replicas=0))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'ninefold\[serve\]'"):
        serving.serve(Serve((str(small_run),), port=0, device="cpu"))
