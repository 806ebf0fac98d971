"""COCO's caption scores: BLEU, ROUGE-L and CIDEr-D in Python, METEOR and SPICE through Java.

Source: pycocoevalcap 1.2 (the COCO caption evaluation code for Python 3); equal to 1e-9 for each image.

    BLEU      Papineni et al. 2002; length of the nearest reference, counts summed over the dataset
    ROUGE-L   Lin 2004; precision and recall are each the maximum over the references
    CIDEr     Vedantam et al. 2015; "CIDEr" in papers is CIDEr-D. N-gram weights depend on all images of the dataset,
              so it must be scored at once: the mean over subsets differs
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vlmvqa.metrics import java
from vlmvqa.metrics.java import Scores
from vlmvqa.metrics.ptb_tokenizer import tokenize
from vlmvqa.metrics.registry import Answers, AnyId, Metric, Score, check_answers, check_option, references_by_id

if TYPE_CHECKING:
    from vlmvqa.data.example import Question

METRICS = ("bleu", "rouge_l", "cider", "meteor", "spice")
TOKENIZERS = ("python", "java")
Tokenizer = Callable[[str], str | Sequence[str]]
Counts = dict[int, int]  # by n-gram

ORDERS = 4  # n-grams of 1 to 4 words
BETA = 1.2  # ROUGE-L: weight of recall relative to precision
SIGMA = 6.0  # CIDEr-D: standard deviation of the length penalty
# Added in pycocoevalcap's BLEU to avoid division by zero: BLEU is never exactly 0, and never exactly 1.
TINY, SMALL = 1e-15, 1e-9


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """The requested scores by name: `bleu_1` to `bleu_4`, `rouge_l`, `cider`, `meteor`, `spice`.

    CIDEr is in 0..10, the others in 0..1; papers print all of them times 100.

    Attributes:
        corpus: scores of the dataset: BLEU and METEOR from summed statistics, the others as means over the images.
        per_image: scores by image id.
    """

    corpus: dict[str, float]
    per_image: dict[int | str, dict[str, float]]


def caption_scores(
    predictions: Mapping[AnyId, str],
    references: Mapping[AnyId, Sequence[str]],
    *,
    metrics: Sequence[str] = ("bleu", "rouge_l", "cider"),
    tokenizer: str | Tokenizer = "python",
) -> CaptionScores:
    """Score one caption per image against the image's reference captions.

    A perfect caption scores 1 in ROUGE-L, 1 - 1e-9 in BLEU if it has four words, and up to 10 in CIDEr: less if the
    image's other references differ or all have fewer than four words, and 0 in a dataset of one image.

    Args:
        metrics: any of "bleu", "rouge_l", "cider", "meteor" and "spice"; the last two need Java.
        tokenizer: "python", this project's; "java", the official one; or a function from a caption to its tokens,
            as a list or separated by spaces (`str.split` for tokenized captions).

    Raises:
        InputError: ids differ between the mappings, an image has no reference, an option is unknown, or Java or one of
            its libraries is missing; raised before anything is scored.
    """
    metrics = check_metrics(metrics, tokenizer)
    check_answers(predictions, references)
    texts = _tokenized([[predictions[image], *captions] for image, captions in references.items()], tokenizer)
    numbers: dict[str, int] = {}
    captions = [[_Caption(text, numbers) for text in group] for group in texts]
    images = [_Image(first, others) for first, *others in captions]
    found: dict[str, Scores] = {}
    if "bleu" in metrics:
        found |= {f"bleu_{n}": scores for n, scores in enumerate(_bleu(images), 1)}
    if "rouge_l" in metrics:
        found["rouge_l"] = _with_mean(map(_rouge_l, images))
    if "cider" in metrics:
        found["cider"] = _with_mean(_cider(images))
    found |= {name: java.SCORERS[name](texts) for name in metrics if name in java.SCORERS}
    return CaptionScores(
        corpus={name: corpus for name, (corpus, _) in found.items()},
        per_image={image: {name: found[name][1][n] for name in found} for n, image in enumerate(references)},
    )


def check_metrics(
    metrics: Sequence[str] = ("bleu", "rouge_l", "cider"), tokenizer: str | Tokenizer = "python"
) -> tuple[str, ...]:
    """Return the metrics' names; raise an InputError if an option is unknown, or needs Java and Java is missing."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for name in metrics:
        check_option("metrics", name, METRICS)
    if isinstance(tokenizer, str):
        check_option("tokenizer", tokenizer, TOKENIZERS)
    java.check([f"tokenizer={tokenizer!r}"] * (tokenizer == "java") + [m for m in metrics if m in java.SCORERS])
    return metrics


def _tokenized(groups: Sequence[Sequence[str]], tokenizer: str | Tokenizer) -> list[list[str]]:
    """Tokenize captions; the tokens are separated by single spaces, as all scorers expect."""
    if tokenizer == "java":
        tokens = iter(java.tokenize([text for group in groups for text in group]))
        return [[next(tokens) for _ in group] for group in groups]
    split = tokenizer if callable(tokenizer) else tokenize
    tokenized = [[split(text) for text in group] for group in groups]
    return [[text if isinstance(text, str) else " ".join(text) for text in group] for group in tokenized]


def _with_mean(scores: Iterable[float]) -> Scores:
    each = list(scores)
    return fmean(each), each


class _Caption:
    """Tokens of a caption, and the count of each of its n-grams: `counts[n - 1]`.

    An n-gram is stored as one integer, the concatenated `numbers` of its words: counting is a third faster than with
    tuples of words.
    """

    def __init__(self, text: str, numbers: dict[str, int]) -> None:
        self.text = text
        self.words = [numbers.setdefault(word, len(numbers)) for word in text.split()]
        self.length = len(self.words)

    @cached_property
    def counts(self) -> list[Counts]:
        grams = self.words
        counts = [_count(grams)]
        for n in range(1, ORDERS):
            grams = [gram << 32 | word for gram, word in zip(grams, self.words[n:], strict=False)]
            counts.append(_count(grams))
        return counts


def _count(grams: Sequence[int]) -> Counts:
    counts = dict.fromkeys(grams, 1)
    return counts if len(counts) == len(grams) else Counter(grams)  # most captions repeat no n-gram


@dataclass(frozen=True, slots=True)
class _Image:
    caption: _Caption
    references: list[_Caption]


def _bleu(images: Sequence[_Image]) -> list[Scores]:
    """Compute BLEU-1 to BLEU-4."""
    matched = [[_matches(image, n) for n in range(ORDERS)] for image in images]
    possible = [[max(image.caption.length - n, 0) for n in range(ORDERS)] for image in images]
    lengths = [(image.caption.length, _nearest_length(image)) for image in images]
    each = map(_bleu_of, matched, possible, lengths)
    corpus = _bleu_of(*([sum(numbers) for numbers in zip(*part, strict=True)] for part in (matched, possible, lengths)))
    return [(corpus[n], list(scores)) for n, scores in enumerate(zip(*each, strict=True))]


def _bleu_of(matched: Sequence[int], possible: Sequence[int], lengths: Sequence[int]) -> list[float]:
    """Compute BLEU-1 to BLEU-4 from the matched and possible n-grams, and the lengths of caption and reference."""
    length, reference_length = lengths
    ratio = (length + TINY) / (reference_length + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (matched[n] + TINY) / (possible[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def _nearest_length(image: _Image) -> int:
    """Return the length of the reference nearest in length; the shorter one in a tie."""
    length = image.caption.length
    return min((abs(other.length - length), other.length) for other in image.references)[1]


def _matches(image: _Image, n: int) -> int:
    """Count the caption's n-grams, each clipped to its largest count in one reference."""
    tables = [other.counts[n] for other in image.references]
    return sum(
        min(count, max([table.get(gram, 0) for table in tables])) for gram, count in image.caption.counts[n].items()
    )


def _rouge_l(image: _Image) -> float:
    """Compute the F-measure of the longest common subsequence of words."""
    from rapidfuzz.distance import LCSseq  # local: benchmarking a model's speed needs no metric packages

    # pycocoevalcap splits at single spaces, so a caption without words has one empty word.
    words = image.caption.text.split(" ")
    precision = recall = 0.0
    for other in image.references:
        reference = other.text.split(" ")
        common = LCSseq.similarity(words, reference)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(reference))
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _cider(images: Sequence[_Image]) -> list[float]:
    """Compute CIDEr-D of each image, the mean over n-gram orders and references."""
    log_images = math.log(len(images))
    weights = [_weights(images, n, log_images) for n in range(ORDERS)]
    scores = []
    for image in images:
        # An n-gram in no reference has the weight of one that occurs in one image.
        own = [
            {gram: count * weights[n].get(gram, log_images) for gram, count in image.caption.counts[n].items()}
            for n in range(ORDERS)
        ]
        norms = [_norm(list(vector.values())) for vector in own]
        similarities = [
            _penalty(image.caption, other)
            * math.fsum(_similarity(own[n], norms[n], other.counts[n], weights[n]) for n in range(ORDERS))
            for other in image.references
        ]
        scores.append(10 * math.fsum(similarities) / ORDERS / len(image.references))
    return scores


def _weights(images: Sequence[_Image], n: int, log_images: float) -> dict[int, float]:
    """Return the inverse document frequency of each n-gram: log(images / images with it in a reference)."""
    frequency: Counter[int] = Counter()
    for image in images:
        frequency.update(set().union(*(other.counts[n] for other in image.references)))
    return {gram: log_images - math.log(count) for gram, count in frequency.items()}


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(sum(map(operator.mul, values, values)))


def _similarity(own: Mapping[int, float], norm: float, counts: Counts, weights: Mapping[int, float]) -> float:
    """Return the cosine of the TF-IDF vectors, the caption's counts clipped to the reference's."""
    norms = norm * _norm([count * weights[gram] for gram, count in counts.items()])
    if norms == 0:
        return 0.0
    shared = 0.0
    for gram, value in own.items():
        if gram in counts:
            theirs = counts[gram] * weights[gram]
            shared += min(value, theirs) * theirs
    return shared / norms


def _penalty(caption: _Caption, other: _Caption) -> float:
    """Return a Gaussian of the difference in length."""
    # pycocoevalcap uses the number of bigrams as length, which differs only for a caption without words.
    difference = max(caption.length - 1, 0) - max(other.length - 1, 0)
    return math.exp(-(difference**2) / (2 * SIGMA**2))


def _score(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
    # CIDEr, the main number, is always among the metrics.
    metrics = options.get("metrics", ("bleu", "rouge_l"))
    options["metrics"] = tuple(dict.fromkeys(["cider", *([metrics] if isinstance(metrics, str) else metrics)]))
    result = caption_scores(answers, references_by_id(questions), **options)
    names = ("cider", *(name for name in result.corpus if name != "cider"))
    per_image = {image: 100 * scores["cider"] for image, scores in result.per_image.items()}
    return Score({name: 100 * result.corpus[name] for name in names}, per_image)


CIDER = Metric(
    title="CIDEr (x 100)",
    version="cider: CIDEr-D as pycocoevalcap 1.2, the project's own PTB tokens",
    score=_score,
    check_options=check_metrics,
    options=("metrics", "tokenizer"),
    correct_from=None,
)
