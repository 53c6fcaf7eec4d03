"""`python -m ensemble.serve` in a process of its own, and the pictures, good and bad, that tests send to it."""

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

from PIL import Image
from upath import UPath

ROOT = Path(__file__).parents[1]
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

    def post_batch(self, pictures: Sequence[bytes], name: str = "files") -> tuple[int, dict[str, Any]]:
        kind, content = form(pictures, name)
        status, body, _ = self.ask("POST", "/predict/batch", content, Content_Type=kind)
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
            kind, body = form([content])
            connection.request("POST", "/gradio_api/upload", body, {"Content-Type": kind})
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


def form(contents: Sequence[bytes], name: str = "files") -> tuple[str, bytes]:
    """Content type and body of a form with these files, as a browser or curl sends it."""
    head = f'--cut\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'.encode()
    parts = b"".join(head + content + b"\r\n" for content in contents)
    return "multipart/form-data; boundary=cut", parts + b"--cut--\r\n"


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


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def bomb(side: int = 10_000) -> bytes:
    """A PNG of side x side pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


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
