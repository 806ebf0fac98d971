"""Relaxed accuracy for `evaluate`, offline: `evaluate.load("evaluation/metrics/relaxed_accuracy")`."""

import datasets
import evaluate

from vlmvqa.metrics import relaxed_accuracy

INPUTS = """
predictions: raw answers, a list of text.
references: raw reference answers, a list of lists of text in the same order.
tolerance: the largest difference of a number, as a part of the reference.
"""


class RelaxedAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ChartQA's accuracy: numbers within 5 %, text but for its case.",
            citation="Masry et al., ChartQA, Findings of ACL 2022",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, **options):
        """`{relaxed_accuracy, per_question}`, the second in the given order."""
        result = relaxed_accuracy(dict(enumerate(predictions)), dict(enumerate(references)), **options)
        return {"relaxed_accuracy": result.score, "per_question": list(result.per_question.values())}
