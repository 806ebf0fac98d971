"""ANLS for `evaluate`, offline: `evaluate.load("evaluation/metrics/anls")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import anls


class Anls(metric_module.MetricModule):
    """Average normalised Levenshtein similarity in 0..1, equal to DocVQA's challenge script."""

    function = staticmethod(anls)
