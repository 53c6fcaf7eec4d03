"""What a user got wrong, told in one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can fix. The message says what was wrong, what was expected and what to do.

    Not a ValueError: argument parsers catch these and wrap them in pages of usage.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; every command's main() runs inside it."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
