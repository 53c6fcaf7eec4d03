"""What stands before page and API: who may ask, how long a request may take to arrive, and how much is held of it.

`Guard` is ASGI, in front of everything. `Connection` is uvicorn's, which by itself waits without end for the head of
a request, and for a client that does not read its answer.
"""

import asyncio
import contextlib
import hashlib
import hmac
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PREDICT, BATCH, UPLOAD = "/predict", "/predict/batch", "/gradio_api/upload"
HEALTH, METRICS, DRIFT, DOCUMENT = "/health", "/metrics", "/drift", "/openapi.json"
WATCHED = (HEALTH, METRICS, DRIFT, DOCUMENT)  # answered however busy the server is: at once, and in little
ROUTES = (PREDICT, BATCH, *WATCHED)  # all others are the page's
FORMS = (BATCH, UPLOAD)  # take files in a form
OPEN = (HEALTH, "/manifest.json")  # without a token: browsers ask for the latter without cookies; it has the title
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

CONNECTIONS = 200  # below the 256 open files that macOS grants a process
PREDICT_REQUESTS = 120  # that are worked on at a time
BATCH_REQUESTS = 8  # likewise
PAGE_REQUESTS = 64  # likewise; every open tab keeps a stream. All together leave connections that may be closed
HELD = 64 * 2**20  # bytes of all bodies at a time, of each what exceeds FREE; one may exceed it, so that it ends
FREE = 256 * 2**10  # bytes of a body that need no room: most pictures, which large bodies must not keep waiting
FORM = 64 * 2**10  # bytes of a form besides its files
MESSAGE = 8 * 2**10  # bytes of what else the page sends: Gradio keeps ten copies of it for each of 2000 sessions
HEAD = 16 * 2**10  # bytes of a request's head; h11 limits only one that comes in pieces
SLOW = 2.0  # seconds that a body may take while others wait for its room
PATIENCE = 10.0  # seconds that a body waits for room
RETRY = "5"  # seconds after which a client that was refused may come again
STEP = 64 * 2**10  # bytes in which bodies are counted, and in which a form is handed on
DISK = 50  # of the largest uploads that are kept on disk at a time
ENTRIES = 1000  # files and folders likewise


class Refused(Exception):
    """Why a request is not answered, in words, with a status."""

    def __init__(self, status: int, reason: str, *headers: tuple[str, str]) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


class Body:
    """The bytes of a request's body, of which more may come."""

    def __init__(self) -> None:
        self.content = io.BytesIO()  # not a list of parts: a part of one byte takes 42
        self.size = 0
        self.held = 0  # bytes that are counted
        self.is_waiting = False  # for room
        self.has_turn = False  # the only one that may exceed HELD
        self.is_dropped = False
        self.limit: asyncio.Timeout

    def drop(self) -> None:
        self.is_dropped = True
        self.limit.reschedule(0)

    def replay(self, receive: Receive, step: int) -> Receive:
        """The body once more, `step` bytes at a time, then what `receive` says: that the client has left."""
        content: bytes | None = self.content.getvalue()  # no copy, and neither is a slice of all
        self.content = io.BytesIO()
        start = 0

        async def replayed() -> Message:
            nonlocal content, start
            if content is None:
                return await receive()
            await asyncio.sleep(0)  # parsing a large form must not keep other requests waiting
            part = content[start : start + step]
            start += step
            if start >= len(content):
                content = None
            return {"type": "http.request", "body": part, "more_body": content is not None}

        return replayed


class Guard:
    """Hands on a request once it has arrived completely, if it may be answered; refuses it in JSON otherwise."""

    def __init__(
        self, app: App, hosts: tuple[str, ...] | None, token: str, most_bytes: int, seconds: float, uploads: Path
    ) -> None:
        """hosts: names that the Host header may have, None for any; token: "" for none; most_bytes: of an upload;
        seconds: in which a body has to arrive; uploads: the folder in which the page keeps what it was sent."""
        self.app = app
        self.hosts = hosts
        self.token = token.encode()
        self.cookie = hmac.new(self.token, b"cookie", hashlib.sha256).hexdigest().encode()
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.uploads = uploads
        self.most_held = max(HELD, most_bytes)
        self.held = 0
        self.arriving: dict[Body, float] = {}  # and when each began
        self.turn = asyncio.Lock()  # of the body that may exceed HELD
        self.ongoing: Counter[str] = Counter()  # requests by kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start and end of the server; there are no WebSockets
            await self.app(scope, receive, send)
            return
        body = Body()
        try:
            await self._answer(body, scope, receive, send)
        except Refused as refused:
            await _respond(send, refused.status, {"error": str(refused)}, *refused.headers)
        finally:
            self.held -= body.held

    async def _answer(self, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        head = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) for k, v in scope["headers"])
        if head > HEAD:
            raise Refused(431, f"the request's head is too large, expected at most {HEAD // 2**10} KiB")
        self._check_origin(scope)
        if self.token and scope["path"] not in OPEN and (login := self._log_in(scope)):
            await _respond(send, 303, {}, *login)
            return
        self._check_ongoing(scope)  # before its body takes room, and again once that has come
        length = _length(scope)
        if length is not None and length > self._most(scope):
            raise self._too_large(scope)
        if length != 0:
            if not await self._read(body, receive, scope):
                return  # the client has left
            # Of a form that came in one piece, Gradio would keep every line apart until all are parsed.
            receive = body.replay(receive, STEP if scope["path"] in FORMS else max(body.size, 1))
            self._check_ongoing(scope)
        kind = _kind(scope)
        self.ongoing[kind] += 1
        try:
            if scope["path"] == UPLOAD:
                await asyncio.to_thread(clear_oldest, self.uploads, DISK * self.most_bytes - body.size)
            await self.app(scope, receive, send)
        finally:
            self.ongoing[kind] -= 1

    def _check_origin(self, scope: Scope) -> None:
        # A page of another site could have its own name resolve to 127.0.0.1, and would then read every answer: the
        # browser takes both for the same site. Only the Host header tells. Beyond the loopback interface no list of
        # names could be complete; there the token protects, which a browser does not send under another name.
        if self.hosts is not None:
            hosts = _values(scope, b"host")
            if len(hosts) != 1 or _host_name(hosts[0]) not in self.hosts:
                raise Refused(421, f"the Host header names another server, expected {' or '.join(self.hosts)}")
        # Under its own name such a page cannot read answers, but it could fill disk and queue. Links may lead here.
        is_link = scope["method"] == "GET" and _values(scope, b"sec-fetch-mode") == ["navigate"]
        if _values(scope, b"sec-fetch-site") == ["cross-site"] and not is_link:
            raise Refused(403, "pages of other sites may not send requests to this server")

    def _log_in(self, scope: Scope) -> tuple[tuple[str, str], ...]:
        """Headers that a browser is sent away with, to come back with a cookie; () when the request may pass."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value.encode() for name, value in query if name == "token"]
        name = f"ninefold-{scope['server'][1]}"  # cookies do not tell ports apart
        if scope["path"] == "/" and tokens:
            if not hmac.compare_digest(tokens[0], self.token):
                raise Refused(401, "this is not the server's token", ("WWW-Authenticate", "Bearer"))
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            return (
                ("Set-Cookie", f"{name}={self.cookie.decode()}; Path=/; HttpOnly; SameSite=Strict"),
                ("Location", f"/?{rest}" if rest else "/"),
                ("Cache-Control", "no-store"),
                ("Referrer-Policy", "no-referrer"),
            )
        for value in _values(scope, b"authorization"):
            scheme, _, given = value.partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.token):
                return ()
        for value in _values(scope, b"cookie"):
            for pair in value.split(";"):
                key, _, given = pair.strip().partition("=")
                if key == name and hmac.compare_digest(given.encode("latin-1"), self.cookie):
                    return ()
        way = "send it as 'Authorization: Bearer TOKEN', or open /?token=TOKEN in a browser"
        raise Refused(401, f"this server needs a token; {way}", ("WWW-Authenticate", "Bearer"))

    def _check_ongoing(self, scope: Scope) -> None:
        most = {"page": PAGE_REQUESTS, PREDICT: PREDICT_REQUESTS, BATCH: BATCH_REQUESTS}
        kind = _kind(scope)
        if kind in most and self.ongoing[kind] >= most[kind]:
            raise Refused(503, "the server is busy; try again later", ("Retry-After", RETRY))

    def _most(self, scope: Scope) -> int:
        forms = dict.fromkeys(FORMS, self.most_bytes + FORM)
        return {PREDICT: self.most_bytes, **forms}.get(scope["path"], MESSAGE)

    def _too_large(self, scope: Scope) -> Refused:
        if scope["path"] in (PREDICT, *FORMS):
            return Refused(413, f"the upload is too large, expected at most {self.most_bytes / 2**20:g} MiB")
        return Refused(413, f"the request is too large, expected at most {MESSAGE // 2**10} KiB")

    async def _read(self, body: Body, receive: Receive, scope: Scope) -> bool:
        """Fill `body`; False when the client has left."""
        most = self._most(scope)
        try:
            async with asyncio.timeout(self.seconds) as body.limit:
                self.arriving[body] = asyncio.get_running_loop().time()
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    part = message.get("body", b"")
                    if body.size + len(part) > most:
                        raise self._too_large(scope)
                    await self._make_room(body, len(part))
                    body.content.write(part)
                    if not message.get("more_body"):
                        return True
        except TimeoutError:
            if body.is_waiting:
                raise Refused(503, "the server is full; try again later", ("Retry-After", RETRY)) from None
            if body.is_dropped or body.has_turn:
                reason = "the server is full, and this request arrived slowly; try again later"
                raise Refused(503, reason, ("Retry-After", RETRY)) from None
            reason = f"the request did not arrive within {self.seconds:g} s"
            raise Refused(408, reason, ("Connection", "close")) from None
        finally:
            self.arriving.pop(body, None)
            if body.has_turn:
                self.turn.release()

    async def _make_room(self, body: Body, size: int) -> None:
        """Count what has come, not what was announced: three who announce 20 MiB and send nothing would fill all."""
        body.size += size
        # In steps, so that who sends a byte now and then does not take the turn of those who send much.
        more = -(max(0, body.size - FREE) // -STEP) * STEP - body.held
        if more and self.held + more > self.most_held:
            await self._wait_for_room(body, more)
        self.held += more
        body.held += more

    async def _wait_for_room(self, body: Body, more: int) -> None:
        """Wait until this body may exceed HELD, one after another: each would wait for the others' room otherwise."""
        clock = asyncio.get_running_loop().time
        start, deadline = clock(), body.limit.when() or 0.0
        body.is_waiting = True
        body.limit.reschedule(start + PATIENCE)
        if not body.has_turn:
            await self.turn.acquire()
            body.has_turn = True
            start, deadline = clock(), min(deadline + clock() - start, clock() + SLOW)
        while self.held + more > self.most_held + self.most_bytes:
            slow = [
                other
                for other, began in self.arriving.items()
                if other.held and began < clock() - SLOW and not (other.is_waiting or other is body)
            ]
            if slow:
                max(slow, key=lambda other: other.held).drop()
            await asyncio.sleep(0.02)
        body.is_waiting = False
        body.limit.reschedule(deadline + clock() - start)  # the client did not cause the wait


class Connection(H11Protocol):
    """Is closed when the client keeps it waiting: with a head, between requests, or by not reading an answer."""

    def __init__(self, *args: Any, seconds: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seconds = seconds
        self._since = 0.0
        self._clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        others = [other for other in others if not other.transport.is_closing()]
        if len(others) >= CONNECTIONS:
            # Refusing the newest would let the slowest keep all of them. A head is worth less than half a body.
            slow = [other for other in others if other._is_waiting()]
            min(slow, key=lambda other: (not other._is_idle(), other._since), default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for clock in (self._clock, self._write_clock):
            if clock:
                clock.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_clock = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_clock:
            self._write_clock.cancel()
            self._write_clock = None

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # it was answered before its body went wrong
            self.transport.abort()
            return
        content, headers = _encode({"error": "this is no HTTP request, or its head is too large"})
        response = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")])
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if not self._is_idle():  # the head was right, so the app is at work: what it sends now would be an error
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _expect_head(self) -> None:
        self._since = self.loop.time()
        if self._clock:
            self._clock.cancel()
        self._clock = self.loop.call_later(self._seconds, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self._is_idle():
            self.transport.abort()

    def _is_idle(self) -> bool:
        """No head has come, or none since the last answer."""
        return self.cycle is None or self.cycle.response_complete

    def _is_waiting(self) -> bool:
        """For the client, be it for a head, for a body, or for it to read."""
        return self._is_idle() or self.cycle.more_body or self.flow.write_paused


def clear_oldest(folder: Path, most_bytes: int) -> None:
    """Delete what has lain longest in `folder`, until the rest is no more than `most_bytes` and ENTRIES."""
    entries = []
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another request was faster
            files = entry.iterdir() if entry.is_dir() else [entry]
            entries.append((entry.stat().st_mtime, sum(file.stat().st_size for file in files), entry))
    total = sum(size for _, size, _ in entries)
    for number, (_, size, entry) in enumerate(sorted(entries)):
        if total <= most_bytes and len(entries) - number <= ENTRIES:
            break
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        total -= size


def _kind(scope: Scope) -> str:
    """Of requests that are counted together: those of the page, or of one route."""
    return scope["path"] if scope["path"] in ROUTES else "page"


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _length(scope: Scope) -> int | None:
    """Of the body, in bytes, as announced; None for one in chunks."""
    if _values(scope, b"transfer-encoding"):
        return None
    return int(next(iter(_values(scope, b"content-length")), 0))


def _host_name(host: str) -> str | None:
    """What stands before the port in a Host header, in lower case; None when it is none."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]+)?", host.lower())
    return match and match[1]


def _encode(content: dict[str, Any]) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    text = json.dumps(content).encode()
    return text, [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]


async def _respond(send: Send, status: int, content: dict[str, Any], *more: tuple[str, str]) -> None:
    text, headers = _encode(content)
    headers += [(name.lower().encode(), value.encode()) for name, value in more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
