"""Run a sweep: train trial after trial, continue after a kill, and report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

import optuna

from vlmvqa import ranks
from vlmvqa.extras.run_series.training import ask_rank0, duration, run_job
from vlmvqa.extras.sweep.report import write_report
from vlmvqa.extras.sweep.search import Pruning, Search
from vlmvqa.extras.sweep.settings import SweepConfig, check_space, trial_config
from vlmvqa.extras.sweep.space import Value, override
from vlmvqa.training.run import train


def run_sweep(config: SweepConfig) -> bool:
    """Train the trials that are missing and write the report; return whether a signal stopped the sweep."""
    metric = check_space(config)
    opened: list[Search] = []  # on rank 0
    ask_rank0(lambda: opened.append(Search(config)))
    began, trained = time.monotonic(), 0
    while not config.only_report and (asked := ask_rank0(lambda: opened[0].next_trial())) is not None:
        number, parameters = asked
        left = (time.monotonic() - began) / trained * (config.trials - number) if trained else 0
        rest = f", about {duration(left)} left" if trained else ""
        shown = " ".join(override(key, value) for key, value in parameters.items())
        ranks.print_on_rank0(f"\ntrial {number} ({number + 1} of {config.trials}{rest}): {shown}")
        if _train_trial(config, number, parameters, opened[0] if opened else None):
            ranks.print_on_rank0("the sweep continues with the same command")
            return True
        trained += 1
    if opened:
        write_report(opened[0].study, config, metric)
    return False


def _train_trial(config: SweepConfig, number: int, parameters: Mapping[str, Value], search: Search | None) -> bool:
    """Train a trial and record its result; return whether a signal stopped it."""
    callbacks: list[Pruning] = []

    def start() -> bool:
        run = trial_config(config, number, parameters)
        callbacks.append(Pruning(search.trial if search else None, run.data.metric))
        with suppress(optuna.TrialPruned):
            return train(run, callbacks)
        return False

    def record(error: str | None) -> None:
        if search is not None:
            print(search.finish(error, pruned=any(callback.pruned for callback in callbacks)), flush=True)

    return run_job(start, record)
