"""Exact match for `evaluate`, offline: `evaluate.load("evaluation/metrics/exact_match")`."""

import datasets
import evaluate

from vlmvqa.metrics import exact_match

INPUTS = """
predictions: raw answers, a list of text.
references: raw reference answers, a list of lists of text in the same order.
ignore_case: let "Yes" equal "yes" (default: it does not).
"""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of answers that equal one of their references, white space at the ends aside.",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, **options):
        """`{exact_match, per_question}`, the second in the given order."""
        result = exact_match(dict(enumerate(predictions)), dict(enumerate(references)), **options)
        return {"exact_match": result.score, "per_question": list(result.per_question.values())}
