"""python -m search.fetch --space auto --to FOLDER : a space's pretrained weights, for machines that reach no hub.

    python -m search.fetch --to weights          here, where there is a network
    python -m search.run --weights-dir weights   there, where there is none

Each file is <timm name>.safetensors, loaded into its network before it is left. LICENCES.md says where each comes from
and under which licence, and what could not be had and why. The same command again fetches only what is missing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from upath import UPath

from search.spaces import load_space
from trainables.command import progress
from trainables.errors import UserError, exit_on_user_error
from trainables.models.backbones import check_backbone, plain_name
from trainables.models.classic import NETWORKS
from trainables.models.licences import UNKNOWN, is_restricted
from trainables.models.store import Stored, store_weights
from trainables.storage import write_bytes

LICENCES = "LICENCES.md"


@dataclass(frozen=True)
class Fetch:
    """Put a space's pretrained weights into a folder, for machines that reach no hub."""

    to: Path
    """Folder to put them into; it is made. Sweeps take it with --weights-dir."""
    space: str = "auto"
    """Search space: a name in search/spaces/, or the path of a Python file like those."""
    backbones: tuple[str, ...] = ()
    """Backbones instead of the space's: timm names, hf-hub:timm/NAME, squeezenet1_1."""
    weights_licence: Literal["permissive", "any"] = "permissive"
    """Of the space's backbones those whose weights are under permissive licences, or all."""


def fetch(args: Fetch) -> tuple[list[Stored], dict[str, str]]:
    """What the folder holds now of the space's pretrained backbones; and what could not be had, with the reasons.

    Raises UserError, before anything is written, for an unknown space or backbone, and for one without such backbones.
    """
    names = wanted(args)
    if args.to.exists() and not args.to.is_dir():
        raise UserError(f"{args.to} is a file, expected a folder; name another --to")
    try:
        args.to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {args.to} cannot be made ({error.strerror}); name another --to") from None
    stored, missing = [], {}
    with progress("fetching weights", len(names)) as advance:
        for name in names:
            try:
                stored.append(store_weights(name, args.to))
            except UserError as error:
                missing[name] = str(error)
            except OSError as error:  # no room, no permission
                raise UserError(f"{args.to}/{name}.safetensors cannot be written ({error})") from None
            advance(1)
    write_bytes(UPath(args.to / LICENCES), table(stored, missing).encode())
    return stored, missing


def wanted(args: Fetch) -> list[str]:
    """The pretrained backbones that are asked for, by timm's names."""
    if args.backbones:
        names = list(args.backbones)
    else:
        starts = load_space(args.space).backbones
        names = [name for name, start in starts.items() if start != "scratch"]
        if args.weights_licence == "permissive":
            names = [name for name in names if starts[name] != "if found" or not is_restricted(plain_name(name))]
    names = list(dict.fromkeys(plain_name(name) for name in names))
    for name in names:
        check_backbone(name)
    names = [name for name in names if name not in NETWORKS]
    if not names:
        raise UserError(f"space {args.space} has no pretrained backbones, so there is nothing to fetch")
    return names


def table(stored: Sequence[Stored], missing: dict[str, str]) -> str:
    """LICENCES.md."""
    lines = [
        "# Weights and their licences",
        "",
        "Written by `python -m search.fetch`. A licence is what the source says; the images that the weights were",
        "trained on may have terms of their own.",
        "",
        "| backbone | licence | MiB | from |",
        "|---|---|---|---|",
        *[f"| `{one.file}` | {_cell(one.licence)} | {one.bytes / 2**20:.1f} | {_cell(one.source)} |" for one in stored],
    ]
    if any(one.licence == UNKNOWN for one in stored):
        lines += ["", f"`{UNKNOWN}`: the source does not say; ask there before you pass these weights on."]
    if missing:
        lines += ["", "## What could not be had", ""]
        lines += [f"- `{name}`: {_cell(reason)}" for name, reason in missing.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m search.fetch") -> None:
    with exit_on_user_error():
        args = tyro.cli(Fetch, description=Fetch.__doc__, prog=prog, args=arguments)
        stored, missing = fetch(args)
        if missing:  # mostly all for one reason, that no hub can be reached; LICENCES.md has each one's
            first = next(iter(missing))
            more = f", nor {', '.join([*missing][1:])}" if len(missing) > 1 else ""
            print(f"{first} could not be had: {missing[first]}{more}", file=sys.stderr)
        if not stored:
            raise UserError(f"none of {len(missing)} backbones could be had; {args.to / LICENCES} says why")
        new = [one for one in stored if one.is_new]
        mib = sum(one.bytes for one in stored) / 2**20
        print(f"{args.to}: weights of {len(stored)} backbones, {len(new)} of them new, {mib:.0f} MiB")
        print(f"licences: {args.to / LICENCES}")
        print(f"next: python -m search.run --data folder --data-dir PHOTOS --weights-dir {args.to}")


if __name__ == "__main__":
    main()
