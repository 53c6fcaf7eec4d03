"""New trials: asked of the sampler until one can be trained in the time left; near the end, members again."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.trial import Trial

from ensemble.running import EnsembleSoFar
from search.study.sampling import Sampling
from search.timing import Timing
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.job import Outcome
from trainables.run.records import Records, TrialRecord

MOST_INVALID = 50  # proposals in a row that cannot be trained: the space is wrong, not unlucky
MOST_TOO_SLOW = 20  # proposals in a row that do not fit into the time left
MOST_REPEATED = 100  # random proposals in a row that have been tried: there is nothing new

# Makes the TrialConfig of an Optuna trial, given the seconds that are left (inf: no limit). Raises UserError for
# parameters that cannot be trained: then the proposal counts as invalid, and there is another.
Suggest = Callable[[Trial, float], TrialConfig]


@dataclass(frozen=True)
class Queued:
    """A proposal to be made next: its parameters, or some of them; and of which trial it is a new seed."""

    params: dict[str, Any]
    seed_of: str = ""


class Proposals:
    """Asks the sampler for trials, and knows what has been proposed.

    Args:
        records: of all trials so far; new ones are added.
        sampling: the sampler.
        time: what is left, and what trials take.
        live: the ensemble so far, whose members may get new seeds.
        suggest: the space's.
    """

    def __init__(
        self, records: Records, sampling: Sampling, time: Timing, live: EnsembleSoFar | None, suggest: Suggest
    ) -> None:
        self.records, self.sampling, self.time, self.live, self.suggest = records, sampling, time, live, suggest
        self.queue: list[Queued] = []
        self.seeds: dict[str, str] = {}  # trials that are only a new seed -> whose configuration it is
        self.exhausted = False  # nothing new is left to propose, or too little time for even one epoch of it
        self.known: set[str] = set()  # parameters of all trials of this sweep
        for record in records:
            self._note(record)

    def enqueue(self, first: Iterable[dict[str, Any]]) -> None:
        """Let these be proposed next, in order; those that were in an earlier process are not again."""
        made = {_key(record.given) for record in self.records if record.given}
        self.queue += [Queued(params) for params in first if _key(params) not in made]

    def enqueue_seed(self) -> None:
        """Make the next proposal a member of the ensemble again, with another seed.

        Members take turns, the heaviest first. A space gives every trial a seed of its own (its number).
        """
        weights: dict[str, float] = {}  # of a configuration: its seeds' together
        for id, weight in (self.live.members if self.live is not None else {}).items():
            root = self.seeds.get(id, id)
            if root in self.records and self.records[root].params:  # others were added by other tools
                weights[root] = weights.get(root, 0.0) + weight
        if weights:
            taken = list(self.seeds.values())
            root = min(weights, key=lambda id: (taken.count(id), -weights[id]))
            self.queue.insert(0, Queued(self.records[root].params, root))

    def ask(self) -> TrialRecord | None:
        """The record of a new trial with a configuration that can be trained in the time left, or None.

        Raises UserError when the space proposes nothing that can be trained. Proposals that only repeat what has been
        tried, and those that are too slow now, are no fault of the space: then there is no new trial any more.
        """
        invalid = too_slow = repeated = 0
        exploring = False
        while True:
            queued = self.queue.pop(0) if self.queue else Queued({})
            records = self.records
            trial = self.sampling.ask(records.next_number, records.changes, queued.params, exploring)
            try:
                config = self.suggest(trial, self.time.left())
            except UserError as error:
                self._refuse(trial, queued, Outcome.INVALID, str(error))
                invalid += 1
                if invalid == MOST_INVALID:
                    raise UserError(
                        f"{invalid} proposals cannot be trained, the last because {error}; fix the space"
                    ) from None
                continue
            # the next proposal is a random one; a probe is the same whenever it is made
            is_new = not trial.params or bool(queued.seed_of) or _key(trial.params) not in self.known
            if not is_new and (not exploring or config.is_probe):
                self._refuse(trial, queued, Outcome.REPEATED)
                exploring, repeated = True, repeated + 1
                if repeated == MOST_REPEATED:
                    self.exhausted = True
                    return None
                continue
            shortened = self.time.fit(config)
            if shortened is None:
                self._refuse(trial, queued, Outcome.NOT_STARTED)
                exploring, too_slow = True, too_slow + 1  # something else, which the sampler would not propose
                if too_slow == MOST_TOO_SLOW:
                    self.exhausted = True
                    return None
                continue
            record = records.put(_record(trial, queued, shortened))
            self._note(record)
            return record

    def _refuse(self, trial: Trial, queued: Queued, outcome: Outcome, error: str = "") -> None:
        self.sampling.refuse(trial)
        record = _record(trial, queued, None)
        self.records.note(record.ends(outcome, error=error, ended=record.began))

    def _note(self, record: TrialRecord) -> None:
        """Take up a trial that this process or an earlier one has proposed."""
        if record.seed_of:
            self.seeds[record.id] = record.seed_of
        if record.config is not None:
            self.known.add(_key(record.params))


def with_backbones(first: Iterable[dict[str, Any]], backbones: list[str]) -> list[dict[str, Any]]:
    """Those of a space's own first configurations whose backbones take part."""
    return [params for params in first if params.get("backbone", backbones[0]) in backbones]


def _record(trial: Trial, queued: Queued, config: TrialConfig | None) -> TrialRecord:
    return TrialRecord(
        trial.number, params=trial.params, given=queued.params, config=config, seed_of=queued.seed_of,
        # the same few texts for all trials
        distributions={name: sys.intern(distribution_to_json(kind)) for name, kind in trial.distributions.items()},
        began=time.time(),
    )  # fmt: skip


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)
