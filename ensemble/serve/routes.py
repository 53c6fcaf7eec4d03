"""The HTTP API: one picture, a batch of them, and what a server says about itself."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.routing import Route

from ensemble.serve.guard import (
    BATCH,
    DOCUMENT,
    DRIFT,
    HEALTH,
    METRICS,
    PREDICT,
    RETRY,
    ROUTES,
    App,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
)
from ensemble.serve.metrics import CONTENT_TYPE, Metrics
from ensemble.serve.page import Answer

MOST_PICTURES = 32  # of a batch
BATCHES = 4  # that are answered at a time: their pictures and those of single requests together can wait for decoding
LONGEST_END = 300  # bytes of a form's last line; a boundary has 70 at most (RFC 2046)
FILES = "files"  # the name of a batch's fields
PAGE = "page"  # the route of all that the demo page asks for; its streams stay open, so they have no latency
LEFT = "left"  # the status of a request whose client left before it was answered

T = TypeVar("T")


def make_app(answer: Answer, about: dict[str, Any], metrics: Metrics, document: dict[str, Any]) -> FastAPI:
    """All routes of ensemble/serve/document.py; GET /health says `about`. The page is mounted on it.

    document: what is answered at /openapi.json. FastAPI would derive one, too, but knows nothing of the guard.
    """
    app = FastAPI(title="Ninefold", openapi_url=None, docs_url=None, redoc_url=None)  # its pages load scripts from afar
    turns = asyncio.Semaphore(BATCHES)

    async def answer_one(picture: bytes) -> dict[str, Any]:
        return await answer(picture)

    async def answer_all(pictures: list[bytes]) -> list[dict[str, Any]]:
        async with turns, asyncio.TaskGroup() as group:
            answering = [group.create_task(answer_one(picture)) for picture in pictures]
        return [one.result() for one in answering]

    @app.post(PREDICT)
    async def predict(request: Request) -> Response:
        result = await _while_connected(request, answer(await request.body()))
        if result is None:
            return Response(status_code=400)  # nobody is there to read it
        status = result.pop("status", 200)
        return JSONResponse(result, status, {"Retry-After": RETRY} if status == 503 else None)

    @app.post(BATCH)
    async def predict_batch(request: Request) -> Response:
        answers = await _while_connected(request, answer_all(await _read_pictures(request)))
        return Response(status_code=400) if answers is None else JSONResponse({"answers": answers})

    @app.get(HEALTH)
    async def health() -> dict[str, Any]:
        return {"status": "ok", **about}

    @app.get(METRICS)
    async def tell_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get(DRIFT)
    async def tell_drift() -> Response:
        return JSONResponse(metrics.drift.report())

    @app.get(DOCUMENT)
    async def describe() -> Response:
        return JSONResponse(document)

    for path, method in (
        (PREDICT, "POST"),
        (BATCH, "POST"),
        *((path, "GET") for path in (HEALTH, METRICS, DRIFT, DOCUMENT)),
    ):
        app.router.routes.append(Route(path, _OtherMethods(method)))

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:
        return JSONResponse({"error": str(refused)}, refused.status, dict(refused.headers))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server failed; its log says why"}, 500)

    return app


class _OtherMethods:
    """An ASGI app for the methods that a route does not have, to which the page, mounted, would say "Not Found"."""

    def __init__(self, allowed: str) -> None:
        self.allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        what = " with the bytes of a picture" if scope["path"] == PREDICT else ""
        told = {"error": f"expected a {self.allowed} request{what}"}
        await JSONResponse(told, 405, {"Allow": self.allowed})(scope, receive, send)


class Counted:
    """An ASGI app, of which every answer is counted: it stands before the guard, so refusals are, too.

    What is no HTTP has no route; uvicorn answers it by itself, uncounted.
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else PAGE
        start, status = time.perf_counter(), LEFT

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            seconds = None if route == PAGE else time.perf_counter() - start
            self.metrics.note_request(route, status, seconds)


async def _read_pictures(request: Request) -> list[bytes]:
    """The files of a form. Raises Refused when it is none, is cut off, or has too many, none, or anything else."""
    expected = f"expected a form with 1 to {MOST_PICTURES} pictures as {FILES}"
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise Refused(415, f"{expected}, as multipart/form-data")
    end = b""

    async def receive() -> Message:
        nonlocal end
        message = await request.receive()
        end = (end + message.get("body", b""))[-LONGEST_END:]
        return message

    try:
        async with Request(request.scope, receive).form(max_files=MOST_PICTURES, max_fields=0) as form:
            files = [file for name, file in form.multi_items() if name == FILES and isinstance(file, UploadFile)]
            if not end.rstrip().endswith(b"--" + options[b"boundary"] + b"--"):  # the parser leaves the last part away
                raise Refused(400, f"{expected}; this one is cut off")
            if not files or len(files) < len(form.multi_items()):
                raise Refused(400, f"{expected}, and nothing else")
            return [await file.read() for file in files]
    except HTTPException as error:
        raise Refused(400, f"{expected}; this one cannot be read: {error.detail}") from None


async def _while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """What comes of `work`; None once the client has left, for whom it is cancelled. The request's body has come."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body has come, so nothing else can follow
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
