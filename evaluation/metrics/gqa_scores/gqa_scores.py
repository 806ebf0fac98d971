"""GQA's scores for `evaluate`, offline: `evaluate.load("evaluation/metrics/gqa_scores")`."""

import dataclasses

from vlmvqa.errors import InputError
from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import gqa_scores


class GqaScores(metric_module.MetricModule):
    """GQA's accuracy by type, consistency, validity, plausibility and distribution; references are question ids."""

    function = staticmethod(gqa_scores)
    references = metric_module.TEXT

    def _compute(self, predictions, references, questions, **options):
        """Return the scores by name, None where undefined, and the `reasons`."""
        answers = dict(zip(references, predictions, strict=True))
        if len(answers) < len(references):
            raise InputError(
                f"{len(references) - len(answers)} of {len(references)} ids are repeated; give one answer per question."
            )
        result = gqa_scores(answers, questions, **options)
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
