"""ensemble.serve.app: who may ask a real server, for how long, and with how much."""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from PIL import Image
from upath import UPath

from ensemble.serve import app as serving
from ensemble.serve.app import Serve, gpu_share
from tests.server import Server, encoded, head, read_all, wait_for
from trainables.errors import UserError


def test_health(server: Server, run: UPath) -> None:
    status, body, _ = server.ask("GET", "/health")
    assert status == 200
    assert json.loads(body) == {"status": "ok", "run": run.name, "ensemble": "equal", "members": 3}


def test_it_listens_on_the_loopback_interface_alone(server: Server) -> None:
    addresses = {c.laddr.ip for c in psutil.Process(server.process.pid).net_connections("inet") if c.status == "LISTEN"}
    assert addresses == {"127.0.0.1"}


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


TOKEN = "a%secret &é"


@pytest.fixture
def open_server(run: UPath, tmp_path: Path) -> Iterator[Server]:
    """A server that other machines can reach."""
    with Server(run, tmp_path, "--host", "0.0.0.0", NINEFOLD_TOKEN=f"{TOKEN}\n") as server:
        yield server
        assert server.stop() == "", "nothing went wrong unseen"


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
