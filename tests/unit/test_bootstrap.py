"""Intervals and paired tests over images: known cases, coverage, and independence of the order."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from vlmvqa.inference import bootstrap


def run(images: int, each: int, seed: int, mean: float = 0.6) -> tuple[dict[int, float], dict[int, int]]:
    """Return scores of questions, correlated within an image."""
    drawn = random.Random(seed)
    scores, about = {}, {}
    for image in range(images):
        level = min(1.0, max(0.0, drawn.gauss(mean, 0.3)))
        for number in range(each):
            scores[image * each + number] = float(drawn.random() < level)
            about[image * each + number] = image
    return scores, about


def test_with_a_question_an_image_it_is_scipys_bootstrap() -> None:
    scores, about = run(300, 1, seed=0)
    found = bootstrap.bootstrap(scores, about)
    values = np.array(list(scores.values()))
    expected = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0).confidence_interval
    assert found is not None and found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.low, abs=0.01) and found.high == pytest.approx(expected.high, abs=0.01)


def test_it_is_as_wide_as_95_percent_of_a_normal() -> None:
    """The mean of many images plus and minus 1.96 standard errors; the same for a group and a difference."""
    scores, about = run(400, 1, seed=7)
    values = np.array(list(scores.values()))
    expected = 2 * 1.96 * values.std() / len(values) ** 0.5
    alone = bootstrap.bootstrap(scores, about)
    group = bootstrap.bootstrap_groups(scores, about, dict.fromkeys(scores, "all"))["all"]
    compared = bootstrap.compare(dict.fromkeys(scores, 0.0), scores, about)
    assert compared is not None
    for found in (alone, group, compared.difference):
        assert found is not None and found.high - found.low == pytest.approx(expected, rel=0.08)


def test_an_image_with_more_questions_counts_more() -> None:
    """40 images with nine questions that are right, 40 with one that is wrong: 90 % of the questions, not half."""
    about = {(image, number): image for image in range(80) for number in range(9 if image < 40 else 1)}
    scores = {question: float(image < 40) for question, image in about.items()}
    alone = bootstrap.bootstrap(scores, about)
    group = bootstrap.bootstrap_groups(scores, about, dict.fromkeys(about, "all"))["all"]
    for found in (alone, group):
        assert found is not None and found.mean == pytest.approx(0.9) and 0.85 < found.low < 0.9 < found.high < 0.95


def test_questions_of_one_image_are_not_independent() -> None:
    """The interval over images is wider than the one that treats questions as independent."""
    scores, about = run(100, 10, seed=1)
    clustered = bootstrap.bootstrap(scores, about)
    naive = bootstrap.bootstrap(scores, {question: question for question in scores})
    assert clustered is not None and naive is not None
    assert clustered.high - clustered.low > 1.3 * (naive.high - naive.low)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        scores, about = run(60, 5, seed)
        found = bootstrap.bootstrap(scores, about, seed)
        assert found is not None
        covered += found.low <= 0.5969 <= found.high  # the mean of a normal around 0.6 that is cut at 0 and 1
    assert 86 <= covered <= 100


def test_the_order_of_the_questions_does_not_matter() -> None:
    scores, about = run(50, 4, seed=2)
    turned = dict(reversed(scores.items()))
    assert bootstrap.bootstrap(scores, about) == bootstrap.bootstrap(turned, about)
    assert bootstrap.compare(scores, turned, about) is not None


def test_one_image_has_no_interval() -> None:
    assert bootstrap.bootstrap({1: 1.0, 2: 0.0}, {1: 7, 2: 7}) is None
    assert bootstrap.compare({1: 1.0}, {1: 0.0}, {1: 7}) is None


def test_equal_runs_are_not_told_apart() -> None:
    scores, about = run(80, 3, seed=3)
    found = bootstrap.compare(scores, scores, about)
    assert found is not None and found.difference == bootstrap.Interval(0, 0, 0)
    assert found.p_bootstrap == found.p_permutation == 1


def test_a_clear_difference_is_found_and_its_sign() -> None:
    worse, about = run(200, 3, seed=4, mean=0.4)
    better, _ = run(200, 3, seed=5, mean=0.7)
    found = bootstrap.compare(worse, better, about)
    assert found is not None and 0.1 < found.difference.low < found.difference.mean < found.difference.high
    assert 0 < found.p_bootstrap < 0.01 and 0 < found.p_permutation < 0.01
    turned = bootstrap.compare(better, worse, about)
    assert turned is not None and turned.difference.mean == pytest.approx(-found.difference.mean)


def test_no_difference_is_found_about_as_often_as_chance_says() -> None:
    found = []
    for seed in range(60):
        first, about = run(40, 4, seed=100 + seed)
        second, _ = run(40, 4, seed=1000 + seed)
        compared = bootstrap.compare(first, second, about, seed)
        assert compared is not None
        found.append(compared.p_permutation)
    assert sum(p < 0.05 for p in found) <= 9  # 3 expected; more than 9 once in a thousand


def test_runs_on_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different questions"):
        bootstrap.compare({1: 1.0}, {2: 1.0}, {1: 1, 2: 2})


def test_each_group_has_the_interval_that_it_would_have_alone() -> None:
    scores, about = run(300, 4, seed=6)
    groups = {question: "even" if question % 2 == 0 else "odd" for question in scores} | {0: "rare"}
    found = bootstrap.bootstrap_groups(scores, about, groups)
    assert found["rare"] is None
    for name in ("even", "odd"):
        mine = {question: score for question, score in scores.items() if groups[question] == name}
        alone, together = bootstrap.bootstrap(mine, about), found[name]
        assert alone is not None and together is not None and together.mean == pytest.approx(alone.mean)
        assert together.low == pytest.approx(alone.low, abs=0.01) and together.high == pytest.approx(
            alone.high, abs=0.01
        )
    assert bootstrap.bootstrap_groups(dict(reversed(scores.items())), about, groups) == found
