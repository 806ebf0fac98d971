"""HELM's runner, with several threads only while the model answers.

nltk's word_tokenize releases Python's global lock a dozen times per text. With 32 threads waiting for the lock, BLEU
takes five times as long as with one: a minute more for a thousand questions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helm.benchmark.executor import ExecutionSpec, Executor
from helm.benchmark.runner import Runner


class AnsweringRunner(Runner):
    """The runner for `helm-run --runner-class-name vlmvqa.evaluation.helm.runner.AnsweringRunner`."""

    def __init__(self, execution_spec: ExecutionSpec, *arguments: Any, **named: Any) -> None:
        super().__init__(replace(execution_spec, parallelism=1), *arguments, **named)
        self.executor.execute = Executor(execution_spec).execute
