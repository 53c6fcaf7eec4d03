"""python -m trainables.explore : one page on a data set; see findings.py."""

import sys
from collections.abc import Sequence

import tyro

from trainables.errors import UserError, exit_on_user_error
from trainables.explore.findings import Explore, explore, summary


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainables.explore") -> None:
    with exit_on_user_error():
        words = sys.argv[1:] if arguments is None else list(arguments)
        if words and not words[0].startswith("-"):
            raise UserError(f"{words[0]!r} is no option; did you mean --data folder --data-dir {words[0]}?")
        args = tyro.cli(Explore, description=Explore.__doc__, prog=prog, args=arguments)
        found = explore(args)
        print("\n".join(summary(found)))
        print(f"written to {args.out}")
        if args.fiftyone is not None:
            print(f"exported to {args.fiftyone}")


if __name__ == "__main__":
    main()
