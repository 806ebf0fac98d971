"""Progress over all runs of a study: one bar in a terminal, a line for each run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from vlmvqa.extras.run_series.training import duration
from vlmvqa.extras.study.cost import ArmCost
from vlmvqa.extras.study.settings import StudyRun
from vlmvqa.training.log import ProgressBar

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}"


class Progress:
    """What is done of a study's runs, in operations, or in steps where these cannot be counted."""

    def __init__(self, runs: Sequence[StudyRun], left: Sequence[StudyRun], costs: Mapping[str, ArmCost]) -> None:
        countable = all(cost.tera_flop for cost in costs.values())
        self.work = {arm: (cost.tera_flop or 0.0) if countable else float(cost.steps) for arm, cost in costs.items()}
        self.runs, self.number, self.done = len(runs), len(runs) - len(left), 0.0
        self.total = sum(self.work[run.arm] for run in left)
        self.began = time.monotonic()

    def heading(self, run: StudyRun) -> str:
        """Return the number and name of a run, and the time left."""
        left = (time.monotonic() - self.began) * (self.total - self.done) / self.done if self.done else None
        return f"run {self.number + 1} of {self.runs}: {run.name}" + (f", about {duration(left)} left" if left else "")

    def callbacks(self, run: StudyRun) -> list[TrainerCallback]:
        """Return the bar of a run in a terminal."""
        return [StudyBar(self, run)] if sys.stderr.isatty() else []

    def add(self, run: StudyRun) -> None:
        """Count a run as done."""
        self.number, self.done = self.number + 1, self.done + self.work[run.arm]


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
            initial=progress.done + self._work(state, state.global_step),
            desc=f"run {progress.number + 1} of {progress.runs}, {self.run.name}",
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
