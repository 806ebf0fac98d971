"""HELM's BLEU-1 for `evaluate`, offline: `evaluate.load("evaluation/metrics/helm_bleu_1")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import helm_bleu_1


class HelmBleu1(metric_module.MetricModule):
    """HELM's BLEU-1 for VQA in 0..1: the highest over the references, words split by nltk."""

    function = staticmethod(helm_bleu_1)
