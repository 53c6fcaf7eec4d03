"""New trials: asked of the study's sampler until one can be trained in the time left; near the end, members again."""

import json
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from ensemble.running import EnsembleSoFar
from search.study.sampler import Retell, ViewSampler
from search.timing import Timing
from trainables.config import TrialConfig
from trainables.errors import UserError
from trainables.run_directory import trial_id

MOST_INVALID = 50  # proposals in a row that cannot be trained: the space is wrong, not unlucky
MOST_TOO_SLOW = 20  # proposals in a row that do not fit into the time left

# Makes the TrialConfig of an Optuna trial, given the seconds that are left (inf: no limit). Raises UserError for
# parameters that cannot be trained: then the proposal counts as invalid, and there is another.
Suggest = Callable[[Trial, float], TrialConfig]


class Proposals:
    """Asks the study for trials, and knows what has been proposed.

    Args:
        study: its sampler is replaced by one that sees the trials as `retell` tells them (see view.py).
        time: what is left, and what trials take.
        live: the ensemble so far, whose members may get new seeds.
        suggest: the space's.
    """

    def __init__(
        self, study: optuna.Study, time: Timing, live: EnsembleSoFar | None, retell: Retell, suggest: Suggest
    ) -> None:
        self.study, self.time, self.live, self.suggest = study, time, live, suggest
        self.seeds: dict[str, str] = {}  # trials that are only a new seed -> whose configuration it is
        self.out_of_time = False  # too little is left for even one epoch of the next trial
        self.known: set[str] = set()  # parameters of all trials of this sweep
        seed = len(study.get_trials(deepcopy=False))
        self.sampler = study.sampler = ViewSampler(study.sampler, study, retell, seed)

    def note(self, trial: FrozenTrial | Trial) -> None:
        """Take up a trial that this process or an earlier one has proposed."""
        if "seed_of" in trial.user_attrs:
            self.seeds[trial_id(trial.number)] = trial.user_attrs["seed_of"]
        if "config" in trial.user_attrs:
            self.known.add(_key(trial.params))

    def ask(self) -> Trial | None:
        """A new trial with a configuration that can be trained in the time left, or None.

        Raises UserError when the space proposes nothing that can be trained.
        """
        reason, too_slow, repeated = "", 0, False
        for _ in range(MOST_INVALID):
            self.sampler.exploring = repeated
            trial = self.study.ask()
            try:
                config = self.suggest(trial, self.time.left())
                # the next proposal is a random one; a probe is the same whenever it is made
                if (not repeated or config.is_probe) and self._tried_before(trial):
                    repeated = True
                    raise UserError("these parameters have been tried")
            except UserError as error:
                trial.set_user_attr("outcome", "invalid")
                trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
                reason = str(error)
                continue
            shortened = self.time.fit(config)
            if shortened is None:
                self.study.tell(trial, state=TrialState.FAIL)
                too_slow, repeated = too_slow + 1, True  # something else, which the sampler would not propose
                if too_slow == MOST_TOO_SLOW:
                    self.out_of_time = True
                    return None
                continue
            trial.set_user_attr("config", shortened.to_dict())
            self.note(trial)
            return trial
        raise UserError(
            f"{MOST_INVALID} proposals in a row cannot be trained, the last because {reason}; fix the space"
        )

    def enqueue_seed(self) -> None:
        """Make the next proposal a member of the ensemble again, with another seed.

        Members take turns, the heaviest first. A space gives every trial a seed of its own (its number).
        """
        weights: dict[str, float] = {}  # of a configuration: its seeds' together
        for id, weight in (self.live.members if self.live is not None else {}).items():
            if id.isdigit():  # others were added by other tools
                weights[self.seeds.get(id, id)] = weights.get(self.seeds.get(id, id), 0.0) + weight
        trials = self.study.get_trials(deepcopy=False)
        known = {id: trials[int(id)] for id in weights if int(id) < len(trials) and trials[int(id)].params}
        if known:
            taken = list(self.seeds.values())
            root = min(known, key=lambda id: (taken.count(id), -weights[id]))
            self.study.enqueue_trial(known[root].params, user_attrs={"seed_of": root})

    def _tried_before(self, trial: Trial) -> bool:
        """Whether a sampler saw its favourite again and would pay for it again.

        Another seed is no repetition; nor is the next of a space of fixed recipes, whose number alone tells it apart.
        """
        return bool(trial.params) and "seed_of" not in trial.user_attrs and _key(trial.params) in self.known


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)
