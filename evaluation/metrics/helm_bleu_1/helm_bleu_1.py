"""HELM's BLEU-1 for `evaluate`, offline: `evaluate.load("evaluation/metrics/helm_bleu_1")`."""

import datasets
import evaluate

from vlmvqa.metrics import helm_bleu_1

INPUTS = """
predictions: raw answers, a list of text.
references: raw reference answers, a list of lists of text in the same order.
Both are cut into words by nltk.
"""


class HelmBleu1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU-1 in 0..1 as HELM counts it for VQA: the best over the references.",
            citation="Liang et al., Holistic Evaluation of Language Models, TMLR 2023",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        """`{helm_bleu_1, per_question}`, the second in the given order."""
        result = helm_bleu_1(dict(enumerate(predictions)), dict(enumerate(references)))
        return {"helm_bleu_1": result.score, "per_question": list(result.per_question.values())}
