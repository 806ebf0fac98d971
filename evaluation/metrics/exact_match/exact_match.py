"""Exact match for `evaluate`, offline: `evaluate.load("evaluation/metrics/exact_match")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import exact_match


class ExactMatch(metric_module.MetricModule):
    """Share of answers that equal one of their references, ignoring surrounding white space."""

    function = staticmethod(exact_match)
