"""The benchmarks' official metrics: one file each, pure functions over predictions and references."""

from vlmvqa.metrics.vqa_accuracy import VqaAccuracy, normalize_answer, vqa_accuracy

__all__ = ["VqaAccuracy", "normalize_answer", "vqa_accuracy"]
