"""Compare an arm with the baseline over seeds and images: interval, permutation test, Holm's correction, power.

The mean difference of S seeds on I images varies with the seeds, with the images, and with their interaction (answers
that only some seeds get right). The seed variance of the paired differences and the bootstrap variance over images
each contain the interaction, so it is subtracted once, as in a two-way random-effects layout (seeds are the readers
and images the cases of Obuchowski and Rockette 1995; Hillis 2007):

    variance = seeds + images - interaction, at least the larger of seeds and images

Satterthwaite (1946) weights the terms' reciprocal degrees of freedom by their squared shares of the variance. A seed
variance that is small by chance then also has a small weight: with three seeds whose standard deviation is 3 or 4
standard errors over images, simulated intervals cover 92 to 93 %. The shares themselves as weights give fewer degrees
and cover 95 % (simulations in tests/unit/test_study_statistics.py). Known limit: where all variance over images is
interaction, three seeds with a standard deviation of 2 to 4 standard errors cover 92.5 to 93 %.

Legend: S seeds, I images, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean
from typing import Any

import numpy as np
from scipy import optimize, stats

from vlmvqa.errors import InputError
from vlmvqa.inference import bootstrap
from vlmvqa.inference.bootstrap import Floats

ALPHA = 0.05
POWER = 0.8
MIN_SEEDS = 3  # for an interval over seeds
Scores = Mapping[Any, float]  # score by question
Numbers = float | Floats


@dataclass(frozen=True, slots=True)
class ArmDifference:
    """Difference of an arm to the baseline on the same questions: the arm's mean minus the baseline's.

    Attributes:
        difference: mean over seeds.
        interval: 95 % interval over seeds and images; None with fewer than three seeds.
        degrees: degrees of freedom of `interval`.
        p_value: two-sided, over seeds and images, more cautious than `interval`; None with fewer than three seeds.
        image_interval: 95 % interval over images alone, conditional on these seeds.
        p_permutation: two-sided, of exchanging the two arms image by image, jointly over seeds; conditional on these
            seeds.
        detectable: the smallest difference that `interval` finds with 80 % power at the estimated variances; with
            fewer than three seeds of `image_interval`, conditional on these seeds.
    """

    difference: float
    interval: tuple[float, float] | None
    degrees: float | None
    p_value: float | None
    image_interval: tuple[float, float]
    p_permutation: float
    detectable: float


@dataclass(frozen=True, slots=True)
class Variances:
    """Variances of the mean difference over seeds; each a number, or an array with one element per study.

    Attributes:
        seeds: of S seeds on these images: seed effect and interaction.
        images: of I images with these seeds: image effect and interaction.
        interaction: the part in both.
        counts: S and I.
    """

    seeds: Numbers
    images: Numbers
    interaction: Numbers
    counts: tuple[int, int]

    @classmethod
    def estimate(cls, means: Floats, resampled: Floats, images: int) -> Variances:
        """Estimate the variances.

        Args:
            means: mean difference of each seed, float[..., S].
            resampled: mean differences of each resample of the images, float[R, ..., S].
            images: I.
        """
        seeds = means.shape[-1]
        of_images = resampled.mean(-1).var(0)
        # A single seed's variance over images contains S times the interaction that is in the variance of their mean.
        interaction = (resampled.var(0).mean(-1) - of_images) / (seeds - 1)
        return cls(means.var(-1, ddof=1) / seeds, of_images, interaction, (seeds, images))

    def total(self) -> Floats:
        """Return the variance over seeds and images."""
        return np.maximum(np.maximum(self.seeds + self.images - self.interaction, self.seeds), self.images)

    def degrees(self) -> Floats:
        """Return the degrees of freedom of `total`; the images' if the data show no more than the interaction."""
        share = np.where(np.greater(self.seeds, self.interaction), self._share(), 0)
        seeds, images = self.counts
        return 1 / (share / (seeds - 1) + (1 - share) / (images - 1))

    def half_width(self) -> Floats:
        """Return half the width of the 95 % interval."""
        return np.sqrt(self.total()) * stats.t.ppf(1 - ALPHA / 2, self.degrees())

    def p_value(self, difference: Numbers) -> Floats:
        """Return the two-sided p value of a difference: that of each term's t test, weighted by the term's share.

        Cochran (1964) weights critical values so. Holm's correction uses p values far below 5 %, for which the
        interval's degrees of freedom are too many: with eight null arms, up to 23 % of studies have a false finding.
        """
        distance = np.abs(difference)
        # Infinite if nothing varies; 0 if nothing differs.
        ratio = np.divide(distance, np.sqrt(self.total()), out=np.where(distance > 0, inf, 0.0), where=self.total() > 0)
        seeds, images = (2 * stats.t.sf(ratio, count - 1) for count in self.counts)
        return self._share() * seeds + (1 - self._share()) * images

    def _share(self) -> Floats:
        total = self.total()
        return np.divide(self.seeds, total, out=np.zeros_like(total), where=total > 0)


def compare_arms(
    baseline: Sequence[Scores], arm: Sequence[Scores], images: Mapping[Any, Hashable], seed: int = 0
) -> ArmDifference:
    """Compare an arm with the baseline.

    Args:
        baseline: scores by question of each seed.
        arm: the same for the arm, for the same questions; its seeds are paired with the baseline's in order.
        images: image by question.
        seed: of the resamples and permutations.

    Raises:
        InputError: fewer than two images.
    """
    # Exchanging the arms of an image jointly over seeds exchanges their mean scores over seeds.
    first, second = (
        {question: fmean(scores[question] for scores in runs) for question in runs[0]} for runs in (baseline, arm)
    )
    of_images = bootstrap.compare(first, second, images, seed)
    if of_images is None:
        raise InputError("a study needs scores on two images or more; score the runs on more of the split")
    difference = of_images.difference.mean
    by_seed = [
        bootstrap.by_image({question: after[question] - before[question] for question in before}, images)
        for before, after in zip(baseline, arm, strict=True)
    ]
    sums, counts = np.stack([sums for sums, _ in by_seed], 1), by_seed[0][1][:, None]
    resampled = bootstrap.resampled_columns(sums, counts, seed)
    interval = degrees = p_value = None
    if len(arm) < MIN_SEEDS:
        detectable = float(stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)) * float(resampled.mean(1).std())
    else:
        variances = Variances.estimate(sums.sum(0) / counts.sum(), resampled, len(sums))
        degrees, half = float(variances.degrees()), float(variances.half_width())
        interval = difference - half, difference + half
        p_value = float(variances.p_value(difference))
        detectable = detectable_difference(variances)
    return ArmDifference(
        difference=difference,
        interval=interval,
        degrees=degrees,
        p_value=p_value,
        image_interval=(of_images.difference.low, of_images.difference.high),
        p_permutation=of_images.p_permutation,
        detectable=detectable,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust the p values of several arms by Holm's method (1979), which bounds the chance of any false finding."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def verdicts(differences: Mapping[str, ArmDifference]) -> dict[str, str]:
    """Return "better" (a higher score), "worse" or "no difference detected" by arm, at 5 % after Holm's correction.

    Both tests must find a difference: the permutation test holds for these seeds only, and by itself it also finds the
    difference between two sets of seeds of one config. With fewer than three seeds it is the only test.
    """
    adjusted = holm({name: max(one.p_permutation, one.p_value or 0.0) for name, one in differences.items()})
    return {
        name: "no difference detected" if adjusted[name] > ALPHA else "better" if one.difference > 0 else "worse"
        for name, one in differences.items()
    }


def power(difference: float, variances: Variances) -> float:
    """Return the chance that the interval excludes 0 for a true difference.

    Args:
        difference: the true one.
        variances: the true ones, of one study. The interval's are estimated from S seeds, so its width varies.
    """
    levels = (np.arange(200) + 0.5) / 200
    degrees = variances.counts[0] - 1
    estimates = np.maximum(variances.seeds, variances.interaction) * stats.chi2.ppf(levels, degrees) / degrees
    half = replace(variances, seeds=estimates).half_width()
    above, below = ((sign * difference - half) / np.sqrt(variances.total()) for sign in (1, -1))
    return float(np.mean(stats.norm.cdf(above) + stats.norm.cdf(below)))


def detectable_difference(variances: Variances) -> float:
    """Return the difference that the interval finds with 80 % power, 0 if nothing varies."""
    scale = float(np.sqrt(variances.total()))
    if scale == 0:
        return 0.0
    # 100 standard errors: with three seeds it is about 5.
    return scale * float(optimize.brentq(lambda times: power(times * scale, variances) - POWER, 0, 100, xtol=1e-4))
