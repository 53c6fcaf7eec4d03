"""python -m ensemble.serve : an ensemble as a demo page and an HTTP API, on the loopback interface.

    curl --data-binary @cat.jpg http://127.0.0.1:7860/predict

answers with the label, its probability, those of all classes, and every member's vote, as JSON. What is no picture, or
too large a one, is refused in words with status 413 or 415. `--ray-serve` predicts in replicas of a Ray Serve
deployment instead of in this process; page and API are the same.
"""

import contextlib
import math
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ensemble.file import read_ensemble
from ensemble.serve.answer import Answerer
from ensemble.serve.page import Answer, Examples, build_page, mount_options
from trainables.errors import UserError
from trainables.run_directory import open_runs

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

CONNECTIONS = 128  # beyond them requests are told that the server is busy
ONGOING = 64  # requests that a replica works on at a time, which are what it batches


@dataclass(frozen=True)
class Serve:
    """Show an ensemble on a page, and answer pictures over HTTP."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever can reach it can use it: there is no password."""
    port: int = 7860
    """0 takes a free one."""
    device: str | None = None
    """cuda, mps or cpu; default: the first that there is."""
    most_mib: float = 20.0
    """Largest upload."""
    most_megapixels: float = 50.0
    """Largest picture, by its header."""
    ray_serve: bool = False
    """Predict in Ray Serve replicas: those of the cluster when run as its job, else on this machine."""
    replicas: int = 2
    """Of --ray-serve."""


def make_app(answer: Answer, most_bytes: int) -> "FastAPI":
    """POST /predict; the page is mounted on it."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.requests import ClientDisconnect

    app = FastAPI(title="Ninefold", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        try:
            content = await _body(request, most_bytes)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        if content is None:
            limit = f"{most_bytes / 2**20:g} MiB"
            return JSONResponse({"error": f"the upload is too large, expected at most {limit}"}, 413)
        told = await answer(content)
        status = told.pop("status", 200)
        return JSONResponse(told, status)

    return app


async def _body(request: "Request", most_bytes: int) -> bytes | None:
    """The request's body; None when it is too large, of which no more than the limit is ever read."""
    if int(request.headers.get("content-length", 0)) > most_bytes:
        return None
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            return None
        parts.append(part)
    return b"".join(parts)


def gpu_share(gpus: float, replicas: int) -> float:
    """What each replica asks for so that all find room: a share lies on one GPU, so 3 replicas on 2 take a half."""
    return 1 / math.ceil(replicas / gpus) if gpus else 0.0


@contextlib.contextmanager
def replicas(args: Serve, *answerer: Any) -> Iterator[Answer]:
    """An Answerer in each of several Ray Serve replicas, which share the requests; Ray ends with the context."""
    try:
        from ray import serve
    except ImportError:
        raise UserError("--ray-serve needs Ray Serve; pip install 'ninefold[serve]'") from None
    from cluster.connect import connect, disconnect, nodes

    if args.replicas < 1:
        raise UserError(f"--replicas is {args.replicas}, expected at least 1")
    try:
        connect()
    except ConnectionError as error:
        raise UserError(str(error)) from error
    try:
        cpus, gpus = sum(node.cpus for node in nodes()), sum(node.gpus for node in nodes())
        if args.replicas > cpus:
            raise UserError(f"--replicas is {args.replicas}, but there are {cpus:g} CPUs; lower it")
        serve.start(proxy_location="Disabled")  # this process is the front
        deploy = serve.deployment(
            name="ensemble",
            num_replicas=args.replicas,
            max_ongoing_requests=ONGOING,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpu_share(gpus, args.replicas)},
        )
        try:
            handle = serve.run(deploy(Answerer).bind(*answerer), name="ninefold", route_prefix=None)

            async def answer(content: bytes) -> dict[str, Any]:
                return await handle.remote(content)

            yield answer
        finally:
            serve.shutdown()
    finally:
        disconnect()


def serve(args: Serve) -> None:
    """Answer until interrupted. Raises UserError for whatever a user can mend, before anything is answered."""
    runs = open_runs(args.run)
    run = runs[0]
    ensemble = read_ensemble(run, args.ensemble)
    try:
        listener = socket.create_server((args.host, args.port))
    except (OSError, OverflowError) as error:  # the latter for a port beyond 65535
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot listen on {args.host}:{args.port} ({reason}); choose another --port") from None
    most_bytes, most_pixels = round(args.most_mib * 2**20), round(args.most_megapixels * 1e6)
    what = ([str(run.absolute()) for run in runs], args.ensemble, args.device, most_pixels)
    with (
        listener,
        tempfile.TemporaryDirectory(prefix="ninefold-") as uploads,
        replicas(args, *what) if args.ray_serve else contextlib.nullcontext(Answerer(*what)) as answer,
    ):
        page = build_page(run, ensemble, Examples.of(run), answer, Path(uploads))
        import gradio
        import uvicorn

        app = make_app(answer, most_bytes)
        gradio.mount_gradio_app(app, page, path="/", max_file_size=most_bytes, **mount_options())
        address = f"http://{args.host}:{listener.getsockname()[1]}"
        told = f"{run.name}, {len(ensemble.members)} members, at {address} (page) and {address}/predict (HTTP API)"
        print(told, flush=True)
        config = uvicorn.Config(
            app, log_level="warning", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=3, lifespan="on"
        )
        uvicorn.Server(config).run(sockets=[listener])
