"""HELM's runner, with several threads only while the model answers.

nltk's word_tokenize releases Python's global lock a dozen times per text. With 32 threads waiting for the lock, BLEU
takes five times as long as with one: a minute more for a thousand questions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec, Executor
from helm.benchmark.runner import Runner


class AnsweringExecutor(Executor):
    """Use the configured number of threads while questions are answered, one before and after."""

    def __init__(self, execution_spec: ExecutionSpec) -> None:
        super().__init__(execution_spec)
        self.several, self.one = execution_spec, replace(execution_spec, parallelism=1)
        self.execution_spec = self.one

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Answer all requests."""
        self.execution_spec = self.several
        try:
            answered: ScenarioState = super().execute(scenario_state)
            return answered
        finally:
            self.execution_spec = self.one


class AnsweringRunner(Runner):
    """The runner for `helm-run --runner-class-name vlmvqa.evaluation.helm.runner.AnsweringRunner`."""

    def __init__(self, execution_spec: ExecutionSpec, *arguments: Any, **named: Any) -> None:
        super().__init__(execution_spec, *arguments, **named)
        self.executor = AnsweringExecutor(execution_spec)
