"""sacrebleu's BLEU for `evaluate`, offline: `evaluate.load("evaluation/metrics/corpus_bleu")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import corpus_bleu


class CorpusBleu(metric_module.MetricModule):
    """Corpus BLEU in 0..100 of all answers, with sacrebleu's defaults."""

    function = staticmethod(corpus_bleu)

    def _results(self, result):
        return {
            "corpus_bleu": result.score,
            "precisions": list(result.precisions),
            "brevity_penalty": result.brevity_penalty,
            "signature": result.signature,
        }
