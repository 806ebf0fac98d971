"""The benchmarks' official accuracies as HELM metrics, from 0 to 1 like all of HELM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.metrics.metric import Metric, MetricMetadata
from helm.benchmark.metrics.metric_name import MetricName
from helm.benchmark.metrics.metric_service import MetricService
from helm.benchmark.metrics.statistic import Stat

from vlmvqa.metrics import vqa_accuracy


def _vqa(answer: str, references: Sequence[str]) -> float:
    """Return VQAv2's accuracy: an answer that three of ten annotators gave is right."""
    return vqa_accuracy({0: answer}, {0: references}).per_question[0] / 100


def _gqa(answer: str, references: Sequence[str]) -> float:
    """Return GQA's accuracy: equality with the short answer, which is the first reference."""
    return float(answer == references[0])


ACCURACIES: dict[str, tuple[str, Callable[[str, Sequence[str]], float]]] = {
    "vqa_accuracy": ("VQA accuracy", _vqa),
    "gqa_accuracy": ("GQA accuracy", _gqa),
}


class OfficialAccuracy(Metric):
    """The accuracy of the benchmark's official evaluation script.

    Args:
        name: a key of `ACCURACIES`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.title, self.score = ACCURACIES[name]

    def __repr__(self) -> str:
        return f"OfficialAccuracy({self.name})"

    def evaluate_generation(
        self,
        adapter_spec: AdapterSpec,
        request_state: RequestState,
        metric_service: MetricService,
        eval_cache_path: str,
    ) -> list[Stat]:
        """Return the accuracy of one question."""
        assert request_state.result is not None
        references = [reference.output.text for reference in request_state.instance.references]
        answer = request_state.result.completions[0].text.strip()
        return [Stat(MetricName(self.name)).add(self.score(answer, references))]

    def get_metadata(self) -> list[Any]:
        """Return the description for HELM's pages."""
        described = f"{self.title}, as computed by the benchmark's official evaluation script."
        return [
            MetricMetadata(
                name=self.name,
                display_name=self.title,
                description=described,
                lower_is_better=False,
                group="accuracy",
            )
        ]
