"""Progress over all runs of a study: one bar in a terminal, a line for each run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from vlmvqa.extras.run_series.training import duration, is_finished
from vlmvqa.extras.study.cost import ArmCost
from vlmvqa.extras.study.settings import StudyRun
from vlmvqa.training.log import ProgressBar

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}"


class Progress:
    """Progress over a study's runs, those of other processes included: in operations, or in steps if not countable."""

    def __init__(self, runs: Sequence[StudyRun], costs: Mapping[str, ArmCost]) -> None:
        countable = all(cost.tera_flop for cost in costs.values())
        self.work = {arm: (cost.tera_flop or 0.0) if countable else float(cost.steps) for arm, cost in costs.items()}
        self.runs, self.began = runs, time.monotonic()
        self.total = self.left()

    def left(self) -> float:
        """Return the work of the runs that are not finished."""
        return sum(self.work[run.arm] for run in self.runs if not is_finished(run.folder))

    def name(self, run: StudyRun) -> str:
        """Return the name of a run with the number of runs."""
        number = 1 + sum(is_finished(one.folder) for one in self.runs)
        return f"run {number} of {len(self.runs)}: {run.name}"

    def heading(self, run: StudyRun) -> str:
        """Return the name of a run, and the time left."""
        left = self.left()
        seconds = (time.monotonic() - self.began) * left / (self.total - left) if left < self.total else None
        return self.name(run) + ("" if seconds is None else f", about {duration(seconds)} left")

    def callbacks(self, run: StudyRun) -> list[TrainerCallback]:
        """Return the bar of a run in a terminal."""
        return [StudyBar(self, run)] if sys.stderr.isatty() else []


class StudyBar(ProgressBar):
    """A bar over all runs that moves while one of them trains."""

    def __init__(self, progress: Progress, run: StudyRun) -> None:
        super().__init__()
        self.progress, self.run = progress, run

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Create the bar, at the work that was done before."""
        self.current_step = state.global_step
        if not state.is_world_process_zero:
            return
        progress = self.progress
        self.training_bar = tqdm(
            total=progress.total,
            initial=progress.total - progress.left() + self._work(state, state.global_step),
            desc=progress.name(self.run),
            dynamic_ncols=True,
            bar_format=BAR_FORMAT,
            leave=False,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            self.training_bar.update(self._work(state, state.global_step - self.current_step))
            self.current_step = state.global_step

    def _work(self, state: Any, steps: int) -> float:
        return self.progress.work[self.run.arm] * steps / state.max_steps
