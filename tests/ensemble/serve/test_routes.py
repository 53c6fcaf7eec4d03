"""ensemble.serve.routes: batches, methods, and who is no longer there."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ensemble.serve.drift import Drift
from ensemble.serve.metrics import Metrics
from ensemble.serve.routes import BATCHES, MOST_PICTURES, make_app
from tests.server import Server, bomb, encoded, form


def test_a_batch_is_answered_as_its_pictures_are(server: Server, pictures: Path) -> None:
    contents = [path.read_bytes() for path in sorted((pictures / "test").glob("*/*.png"))[::5]]
    contents[3:3] = [b"just some text", bomb(), b""]
    status, told = server.post_batch(contents)
    assert status == 200
    assert len(told["answers"]) == len(contents) == 21
    for answer, content in zip(told["answers"], contents, strict=True):
        status, alone = server.post(content)
        if status == 200:
            assert answer.keys() == alone.keys()
            assert answer["label"] == alone["label"]
            assert answer["probs"] == pytest.approx(alone["probs"], abs=1e-4)
        else:
            assert answer == {**alone, "status": status}
    assert [answer.get("status") for answer in told["answers"][2:7]] == [None, 415, 415, 415, None]


def test_a_batch_has_a_number_and_a_size(server: Server, picture: Image.Image) -> None:
    png = encoded(picture, "PNG")
    status, told = server.post_batch([png] * MOST_PICTURES)
    assert (status, len(told["answers"])) == (200, 32)
    status, told = server.post_batch([png] * (MOST_PICTURES + 1))
    assert status == 400
    assert "expected a form with 1 to 32 pictures as files" in told["error"]
    assert "Too many files" in told["error"]
    assert server.post_batch([bytes(2**20)] * 2)[0] == 200, "the heads of a form are not counted"
    status, told = server.post_batch([bytes(2**20)] * 3)
    assert (status, told) == (413, {"error": "the upload is too large, expected at most 2 MiB"})


def test_other_forms_are_refused_in_words(server: Server, picture: Image.Image) -> None:
    png = encoded(picture, "PNG")
    for contents, name in (([], "files"), ([png], "file"), ([png], "")):
        status, told = server.post_batch(contents, name)
        assert (status, told) == (400, {"error": "expected a form with 1 to 32 pictures as files, and nothing else"})
    kind, body = form([png, png])
    field = b'--cut\r\nContent-Disposition: form-data; name="files"\r\n\r\ntext\r\n'
    for content, expected in (
        (field + body, "Too many fields"),
        (body[: len(body) // 2], "this one is cut off"),  # the parser would leave the last picture away
        (body[:-10], "this one is cut off"),
        (body.replace(b"name=", b"nome="), 'field "name" must be provided'),
        (body.replace(b"\r\nContent-", b"\r\n\x00Content-"), ""),
        (b"", "this one is cut off"),
    ):
        status, answer, _ = server.ask("POST", "/predict/batch", content, Content_Type=kind)
        assert status == 400, content
        assert expected in json.loads(answer)["error"]
    for kind in ("image/png", "application/x-www-form-urlencoded", "multipart/mixed; boundary=cut", ""):
        status, answer, _ = server.ask("POST", "/predict/batch", body, Content_Type=kind)
        assert status == 415
        assert json.loads(answer)["error"].endswith("as multipart/form-data")
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=é"):
        assert server.ask("POST", "/predict/batch", body, Content_Type=kind)[0] == 400


def test_other_methods_are_told_which_one(server: Server) -> None:
    for path, allowed in (
        ("/predict", "POST"), ("/predict/batch", "POST"), ("/health", "GET"), ("/metrics", "GET"), ("/drift", "GET"),
        ("/openapi.json", "GET"),
    ):  # fmt: skip
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - {allowed}:
            status, body, answer = server.ask(method, path)
            assert (status, answer["Allow"]) == (405, allowed)
            assert f"expected a {allowed} request" in json.loads(body)["error"]
        assert server.ask("HEAD", path)[0] == 405


class Asked:
    """Requests to an app without a server, whose answers take until `go` is set."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.cancelled: list[bytes] = []
        self.go = asyncio.Event()
        self.left = asyncio.Event()  # the clients have
        self.app = make_app(self.answer, {}, Metrics(Drift(("a", "b"), None), has_risk=False), {})

    async def answer(self, content: bytes) -> dict[str, Any]:
        self.begun.append(content)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(content)
            raise
        return {"error": "no", "status": 415}

    async def post(self, path: str, content: bytes, kind: str = "image/png") -> int:
        messages = iter([{"type": "http.request", "body": content, "more_body": False}, {"type": "http.disconnect"}])
        statuses = []

        async def receive() -> dict[str, Any]:
            message = next(messages)
            if message["type"] == "http.disconnect":
                await self.left.wait()
            return message

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))

        headers = [(b"content-type", kind.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        await self.app(scope, receive, send)
        return statuses[0]


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_who_has_left_is_not_answered() -> None:
    async def check() -> None:
        asked = Asked()
        requests = [
            asyncio.create_task(asked.post("/predict", b"picture")),
            asyncio.create_task(asked.post("/predict/batch", form([b"one", b"two"])[1], form([])[0])),
        ]
        await until(lambda: len(asked.begun) == 3)
        asked.left.set()
        await asyncio.wait_for(asyncio.gather(*requests), 30)
        await until(lambda: sorted(asked.cancelled) == [b"one", b"picture", b"two"])

    asyncio.run(check())


def test_few_batches_are_answered_at_a_time() -> None:
    async def check() -> None:
        asked = Asked()
        kind, body = form([b"picture"] * MOST_PICTURES)
        batches = [asyncio.create_task(asked.post("/predict/batch", body, kind)) for _ in range(BATCHES + 2)]
        await until(lambda: len(asked.begun) == BATCHES * MOST_PICTURES)
        await asyncio.sleep(0.1)
        assert len(asked.begun) == BATCHES * MOST_PICTURES
        alone = asyncio.create_task(asked.post("/predict", b"alone"))
        await until(lambda: b"alone" in asked.begun)
        asked.go.set()
        assert await asyncio.wait_for(asyncio.gather(alone, *batches), 30) == [415] + [200] * (BATCHES + 2)
        assert len(asked.begun) == 1 + (BATCHES + 2) * MOST_PICTURES

    asyncio.run(check())
