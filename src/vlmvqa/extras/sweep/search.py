"""Optuna's study of a sweep, in `journal.log` of its folder: proposals, interrupted trials, pruning.

A proposal depends on the seed, its number and the finished trials only, so it is the same after a kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlmvqa import ranks
from vlmvqa.errors import InputError
from vlmvqa.extras.run_series.locks import try_lock
from vlmvqa.extras.sweep.settings import SweepConfig
from vlmvqa.extras.sweep.space import Parameter, Value

JOURNAL, NAME, RECORD = "journal.log", "sweep", "settings"
ATTEMPTS = 20
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Search:
    """The study of a sweep, on rank 0.

    Raises:
        InputError: the folder holds a sweep with other settings, or none to report.
    """

    trial: optuna.Trial

    def __init__(self, config: SweepConfig) -> None:
        self.config, journal = config, config.run.folder / JOURNAL
        if config.only_report and not journal.is_file():
            raise InputError(f"{config.run.folder} holds no sweep; run it first, without only_report=true")
        if not config.only_report:
            self.lock = try_lock(journal.with_name(".lock"))  # until this process ends
            if self.lock is None:
                raise InputError(f"{config.run.folder}: another command runs this sweep; stop it first")
            _prepare(journal, config.run.overwrite)
        self.storage = JournalStorage(JournalFileBackend(str(journal)))
        exists = any(study.study_name == NAME for study in self.storage.get_all_studies())
        if exists:
            self.study = optuna.load_study(study_name=NAME, storage=self.storage)
        else:
            self.study = optuna.create_study(study_name=NAME, storage=self.storage, direction="maximize")
        if config.search.pruning is not None:
            self.study.pruner = optuna.pruners.MedianPruner(
                config.search.pruning.startup_trials, config.search.pruning.warmup_steps
            )
        else:
            self.study.pruner = optuna.pruners.NopPruner()
        self.space = {key: distribution(parameter) for key, parameter in config.space.items()}
        if not config.only_report:
            self._record_settings(journal)
            self._queue_interrupted()

    def _record_settings(self, journal: Path) -> None:
        search = self.config.search
        record = {
            "size": self.config.size,
            "base": self.config.settings,
            "seed": self.config.seed,
            "space": {key: repr(parameter) for key, parameter in self.space.items()},
            "startup_trials": search.startup_trials,
            "pruning": repr(search.pruning),
        }
        before = self.study.user_attrs.get(RECORD)
        if before is None:
            self.study.set_user_attr(RECORD, record)
        elif changed := [key for key in record if before[key] != record[key]]:
            raise InputError(
                f"{journal}: {', '.join(changed)} differ from the sweep's first start; choose another run.name, or "
                "start over with run.overwrite=true"
            )

    def _queue_interrupted(self) -> None:
        """Queue the trials that an earlier command was training, with their numbers and parameters."""
        study = self.storage.get_study_id_from_name(NAME)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(study, trial.number)
            self.storage.set_trial_state_values(trial_id, TrialState.WAITING)

    def next_trial(self) -> tuple[int, dict[str, Value]] | None:
        """Start an interrupted trial, or else a new one; return its number and parameters, None if there are enough."""
        trials = self.study.get_trials(deepcopy=False)
        if not any(trial.state == TrialState.WAITING for trial in trials):
            if len(trials) >= self.config.trials:
                return None
            for attempt in range(ATTEMPTS):  # TPE's proposal; if it was a trial before, random ones
                proposed = self._propose(len(trials), attempt)
                if proposed not in [trial.params for trial in trials]:
                    break
            self.study.enqueue_trial(proposed)
        self.trial = self.study.ask(self.space)
        return self.trial.number, dict(self.trial.params)

    def _propose(self, number: int, attempt: int) -> dict[str, Value]:
        """Return the parameters that TPE proposes for a trial; numbers have four significant digits."""
        startup = self.config.search.startup_trials
        seed = random.Random(f"{self.config.seed}-{number}-{attempt}").randrange(2**32)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=number + 1 if attempt else startup)
        copy = optuna.create_study(direction="maximize", sampler=sampler)
        copy.add_trials(self.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        proposed = copy.ask(self.space).params
        for key, parameter in self.config.space.items():
            if not parameter.choices and isinstance(proposed[key], float):
                proposed[key] = min(max(float(f"{proposed[key]:.4g}"), parameter.low), parameter.high)
        return proposed

    def finish(self, error: str | None, pruned: bool) -> str:
        """Record the result of the trial that `next_trial` started; return a line that reports it."""
        trial, name = self.trial, f"trial {self.trial.number}"
        if pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            return f"{name}: pruned"
        if error is None:
            path = self.config.run.folder / f"trial-{trial.number}" / "metrics.json"
            found = json.loads(path.read_text(encoding="utf-8"))
            score = found["metrics"][found["metric"]]["overall"]
            if score is not None:
                self.study.tell(trial, score)
                best = self.study.best_trial
                return f"{name}: {score:.2f}; best: trial {best.number}, {best.value:.2f}"
            error = "no evaluated question has an answer, so there is no score"
        trial.set_user_attr("error", error)
        self.study.tell(trial, state=TrialState.FAIL)
        return f"{name} failed: {error}"


def _prepare(journal: Path, overwrite: bool) -> None:
    """Delete a sweep that is overwritten; drop an incomplete last line and the lock of a command that was killed."""
    if overwrite and journal.is_file():
        for folder in journal.parent.glob("trial-*"):
            shutil.rmtree(folder)
        journal.unlink()
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)
    if journal.is_file():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of a parameter."""
    low, high = parameter.low, parameter.high
    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, parameter.log)
    return FloatDistribution(low, high, parameter.log)


class Pruning(TrainerCallback):
    """Report the score of every evaluation to Optuna, and end the training of all ranks if it prunes the trial.

    Args:
        trial: Optuna's trial on rank 0; None on the others.
        metric: the score that is reported.
    """

    def __init__(self, trial: optuna.Trial | None, metric: str) -> None:
        self.trial, self.key, self.pruned = trial, f"eval_{metric}", False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a kill: end a trial whose last evaluation has already pruned it, after one more step."""
        step = state.global_step
        if 0 < step < state.max_steps and ranks.broadcast_from_rank0(lambda: self._was_pruned(step)):
            self.pruned = control.should_training_stop = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **_: Any,
    ) -> None:
        """Report the score; a training that ends anyway is not pruned."""
        step, score = state.global_step, metrics.get(self.key)
        ends = step >= state.max_steps or control.should_training_stop
        if score is not None and ranks.broadcast_from_rank0(lambda: self._is_pruned(step, score)) and not ends:
            self.pruned = control.should_training_stop = True

    def _reported(self) -> Mapping[int, float]:
        """Return the reported scores by step; on rank 0."""
        assert self.trial is not None
        return self.trial.study.trials[self.trial.number].intermediate_values

    def _was_pruned(self, step: int) -> bool:
        assert self.trial is not None
        return step == max(self._reported(), default=0) and self.trial.should_prune()

    def _is_pruned(self, step: int, score: float) -> bool:
        assert self.trial is not None
        before = self._reported()
        if step < max(before, default=0):  # repeated after a kill: the trial was not pruned here
            return False
        if step not in before:
            self.trial.report(score, step)
        return self.trial.should_prune()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise TrialPruned on all ranks, after the trainer's own callbacks have ended the training."""
        if self.pruned:
            raise optuna.TrialPruned
