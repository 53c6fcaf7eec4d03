"""The right to write to a run directory on an object store, which knows no locks.

It is a small file that its owner renews while it lives. Whoever wants it and finds it watches it for a while: a file
that is renewed has an owner who lives; one that is not was left behind by a process that was killed, and is taken over.
Nobody's clock is compared with another's. The store sees to it that of two who create the file one succeeds (a
conditional put: S3 and what speaks its protocol, Google's and Azure's stores).
"""

import json
import platform
import threading
import time
import uuid
from typing import Any

from upath import UPath

from trainables.errors import UserError
from trainables.storage import Damaged, StorageLost, patiently, read_json, write_json

RENEW_S = 10.0
STALE_S = 45.0  # without renewal, after which the owner counts as dead
LOOK_S = 1.0


class Lease:
    """Held from here on until `release`, or until the process ends.

    Raises UserError when somebody else holds it and lives.
    """

    def __init__(self, run: UPath) -> None:
        self.path, self.owner = run / "lease.json", uuid.uuid4().hex
        self.count, self.lost = 0, False
        self._ended = threading.Event()
        self._take()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError when somebody else has taken it over, because this process was away for too long."""
        if self.lost:
            raise UserError(f"another search has taken over {self.path.parent}; this one ends, and has lost nothing")

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        if not self.lost and self._read().get("owner") == self.owner:
            patiently(self.path, lambda: self.path.unlink(missing_ok=True))

    def _take(self) -> None:
        while not self._create():
            stale = self._watch()
            if stale and self._read() == stale:
                patiently(self.path, lambda: self.path.unlink(missing_ok=True))
        time.sleep(LOOK_S)  # two that found it stale at once may both have deleted it: the later one stands
        if self._read().get("owner") != self.owner:
            raise UserError(_taken(self.path.parent, self._read()))

    def _watch(self) -> dict[str, Any]:
        """Return once it is gone ({}) or has not been renewed for STALE_S seconds (its content); raise UserError as
        soon as it is renewed."""
        before, since = self._read(), time.monotonic()
        while before and time.monotonic() - since < STALE_S:
            time.sleep(LOOK_S)
            now = self._read()
            if not now:
                return {}
            if now != before:
                raise UserError(_taken(self.path.parent, now))
        return before

    def _create(self) -> bool:
        try:
            patiently(self.path, lambda: self.path.fs.pipe_file(self.path.path, self._content(), mode="create"))
        except FileExistsError:
            # the answer to a put that did succeed may have been lost
            return bool(self._read().get("owner") == self.owner)
        return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.lost = self._read().get("owner") != self.owner
                if self.lost:
                    return
                self.count += 1
                write_json(self.path, json.loads(self._content()))
            except StorageLost:
                continue  # the next one may succeed; if somebody has taken over by then, it is seen

    def _content(self) -> bytes:
        return json.dumps({"owner": self.owner, "machine": platform.node(), "renewed": self.count}).encode()

    def _read(self) -> dict[str, Any]:
        try:
            return patiently(self.path, lambda: read_json(self.path))
        except Damaged:
            return {}


def _taken(run: UPath, lease: dict[str, Any]) -> str:
    machine = str(lease.get("machine", "another machine"))[:80]
    return f"another search is at work in {run}, on {machine}; wait for it, or name another run with --run"
