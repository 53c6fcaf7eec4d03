"""ensemble.serve.guard without a server: how many bytes are held, and who has to go when there is no room."""

import asyncio
import contextlib
import json
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.serve import guard as guarding
from ensemble.serve.guard import FREE, Guard, clear_oldest

MIB = 2**20
LARGE = bytes(MIB)


class App:
    """Reads what it is sent, and answers once `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Request:
    """A request to a guard, whose body the test sends part by part."""

    def __init__(self, guard: Guard, path: str = "/predict", length: int | None = None) -> None:
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        announced = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", str(length).encode())
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost"), announced], "server": ("127.0.0.1", 1),
        }  # fmt: skip
        self.task = asyncio.create_task(guard(scope, self.parts.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def add(self, part: bytes, *, more: bool = False) -> "Request":
        self.parts.put_nowait({"type": "http.request", "body": part, "more_body": more})
        return self

    async def status(self) -> int:
        await asyncio.wait_for(self.task, 30)
        return self.sent[0]["status"]

    def error(self) -> str:
        return json.loads(self.sent[1]["body"])["error"]

    def header(self, name: bytes) -> bytes | None:
        return dict(self.sent[0]["headers"]).get(name)


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for five large bodies, a sixth that may exceed it, and others that wait."""
    monkeypatch.setattr(guarding, "HELD", 4 * MIB)
    monkeypatch.setattr(guarding, "PATIENCE", 30.0)
    monkeypatch.setattr(guarding, "SLOW", 0.1)


@contextlib.asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[tuple[Guard, App]]:
    app = App()
    guard = Guard(app, ("localhost",), "", MIB, 20, folder)
    yield guard, app
    assert guard.held == 0, "everything was given back"
    assert not guard.arriving
    assert not any(guard.ongoing.values())


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_bodies_share_a_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "PATIENCE", 0.3)

    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            held = [Request(guard, length=MIB).add(LARGE) for _ in range(6)]
            await until(lambda: len(app.bodies) == 6)
            assert guard.held == 6 * (MIB - FREE)
            refused = Request(guard).add(LARGE)
            assert await refused.status() == 503
            assert refused.error() == "the server is full; try again later"
            assert refused.header(b"retry-after") == b"5"
            small = Request(guard).add(bytes(FREE))
            await until(lambda: len(app.bodies) == 7)
            waiting = Request(guard).add(LARGE)
            app.go.set()
            assert [await request.status() for request in (*held, small, waiting)] == [200] * 8

    asyncio.run(check())


def test_many_bodies_at_once_all_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In equal parts, they would fill the room before any of them is complete."""
    monkeypatch.setattr(guarding, "SLOW", 30.0)

    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            app.go.set()
            requests = [Request(guard, length=MIB) for _ in range(20)]
            for number in range(16):
                for request in requests:
                    request.add(bytes(MIB // 16), more=number < 15)
                await asyncio.sleep(0.002)
            assert [await request.status() for request in requests] == [200] * 20

    asyncio.run(check())


def test_an_announcement_takes_no_room(tmp_path: Path) -> None:
    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            app.go.set()
            silent = [Request(guard, length=MIB).add(b"x", more=True) for _ in range(100)]
            await until(lambda: len(guard.arriving) == 100)
            assert await Request(guard, length=MIB).add(LARGE).status() == 200
            for request in silent:
                request.parts.put_nowait({"type": "http.disconnect"})
                await request.task
                assert request.sent == []

    asyncio.run(check())


def test_slow_bodies_keep_nobody_out(tmp_path: Path) -> None:
    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            slow = [Request(guard, length=MIB).add(bytes(MIB - 1 - i), more=True) for i in range(5)]
            trickle = Request(guard, length=MIB).add(b"x", more=True)
            await until(lambda: guard.held > 3.7 * MIB and len(guard.arriving) == 6)
            first = Request(guard, length=MIB).add(LARGE)
            await until(lambda: len(app.bodies) == 1)
            assert not any(request.task.done() for request in slow), "one body has room beside them"
            second = Request(guard, length=MIB).add(LARGE)
            await until(lambda: len(app.bodies) == 2)
            assert await slow[0].status() == 503, "the one that took most room"
            assert "arrived slowly" in slow[0].error()
            app.go.set()
            for request in (*slow[1:], trickle):
                assert not request.task.done(), "nobody else had to go"
                assert await request.add(b"x").status() == 200
            assert [await first.status(), await second.status()] == [200, 200]

    asyncio.run(check())


def test_who_has_the_turn_may_not_keep_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            held = [Request(guard, length=MIB).add(LARGE) for _ in range(5)]
            await until(lambda: len(app.bodies) == 5)
            trickle = Request(guard, length=MIB).add(bytes(FREE + 1), more=True)
            await until(lambda: guard.held == 5 * (MIB - FREE) + guarding.STEP)
            filling = Request(guard, length=MIB).add(bytes(FREE + 3 * guarding.STEP), more=True)
            await until(lambda: guard.held == guard.most_held)
            trickle.add(b"x", more=True)
            await until(trickle.parts.empty)
            assert not guard.turn.locked(), "a byte needs no turn"
            stalled = Request(guard, length=MIB).add(bytes(MIB - 1), more=True)
            await until(guard.turn.locked)
            app.go.set()
            assert [await request.status() for request in held] == [200] * 5
            assert await stalled.status() == 503
            assert "arrived slowly" in stalled.error()
            for request in (trickle, filling):
                assert await request.add(b"").status() == 200
            assert await Request(guard, length=MIB).add(LARGE).status() == 200

    asyncio.run(check())


def test_a_body_in_tiny_parts_takes_no_more_memory(tmp_path: Path) -> None:
    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            app.go.set()
            part = {"type": "http.request", "body": b"x", "more_body": True}
            request = Request(guard)
            tracemalloc.start()
            for _ in range(20):
                for _ in range(10_000):
                    request.parts.put_nowait(part)
                await until(request.parts.empty)
            assert tracemalloc.get_traced_memory()[0] < MIB, "a list of 200,000 parts has 10 MiB"
            tracemalloc.stop()
            assert await request.add(b"").status() == 200
            assert app.bodies == [b"x" * 200_000]

    asyncio.run(check())


def test_too_many_at_a_time_are_told_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "PREDICT_REQUESTS", 2)
    monkeypatch.setattr(guarding, "PAGE_REQUESTS", 3)
    monkeypatch.setattr(guarding, "BATCH_REQUESTS", 1)
    paths = ("/predict",) * 3 + ("/gradio_api/queue/join",) * 4 + ("/predict/batch",) * 2

    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            requests = [Request(guard, path).add(b"x") for path in paths]
            await until(lambda: len(app.bodies) == 6)
            for refused in (requests[2], requests[6], requests[8]):
                assert await refused.status() == 503
                assert refused.header(b"retry-after") == b"5"
            watched = [Request(guard, path).add(b"") for path in guarding.WATCHED * 3]
            await until(lambda: len(app.bodies) == 6 + 12)
            app.go.set()
            assert [await request.status() for request in watched] == [200] * 12

    asyncio.run(check())


def test_a_batch_may_be_as_large_as_one_picture(tmp_path: Path) -> None:
    async def check() -> None:
        async with guarded(tmp_path) as (guard, app):
            app.go.set()
            most = MIB + guarding.FORM
            assert await Request(guard, "/predict/batch", most).add(bytes(most)).status() == 200
            assert await Request(guard, "/predict/batch", most + 1).status() == 413
            chunked = Request(guard, "/predict/batch").add(bytes(most), more=True).add(b"x")
            assert await chunked.status() == 413
            assert chunked.error() == "the upload is too large, expected at most 1 MiB"
            for path in guarding.WATCHED:
                assert await Request(guard, path, guarding.MESSAGE + 1).status() == 413

    asyncio.run(check())


def test_the_oldest_files_go_first(tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.png").write_bytes(bytes(10))
        os.utime(folder, (number, number))
    (tmp_path / "partial").write_bytes(bytes(10))
    os.utime(tmp_path / "partial", (3.5, 3.5))
    clear_oldest(tmp_path, 70)
    assert len(list(tmp_path.iterdir())) == 7
    clear_oldest(tmp_path, 35)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["4", "5", "partial"]
    clear_oldest(tmp_path, 25)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["4", "5"]


def test_empty_folders_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "ENTRIES", 3)
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        os.utime(tmp_path / str(number), (number, number))
    clear_oldest(tmp_path, 100)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["3", "4", "5"]
