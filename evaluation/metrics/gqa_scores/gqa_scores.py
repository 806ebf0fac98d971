"""GQA's scores for `evaluate`, offline: `evaluate.load("evaluation/metrics/gqa_scores")`."""

import dataclasses

import datasets
import evaluate

from vlmvqa.errors import InputError
from vlmvqa.metrics import gqa_scores

INPUTS = """
predictions: answers, a list of text.
references: the ids of the questions that they answer, in the same order.
questions: the official records by question id.
choices, consistency, postprocess: as in vlmvqa.metrics.gqa_scores.
"""


class GqaScores(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="GQA's accuracy by type, consistency, validity, plausibility and distribution.",
            citation="Hudson and Manning, GQA, CVPR 2019",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, questions, **options):
        """The scores by name, those that cannot be had None, and `reasons` why."""
        answers = dict(zip(references, predictions, strict=True))
        if len(answers) < len(references):
            raise InputError(
                f"{len(references) - len(answers)} of {len(references)} ids occur twice; give each one answer."
            )
        result = gqa_scores(answers, questions, **options)
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
