"""CLIP similarity for `evaluate`, offline: `evaluate.load("evaluation/metrics/clip_similarity")`."""

from vlmvqa.evaluation import metric_module
from vlmvqa.metrics import clip_similarity


class ClipSimilarity(metric_module.MetricModule):
    """CLIPScore: 2.5 * max(cosine, 0) of caption and image; references are paths of images."""

    function = staticmethod(clip_similarity)
    references = metric_module.TEXT
