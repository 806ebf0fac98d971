"""Relaxed accuracy for `evaluate`, offline: `evaluate.load("evaluation/metrics/relaxed_accuracy")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import relaxed_accuracy


class RelaxedAccuracy(metric_module.MetricModule):
    """ChartQA's accuracy: numbers within 5 %, text up to case."""

    function = staticmethod(relaxed_accuracy)
