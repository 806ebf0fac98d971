"""Base class of the modules in `metrics/`, which `evaluate` loads by path.

The modules import this file as a module: `evaluate` takes the first metric class in a module's namespace, and that must
not be the base class.
"""

import inspect

import datasets
import evaluate

TEXT = datasets.Value("string")
TEXTS = datasets.Sequence(TEXT)


class MetricModule(evaluate.Metric):
    """A function of `vlmvqa.metrics` as a metric of `evaluate`; the docstring of the subclass is its description.

    Attributes:
        function: the metric. Its docstring describes the inputs, which are lists here: the answers and, in the same
            order, the references or categories.
        references: type of the references.
    """

    function = None
    references = TEXTS

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=inspect.getdoc(self.function),
            features=datasets.Features({"predictions": TEXT, "references": self.references}),
        )

    def _compute(self, predictions, references, **options):
        return self._results(self.function(dict(enumerate(predictions)), dict(enumerate(references)), **options))

    def _results(self, result):
        """Return the scores by name, per-question scores in the given order."""
        return {self.function.__name__: result.score, "per_question": list(result.per_question.values())}
