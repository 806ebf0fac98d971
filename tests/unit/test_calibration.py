"""Calibration and confusion matrix, compared with numpy and with cases worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vlmvqa.extras.report import confusion
from vlmvqa.extras.report.calibration import calibrate
from vlmvqa.extras.report.confusion import confusion_matrix, expected


def answered(probability: float | None, score: float | None) -> dict[str, Any]:
    return {"log_probability": None if probability is None else math.log(probability), "vqa_accuracy": score}


def test_the_calibration_error_is_that_of_its_definition() -> None:
    draw = np.random.default_rng(0)
    confidence, score = draw.uniform(0.001, 0.999, 3000), draw.choice([0.0, 30.0, 60.0, 90.0, 100.0], 3000)
    found = calibrate([answered(c, s) for c, s in zip(confidence, score, strict=True)], "vqa_accuracy")
    assert found is not None
    # Guo et al.: the sum over bins of |B| / n |acc(B) - conf(B)|; numpy's own binning, open below.
    bins = np.digitize(confidence, np.linspace(0, 1, 11), right=True) - 1
    error = 0.0
    for number in range(10):
        held = bins == number
        assert (found.bins[number].n, found.bins[number].low) == (held.sum(), pytest.approx(number / 10))
        assert found.bins[number].confidence == pytest.approx(confidence[held].mean())
        assert found.bins[number].accuracy == pytest.approx(score[held].mean() / 100)
        error += held.sum() / 3000 * abs(score[held].mean() / 100 - confidence[held].mean())
    assert found.error == pytest.approx(error) and found.n == 3000


def test_a_case_by_hand() -> None:
    """Four confident answers, three correct, and an unconfident wrong one: (4 |0.75 - 0.95| + |0 - 0.25|) / 5."""
    records = [answered(0.95, 100.0)] * 3 + [answered(0.95, 0.0), answered(0.25, 0.0)]
    found = calibrate([*records, answered(None, 100.0), answered(0.5, None)], "vqa_accuracy")
    assert found is not None and found.n == 5
    assert found.error == pytest.approx((4 * 0.2 + 0.25) / 5)
    assert [one.n for one in found.bins] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 4]
    assert found.bins[0].accuracy is None


def test_the_ends_of_the_scale_have_their_bins() -> None:
    found = calibrate([answered(1.0, 100.0), {"log_probability": -1000.0, "vqa_accuracy": 0.0}], "vqa_accuracy")
    assert found is not None and (found.bins[0].n, found.bins[9].n, found.error) == (1, 1, 0.0)
    assert calibrate([answered(None, 1.0)], "vqa_accuracy") is None


def pair(gold: str | None, answer: str, answers: list[str] | None = None) -> dict[str, Any]:
    return {"target": gold, "answer": answer, "answers": [gold] if answers is None else answers}


def test_the_matrix_counts_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    words = np.array(["yes", "no", "red", "blue", "2"])
    gold, given = draw.integers(0, 5, 400), draw.integers(0, 5, 400)
    monkeypatch.setattr(confusion, "MAX_ANSWERS", 3)
    found = confusion_matrix([pair(words[g], words[a]) for g, a in zip(gold, given, strict=True)])
    assert found is not None and found.total == 400
    frequent = [str(words[n]) for n in np.argsort(-np.bincount(gold), kind="stable")[:3]]
    assert list(found.answers) == frequent
    expected_counts = np.zeros((5, 5), int)
    np.add.at(expected_counts, (gold, given), 1)
    rows = [list(words).index(answer) for answer in frequent]
    kept = expected_counts[np.ix_(rows, rows)]
    others = expected_counts[rows].sum(1) - kept.sum(1)
    assert np.array_equal(np.array(found.counts), np.column_stack([kept, others]))
    assert found.shown == expected_counts[rows].sum()


def test_case_and_white_space_are_no_confusion() -> None:
    found = confusion_matrix([pair("Yes", "yes "), pair("yes", "YES"), pair("yes", "no")] + [pair("no", "no")] * 3)
    assert found is not None and found.counts == ((3, 0, 0), (1, 2, 0)) and found.answers == ("no", "yes")


def test_answers_that_hardly_repeat_have_no_matrix() -> None:
    assert confusion_matrix([pair(str(n), "x") for n in range(50)] + [pair("same", "x")] * 9) is None
    assert confusion_matrix([]) is None
    assert confusion_matrix([pair(None, "x", [])]) is None


def test_without_a_target_the_most_frequent_reference_is_expected() -> None:
    assert expected(pair(None, "x", ["a", "B ", "B "])) == "b"
