"""python -m ensemble.serve : an ensemble as a demo page and an HTTP API, on the loopback interface.

    curl --data-binary @cat.jpg http://127.0.0.1:7860/predict

answers with the label, its probability, those of all classes, and every member's vote, as JSON. What is no picture, or
too large a one, is refused in words with status 413 or 415; a busy server answers 503 with Retry-After.

    curl -F files=@cat.jpg -F files=@dog.jpg http://127.0.0.1:7860/predict/batch

answers several at once, each as above. GET /health says that the server runs, /metrics counts for Prometheus, /drift
compares the last answers with those to the select split, and /openapi.json describes all of it. `--ray-serve` predicts
in replicas of a Ray Serve deployment instead of in this process; page and API are the same.

On the loopback interface the server answers requests for its own names only. Beyond it a token is needed:

    NINEFOLD_TOKEN=SECRET python -m ensemble.serve --host 0.0.0.0
    curl -H 'Authorization: Bearer SECRET' --data-binary @cat.jpg http://HOST:7860/predict

and http://HOST:7860/?token=SECRET for the page. Without TLS in front of it whoever sees the traffic can read it.
"""

import contextlib
import functools
import ipaddress
import logging
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import tyro

from ensemble.file import read_ensemble
from ensemble.serve.answer import Answerer
from ensemble.serve.drift import Drift, Reference
from ensemble.serve.page import Answer, Examples, build_page, mount_options
from trainables.errors import UserError
from trainables.run_directory import open_runs, read_run

TOKEN = "NINEFOLD_TOKEN"  # environment variable
ONGOING = 64  # requests that a replica works on at a time, which are what it batches


@dataclass(frozen=True)
class Serve:
    """Show an ensemble on a page, and answer pictures over HTTP."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = ()
    """Run directory; default: the newest under runs/. Where the ensemble merges runs, all of them, its own first."""
    ensemble: str | None = None
    """Name of an ensemble of the run; default: the one written last."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs a token."""
    port: int = 7860
    """0 takes a free one."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Answer only those who send it; default: $NINEFOLD_TOKEN, which no list of processes shows."""
    device: str | None = None
    """cuda, mps or cpu; default: the first that there is."""
    most_mib: float = 20.0
    """Largest upload."""
    most_megapixels: float = 50.0
    """Largest picture, by its header."""
    most_seconds: float = 20.0
    """Longest time that a request's head may take to arrive, and its body."""
    ray_serve: bool = False
    """Predict in Ray Serve replicas: those of the cluster when run as its job, else on this machine."""
    replicas: int = 2
    """Of --ray-serve."""


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


def open_listener(host: str, port: int, token: str) -> tuple[socket.socket, bool]:
    """A listening socket, and whether only this machine can reach it.

    Raises UserError when that fails, and when other machines could reach it without a token.
    """
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:  # the latter for a port beyond 65535
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --port") from None
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    if not is_local and not token:
        listener.close()
        raise UserError(f"--host {host} lets other machines in, which needs a token; set {TOKEN} or give --token")
    return listener, is_local


def serve(args: Serve) -> None:
    """Answer until interrupted. Raises UserError for whatever a user can fix, before anything is answered."""
    try:
        from ensemble.serve.metrics import Metrics
    except ImportError:
        raise UserError("the server needs the package prometheus-client; pip install 'ninefold[serve]'") from None
    runs = open_runs(args.run)
    run, ensemble = runs[0], read_ensemble(runs[0], args.ensemble)
    token = (args.token or os.environ.get(TOKEN, "")).strip()
    listener, is_local = open_listener(args.host, args.port, token)
    most_bytes, most_pixels = round(args.most_mib * 2**20), round(args.most_megapixels * 1e6)
    what = ([str(run.absolute()) for run in runs], args.ensemble, args.device, most_pixels)
    with (
        listener,
        tempfile.TemporaryDirectory(prefix="ninefold-") as uploads,
        replicas(args, *what) if args.ray_serve else contextlib.nullcontext(Answerer(*what)) as answer,
    ):
        metrics = Metrics(Drift(read_run(run).classes, Reference.of(runs, ensemble)), ensemble.risk is not None)
        answer = metrics.counted(answer)
        page = build_page(run, ensemble, Examples.of(run), answer, Path(uploads))
        import gradio
        import uvicorn

        from ensemble.serve.document import describe_api
        from ensemble.serve.guard import LOOPBACK, Connection, Guard
        from ensemble.serve.routes import Counted, make_app

        about = {"run": run.name, "ensemble": ensemble.name, "members": len(ensemble.members)}
        document = describe_api(ensemble.risk is not None, bool(token))
        app = make_app(answer, about, metrics, document)
        gradio.mount_gradio_app(app, page, path="/", max_file_size=most_bytes, **mount_options())
        hosts = (*LOOPBACK, args.host.lower()) if is_local else None
        guard = Guard(app, hosts, token, most_bytes, args.most_seconds, Path(uploads))  # type: ignore[arg-type]
        address = f"http://{args.host}:{listener.getsockname()[1]}"
        members = len(ensemble.members)
        print(
            f"{run.name}, {members} member{'s' * (members != 1)}, at {address} (page) and {address}/predict (HTTP API)"
        )
        if token:
            shown = quote(args.token.strip(), safe="") if args.token else f"${TOKEN}"
            print(f"with a token: {address}/?token={shown} (page) and 'Authorization: Bearer TOKEN' (HTTP API)")
        sys.stdout.flush()
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # as uvicorn's below
        config = uvicorn.Config(
            Counted(guard, metrics),  # type: ignore[arg-type]
            http=functools.partial(Connection, seconds=args.most_seconds),  # type: ignore[arg-type]
            ws="none",
            log_level="error",  # what is wrong with a request is said to its sender; a log of it could fill a disk
            timeout_graceful_shutdown=3,
            lifespan="on",
        )
        uvicorn.Server(config).run(sockets=[listener])
