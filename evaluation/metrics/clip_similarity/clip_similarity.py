"""CLIP similarity for `evaluate`, offline: `evaluate.load("evaluation/metrics/clip_similarity")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import clip_similarity


class ClipSimilarity(metric_module.MetricModule):
    """CLIPScore: 2.5 * max(cosine, 0) of caption and image."""

    function = staticmethod(clip_similarity)
    citation_text = "Hessel et al., CLIPScore, EMNLP 2021"
    references = metric_module.TEXT
    references_text = "image paths, in the same order"
    options_text = (
        "model, prefix, batch_size, device: as in vlmvqa.metrics.clip_similarity; offline, model is a local folder."
    )
