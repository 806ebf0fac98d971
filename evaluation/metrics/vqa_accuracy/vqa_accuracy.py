"""VQA accuracy for `evaluate`, offline: `evaluate.load("evaluation/metrics/vqa_accuracy")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import vqa_accuracy


class VqaAccuracy(metric_module.MetricModule):
    """VQA accuracy in percent, equal to VQAv2's official script."""

    function = staticmethod(vqa_accuracy)

    def _compute(self, predictions, references, **options):
        for name in ("answer_types", "question_types"):
            if options.get(name) is not None:
                options[name] = dict(enumerate(options[name]))
        return super()._compute(predictions, references, **options)

    def _results(self, result):
        return {
            "vqa_accuracy": result.overall,
            "per_answer_type": result.per_answer_type,
            "per_question_type": result.per_question_type,
            "per_question": list(result.per_question.values()),
        }
