"""Caption scores for `evaluate`, offline: `evaluate.load("evaluation/metrics/caption_scores")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import caption_scores


class CaptionScores(metric_module.MetricModule):
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, equal to COCO's evaluation."""

    function = staticmethod(caption_scores)

    def _results(self, result):
        return {**result.corpus, "per_image": list(result.per_image.values())}
