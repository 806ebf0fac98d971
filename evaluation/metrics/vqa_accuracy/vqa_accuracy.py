"""VQA accuracy for `evaluate`, offline: `evaluate.load("evaluation/metrics/vqa_accuracy")`."""

import datasets
import evaluate

from vlmvqa.metrics import vqa_accuracy

INPUTS = """
predictions: raw answers, a list of text.
references: the annotators' raw answers (ten in VQAv2), a list of lists of text in the same order.
answer_types, question_types: categories in the same order, for the means of each category (optional).
normalize, consensus: as in vlmvqa.metrics.vqa_accuracy.
"""


class VqaAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="VQA accuracy in percent, as VQAv2's official script counts it.",
            citation="Antol et al., VQA: Visual Question Answering, ICCV 2015",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, answer_types=None, question_types=None, **options):
        """`{vqa_accuracy, per_answer_type, per_question_type, per_question}`, the last in the given order."""
        result = vqa_accuracy(
            dict(enumerate(predictions)),
            dict(enumerate(references)),
            answer_types=None if answer_types is None else dict(enumerate(answer_types)),
            question_types=None if question_types is None else dict(enumerate(question_types)),
            **options,
        )
        return {
            "vqa_accuracy": result.overall,
            "per_answer_type": result.per_answer_type,
            "per_question_type": result.per_question_type,
            "per_question": list(result.per_question.values()),
        }
