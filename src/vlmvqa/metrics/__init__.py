"""The benchmarks' official metrics: one file each, pure functions over predictions and references.

vqa_accuracy                      VQAv2, TextVQA, VizWiz: agreement with ten annotators
anls                              DocVQA: likeness to the nearest reference
gqa_scores                        GQA: accuracy by type, consistency, validity, plausibility, distribution
caption_scores                    COCO captions: BLEU, ROUGE-L, CIDEr-D; METEOR and SPICE through Java
helm_bleu_1, corpus_bleu          BLEU as HELM counts it for VQA, and sacrebleu's
exact_match, relaxed_accuracy     equality, and ChartQA's with numbers 5 % off
clip_similarity                   caption and image in CLIP's space, without references
"""

from vlmvqa.metrics.anls import Anls, anls
from vlmvqa.metrics.bleu import CorpusBleu, HelmBleu1, corpus_bleu, helm_bleu_1
from vlmvqa.metrics.captions import CaptionScores, caption_scores
from vlmvqa.metrics.clip import ClipSimilarity, clip_similarity
from vlmvqa.metrics.exact import Accuracy, exact_match, relaxed_accuracy
from vlmvqa.metrics.gqa import GqaScores, gqa_scores
from vlmvqa.metrics.vqa_accuracy import VqaAccuracy, normalize_answer, vqa_accuracy

__all__ = [
    "Accuracy",
    "Anls",
    "CaptionScores",
    "ClipSimilarity",
    "CorpusBleu",
    "GqaScores",
    "HelmBleu1",
    "VqaAccuracy",
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
