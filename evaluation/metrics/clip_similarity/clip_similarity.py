"""CLIP similarity for `evaluate`, offline: `evaluate.load("evaluation/metrics/clip_similarity")`."""

import datasets
import evaluate

from vlmvqa.metrics import clip_similarity

INPUTS = """
predictions: captions, a list of text.
references: the paths of their images, in the same order.
model, prefix, batch_size, device: as in vlmvqa.metrics.clip_similarity; without a network, model is a local folder.
"""


class ClipSimilarity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="CLIPScore: 2.5 * max(cosine, 0) of caption and image.",
            citation="Hessel et al., CLIPScore, EMNLP 2021",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, **options):
        """`{clip_similarity, per_question}`, the second in the given order."""
        result = clip_similarity(dict(enumerate(predictions)), dict(enumerate(references)), **options)
        return {"clip_similarity": result.score, "per_question": list(result.per_question.values())}
