"""One process at a time in a run directory."""

from filelock import FileLock, Timeout
from upath import UPath

from trainables.errors import UserError
from trainables.storage import is_local


def lock_run(run: UPath) -> FileLock | None:
    """A lock that is held until this process ends: two in one run directory would train the same trials.

    None for a remote run, as object stores have no locks. Raises UserError when another process holds it.
    """
    if not is_local(run):
        return None
    lock = FileLock(str(run / ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another search is at work in {run}; wait for it, or name another run with --run") from None
    return lock
