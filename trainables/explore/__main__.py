"""python -m trainables.explore : one page on a data set; see findings.py."""

from collections.abc import Sequence

import tyro

from trainables.errors import exit_on_user_error
from trainables.explore.findings import Explore, explore, summary


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainables.explore") -> None:
    with exit_on_user_error():
        args = tyro.cli(Explore, description=Explore.__doc__, prog=prog, args=arguments)
        found = explore(args)
        print("\n".join(summary(found)))
        print(f"written to {args.out}")
        if args.fiftyone is not None:
            print(f"exported to {args.fiftyone}")


if __name__ == "__main__":
    main()
