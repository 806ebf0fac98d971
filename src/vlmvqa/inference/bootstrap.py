"""Confidence intervals and paired tests of a score, resampling images rather than questions.

Images are resampled with all their questions: answers about one image are correlated, and an interval that resamples
questions independently is too narrow.

Source: the bootstrap's percentile interval (Efron and Tibshirani 1993, chapter 13), over clusters (Davison and Hinkley
1997, section 3.8); the paired tests as in Berg-Kirkpatrick et al. 2012 (bootstrap) and Noreen 1989 (permutation).

Legend: Q questions, I images, R resamples, K columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
MAX_NUMBERS = 4_000_000  # random numbers generated at once: 32 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Difference of two runs on the same questions: the second run's mean minus the first run's.

    Attributes:
        difference: with its interval.
        p_bootstrap: two-sided: twice the share of resamples in which the better run is not better.
        p_permutation: two-sided: the share of permutations (swapping the runs image by image) with at least the
            observed absolute difference.
    """

    difference: Interval
    p_bootstrap: float
    p_permutation: float


def bootstrap(scores: Mapping[Any, float], images: Mapping[Any, Hashable], seed: int = 0) -> Interval | None:
    """Compute the mean score with its 95 % interval over images; None for fewer than two images.

    Args:
        scores: score by question, Q of them.
        images: image by question.
        seed: of the resamples.
    """
    sums, counts = by_image(scores, images)
    if len(sums) < 2:
        return None
    low, high = np.quantile(_resampled_means(sums, counts, seed), (0.025, 0.975))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def bootstrap_groups(
    scores: Mapping[Any, float], images: Mapping[Any, Hashable], groups: Mapping[Any, str], seed: int = 0
) -> dict[str, Interval | None]:
    """Compute mean and interval of each group of questions from one set of resamples; None for fewer than two images.

    Args:
        scores: score by question, Q of them.
        images: image by question.
        groups: group by question.
        seed: of the resamples.
    """
    rows = {image: row for row, image in enumerate(sorted(set(images.values()), key=repr))}
    columns = {name: column for column, name in enumerate(sorted(set(groups.values())))}
    sums, counts = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    ordered = sorted(scores, key=repr)
    cells = [rows[images[question]] for question in ordered], [columns[groups[question]] for question in ordered]
    np.add.at(sums, cells, [scores[question] for question in ordered])
    np.add.at(counts, cells, 1.0)
    low, high = np.nanquantile(resampled_columns(sums, counts, seed), (0.025, 0.975), axis=0)
    return {
        name: Interval(float(sums[:, n].sum() / counts[:, n].sum()), float(low[n]), float(high[n]))
        if np.count_nonzero(counts[:, n]) > 1
        else None
        for name, n in columns.items()
    }


def compare(
    first: Mapping[Any, float], second: Mapping[Any, float], images: Mapping[Any, Hashable], seed: int = 0
) -> Comparison | None:
    """Compare a second run with a first one on the same questions; None for fewer than two images.

    Args:
        first: score by question of the first run.
        second: score by question of the second run.
        images: image by question.
        seed: of the resamples and permutations.

    Raises:
        ValueError: the runs have different questions.
    """
    if first.keys() != second.keys():
        raise ValueError("the two runs have different questions; compare runs on the same ones")
    sums, counts = by_image({question: second[question] - first[question] for question in first}, images)
    if len(sums) < 2:
        return None
    means = _resampled_means(sums, counts, seed)
    mean = float(sums.sum() / counts.sum())
    low, high = np.quantile(means, (0.025, 0.975))
    # Counting the observed value as a resample keeps p-values above 0 (Davison and Hinkley 1997, section 4.2).
    other_side = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p_bootstrap = min(1.0, 2 * (other_side + 1) / (RESAMPLES + 1))
    p_permutation = float(permutation_p_values(sums, counts, seed))
    return Comparison(Interval(mean, float(low), float(high)), float(p_bootstrap), p_permutation)


def by_image(scores: Mapping[Any, float], images: Mapping[Any, Hashable]) -> tuple[Floats, Floats]:
    """Return the sum of scores and the number of questions of each image, independent of the questions' order."""
    grouped: dict[Hashable, list[float]] = {}
    for question, score in scores.items():
        grouped.setdefault(images[question], []).append(score)
    # Sorted, so that resamples do not depend on the order of the questions.
    ordered = [sorted(grouped[image]) for image in sorted(grouped, key=repr)]
    return np.array([sum(each) for each in ordered]), np.array([float(len(each)) for each in ordered])


def resampled_columns(sums: Floats, counts: Floats, seed: int) -> Floats:
    """Return the mean over questions of each column in each resample of the images, float[R, K].

    Args:
        sums: sum of scores by image and column (a group of questions, or a run), float[I, K].
        counts: number of questions, float[I, K], or float[I, 1] if the columns have the same questions.
        seed: of the resamples.
    """
    generator, means, images = np.random.default_rng(seed), [], len(sums)
    for size in _batch_sizes(images):
        chosen = generator.integers(0, images, (size, images)) + images * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * images).reshape(size, -1).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a resample may have no image of a rare group
            means.append((times @ sums) / (times @ counts))
    return np.concatenate(means)


def permutation_p_values(sums: Floats, counts: Floats, seed: int) -> Floats:
    """Return the two-sided p value of a mean difference, permuting the two runs of each image.

    Args:
        sums: sum of differences by image, float[I], or float[I, K] for K p values.
        counts: number of questions by image, float[I].
        seed: of the permutations.
    """
    observed = np.abs(sums.sum(0) / counts.sum())
    extreme = np.count_nonzero(np.abs(_permuted_means(sums, counts, seed)) >= observed - 1e-12, axis=0)
    return np.asarray((extreme + 1) / (RESAMPLES + 1))


def _resampled_means(sums: Floats, counts: Floats, seed: int) -> Floats:
    """Return the mean over questions of each resample: I images with replacement."""
    generator, means, images = np.random.default_rng(seed), [], len(sums)
    for size in _batch_sizes(images):
        chosen = generator.integers(0, images, (size, images))
        means.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    return np.concatenate(means)


def _permuted_means(sums: Floats, counts: Floats, seed: int) -> Floats:
    """Return the mean difference after randomly swapping the runs of each image."""
    generator, means = np.random.default_rng(seed + 1), []
    for size in _batch_sizes(len(sums)):
        signs = generator.integers(0, 2, (size, len(sums))) * 2 - 1
        means.append(signs @ sums / counts.sum())
    return np.concatenate(means)


def _batch_sizes(images: int) -> list[int]:
    """Split the resamples into batches of at most `MAX_NUMBERS` random numbers."""
    most = max(1, MAX_NUMBERS // images)
    return [min(most, RESAMPLES - start) for start in range(0, RESAMPLES, most)]
