"""How sure a score is: intervals and tests that know that an image's questions are not independent.

What is drawn again is images, each with all its questions: two questions about one photograph are right or wrong
together more often than two about different ones, and an interval that forgets it is too narrow.

Source: the bootstrap's percentile interval (Efron and Tibshirani 1993, chapter 13), over clusters (Davison and Hinkley
1997, section 3.8); the paired tests as in Berg-Kirkpatrick et al. 2012 (bootstrap) and Noreen 1989 (permutation).

Legend: Q questions, I images.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
AT_ONCE = 4_000_000  # numbers that are drawn at a time: 32 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and between which bounds it lies with 95 % probability."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A second run's mean minus a first one's, on the same questions.

    Attributes:
        difference: with its interval.
        p_bootstrap: two-sided: twice the share of draws in which the better run is not better.
        p_permutation: two-sided: the share of relabellings (which run is which, an image at a time) that differ at
            least as much.
    """

    difference: Interval
    p_bootstrap: float
    p_permutation: float


def bootstrap(scores: Mapping[Any, float], images: Mapping[Any, Hashable], seed: int = 0) -> Interval | None:
    """The mean of scores by question, with its 95 % interval over images; None where there are fewer than two.

    Args:
        scores: of each of Q questions.
        images: which image each of them is about.
    """
    sums, counts = _by_image(scores, images)
    if len(sums) < 2:
        return None
    means = _means(sums, counts, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def bootstrap_groups(
    scores: Mapping[Any, float], images: Mapping[Any, Hashable], groups: Mapping[Any, str], seed: int = 0
) -> dict[str, Interval | None]:
    """The same for each group of questions, in one draw of images; None where a group is about fewer than two.

    Args:
        groups: the group of each question.
    """
    places = {image: place for place, image in enumerate(sorted(set(images.values()), key=repr))}
    columns = {name: column for column, name in enumerate(sorted(set(groups.values())))}
    sums, counts = np.zeros((len(places), len(columns))), np.zeros((len(places), len(columns)))
    ordered = sorted(scores, key=repr)
    at = [places[images[question]] for question in ordered], [columns[groups[question]] for question in ordered]
    np.add.at(sums, at, [scores[question] for question in ordered])
    np.add.at(counts, at, 1.0)
    drawn, means = np.random.default_rng(seed), []
    for rows in _pieces(len(places)):
        chosen = drawn.integers(0, len(places), (rows, len(places))) + len(places) * np.arange(rows)[:, None]
        times = np.bincount(chosen.ravel(), minlength=rows * len(places)).reshape(rows, -1).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw without any image of a rare group
            means.append((times @ sums) / (times @ counts))
    low, high = np.nanquantile(np.concatenate(means), (0.025, 0.975), axis=0)
    return {
        name: Interval(float(sums[:, n].sum() / counts[:, n].sum()), float(low[n]), float(high[n]))
        if np.count_nonzero(counts[:, n]) > 1
        else None
        for name, n in columns.items()
    }


def compare(
    first: Mapping[Any, float], second: Mapping[Any, float], images: Mapping[Any, Hashable], seed: int = 0
) -> Comparison | None:
    """Whether a second run is better than a first one on the same questions; None for fewer than two images.

    Raises:
        ValueError: they are not about the same questions.
    """
    if first.keys() != second.keys():
        raise ValueError("two runs are compared on the same questions")
    sums, counts = _by_image({question: second[question] - first[question] for question in first}, images)
    if len(sums) < 2:
        return None
    means = _means(sums, counts, seed)
    mean = float(sums.sum() / counts.sum())
    low, high = np.quantile(means, (0.025, 0.975))
    # With the observed one among the draws no p-value is 0 (Davison and Hinkley 1997, section 4.2).
    other_side = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p_bootstrap = min(1.0, 2 * (other_side + 1) / (DRAWS + 1))
    extreme = np.count_nonzero(np.abs(_relabelled(sums, counts, seed)) >= abs(mean) - 1e-12)
    return Comparison(Interval(mean, float(low), float(high)), float(p_bootstrap), float((extreme + 1) / (DRAWS + 1)))


def _by_image(scores: Mapping[Any, float], images: Mapping[Any, Hashable]) -> tuple[Floats, Floats]:
    """Sum of scores and number of questions of each image, in an order that does not depend on the questions'."""
    sums: dict[Hashable, list[float]] = {}
    for question, score in scores.items():
        sums.setdefault(images[question], []).append(score)
    # Sorted: the draws are the same whatever order the questions came in.
    ordered = [sorted(sums[image]) for image in sorted(sums, key=repr)]
    return np.array([sum(each) for each in ordered]), np.array([float(len(each)) for each in ordered])


def _means(sums: Floats, counts: Floats, seed: int) -> Floats:
    """The mean over questions in each draw of as many images, with replacement."""
    drawn, found, images = np.random.default_rng(seed), [], len(sums)
    for rows in _pieces(images):
        chosen = drawn.integers(0, images, (rows, images))
        found.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    return np.concatenate(found)


def _relabelled(sums: Floats, counts: Floats, seed: int) -> Floats:
    """The mean difference when, image by image, it is tossed which run is which."""
    drawn, found = np.random.default_rng(seed + 1), []
    for rows in _pieces(len(sums)):
        signs = drawn.integers(0, 2, (rows, len(sums))) * 2 - 1
        found.append(signs @ sums / counts.sum())
    return np.concatenate(found)


def _pieces(images: int) -> list[int]:
    """How many draws to make at a time."""
    most = max(1, AT_ONCE // images)
    return [min(most, DRAWS - start) for start in range(0, DRAWS, most)]
