"""Caption scores for `evaluate`, offline: `evaluate.load("evaluation/metrics/caption_scores")`."""

import datasets
import evaluate

from vlmvqa.metrics import caption_scores

INPUTS = """
predictions: raw captions, a list of text.
references: each image's raw reference captions, a list of lists of text in the same order.
metrics, tokenizer: as in vlmvqa.metrics.caption_scores.
"""


class CaptionScores(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D, as COCO's evaluation counts them.",
            citation="Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, 2015",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, **options):
        """The scores of the set by name, and `per_image` in the given order."""
        result = caption_scores(dict(enumerate(predictions)), dict(enumerate(references)), **options)
        return {**result.corpus, "per_image": list(result.per_image.values())}
