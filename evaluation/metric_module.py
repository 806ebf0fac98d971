"""Base class of the modules in `metrics/`, which `evaluate` loads by path.

The modules import this file as a module: `evaluate` takes the first metric class in a module's namespace, and that must
not be the base class.
"""

import datasets
import evaluate

TEXT = datasets.Value("string")
TEXTS = datasets.Sequence(TEXT)
INPUTS = """
predictions: raw answers, a list of strings.
references: {references}.
{options}
"""


class MetricModule(evaluate.Metric):
    """A function of `vlmvqa.metrics` as a metric of `evaluate`; the docstring of the subclass is its description.

    Attributes:
        function: the metric.
        citation_text: publication that defines the metric.
        references, references_text: type and description of the references.
        options_text: description of the options.
    """

    function = None
    citation_text = ""
    references, references_text = TEXTS, "raw reference answers, a list of lists of strings in the same order"
    options_text = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=self.citation_text,
            inputs_description=INPUTS.format(references=self.references_text, options=self.options_text),
            features=datasets.Features({"predictions": TEXT, "references": self.references}),
        )

    def _compute(self, predictions, references, **options):
        return self._results(self.function(dict(enumerate(predictions)), dict(enumerate(references)), **options))

    def _results(self, result):
        """Return the scores by name, per-question scores in the given order."""
        return {self.function.__name__: result.score, "per_question": list(result.per_question.values())}
