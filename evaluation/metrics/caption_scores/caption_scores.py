"""Caption scores for `evaluate`, offline: `evaluate.load("evaluation/metrics/caption_scores")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import caption_scores


class CaptionScores(metric_module.MetricModule):
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, equal to COCO's evaluation."""

    function = staticmethod(caption_scores)
    citation_text = "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, 2015"
    references_text = "raw reference captions of each image, a list of lists of strings in the same order"
    options_text = "metrics, tokenizer: as in vlmvqa.metrics.caption_scores."

    def _results(self, result):
        return {**result.corpus, "per_image": list(result.per_image.values())}
