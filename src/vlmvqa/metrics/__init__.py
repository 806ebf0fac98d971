"""The official metrics of the benchmarks: pure functions of predictions and references, imported on first use.

vqa_accuracy                      VQAv2, TextVQA, VizWiz: agreement with ten annotators
anls                              DocVQA: similarity to the nearest reference
gqa_scores                        GQA: accuracy by type, consistency, validity, plausibility, distribution
caption_scores                    COCO captions: BLEU, ROUGE-L, CIDEr-D; METEOR and SPICE through Java
helm_bleu_1, corpus_bleu          HELM's BLEU for VQA, and sacrebleu's
exact_match, relaxed_accuracy     equality, and ChartQA's accuracy with a tolerance of 5 % for numbers
clip_similarity                   similarity of caption and image in CLIP's space, without references
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmvqa.metrics.bleu import corpus_bleu, helm_bleu_1
    from vlmvqa.metrics.captions import caption_scores
    from vlmvqa.metrics.clip_score import clip_similarity
    from vlmvqa.metrics.gqa import gqa_scores
    from vlmvqa.metrics.levenshtein import anls
    from vlmvqa.metrics.string_match import exact_match, relaxed_accuracy
    from vlmvqa.metrics.vqa import normalize_answer, vqa_accuracy

__all__ = [
    "anls",
    "caption_scores",
    "clip_similarity",
    "corpus_bleu",
    "exact_match",
    "gqa_scores",
    "helm_bleu_1",
    "normalize_answer",
    "relaxed_accuracy",
    "vqa_accuracy",
]

# No module has the name of a public function: importing it would replace the function in this package.
_MODULES = {
    "bleu": ("corpus_bleu", "helm_bleu_1"),
    "captions": ("caption_scores",),
    "clip_score": ("clip_similarity",),
    "gqa": ("gqa_scores",),
    "levenshtein": ("anls",),
    "string_match": ("exact_match", "relaxed_accuracy"),
    "vqa": ("normalize_answer", "vqa_accuracy"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"vlmvqa.metrics.{module}"), name)
    raise AttributeError(f"module 'vlmvqa.metrics' has no attribute '{name}'")
