"""python -m ensemble.serve : an ensemble as a demo page and an HTTP API; see app.py."""

import contextlib
import signal
from collections.abc import Sequence

import tyro

from ensemble.serve.app import Serve, serve
from trainables.errors import exit_on_user_error


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ensemble.serve") -> None:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # ends Ray, too
    with exit_on_user_error(), contextlib.suppress(KeyboardInterrupt):
        serve(tyro.cli(Serve, description=Serve.__doc__, prog=prog, args=arguments))


if __name__ == "__main__":
    main()
