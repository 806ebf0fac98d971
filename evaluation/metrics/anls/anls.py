"""ANLS for `evaluate`, offline: `evaluate.load("evaluation/metrics/anls")`."""

import datasets
import evaluate

from vlmvqa.metrics import anls

INPUTS = """
predictions: raw answers, a list of text.
references: raw reference answers, a list of lists of text in the same order.
threshold, inclusive: as in vlmvqa.metrics.anls.
"""


class Anls(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Average normalised Levenshtein similarity in 0..1, as DocVQA's challenge script counts it.",
            citation="Biten et al., Scene Text Visual Question Answering, ICCV 2019",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, **options):
        """`{anls, per_question}`, the second in the given order."""
        result = anls(dict(enumerate(predictions)), dict(enumerate(references)), **options)
        return {"anls": result.score, "per_question": list(result.per_question.values())}
