"""sacrebleu's BLEU for `evaluate`, offline: `evaluate.load("evaluation/metrics/corpus_bleu")`."""

import datasets
import evaluate

from vlmvqa.metrics import corpus_bleu

INPUTS = """
predictions: raw answers, a list of text.
references: raw reference answers, a list of lists of text in the same order.
"""


class CorpusBleu(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU in 0..100 of all answers together, with sacrebleu's defaults.",
            citation="Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references):
        """`{corpus_bleu, precisions, brevity_penalty, signature}`."""
        result = corpus_bleu(dict(enumerate(predictions)), dict(enumerate(references)))
        return {
            "corpus_bleu": result.score,
            "precisions": list(result.precisions),
            "brevity_penalty": result.brevity_penalty,
            "signature": result.signature,
        }
