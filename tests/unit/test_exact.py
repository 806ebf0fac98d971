"""Exact match, and ChartQA's relaxed accuracy by worked examples."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmvqa.errors import InputError
from vlmvqa.metrics import exact_match, relaxed_accuracy


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("yes", "yes", 1), (" yes\n", "yes", 1), ("Yes", "yes", 0), ("yes.", "yes", 0), ("", "", 1), ("", "yes", 0)],
)
def test_exact_match(prediction: str, reference: str, score: float) -> None:
    assert exact_match({1: prediction}, {1: ["no", reference]}).per_question == {1: score}


def test_exact_match_without_case() -> None:
    assert exact_match({1: "YES "}, {1: ["yes"]}, ignore_case=True).score == 1
    assert exact_match({1: "yes", 2: "no", 3: "2"}, {1: ["yes"], 2: ["yes"], 3: ["two", "2"]}).score == 2 / 3


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("104.9", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-104", "-100", 1),
        ("104", "-100", 0),
        ("5%", "5%", 1),
        ("5.2%", "5%", 1),
        ("5%", "0.05", 1),
        ("5", "5%", 0),
        ("5 percent", "5%", 0),
        ("1e2", "100", 1),
        ("1,000", "1000", 0),
        ("1,000", "1,000", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("0.01", "0", 0),
        ("2010", "2000", 1),
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        (" yes", "yes", 0),
        (" 10", "10", 1),
        ("nan", "nan", 0),
        ("inf", "inf", 0),
        ("", "", 1),
        ("%", "%", 1),
    ],
)
def test_relaxed_accuracy(prediction: str, reference: str, score: float) -> None:
    assert relaxed_accuracy({1: prediction}, {1: [reference]}).per_question == {1: score}


def test_the_best_reference_counts() -> None:
    assert relaxed_accuracy({1: "12", 2: "red"}, {1: ["1", "12.1"], 2: ["blue"]}).score == 0.5


def test_another_tolerance() -> None:
    assert relaxed_accuracy({1: "109"}, {1: ["100"]}, tolerance=0.1).score == 1
    assert relaxed_accuracy({1: "101"}, {1: ["100"]}, tolerance=0).score == 0


@pytest.mark.parametrize("metric", [exact_match, relaxed_accuracy])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no reference answers"),
        ({1: "a"}, {2: ["a"]}, "have no prediction"),
        ({1: "a"}, {1: []}, "no list of reference answers"),
        ({1: 5}, {1: ["5"]}, "predictions are not text"),
    ],
)
def test_bad_input_gets_one_sentence(metric: Any, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metric(predictions, references)


texts = st.one_of(st.sampled_from(["5%", "100", "104", "0", "nan", "Red"]), st.text(max_size=8))
records = st.dictionaries(st.integers(), st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1)


@given(records, st.randoms())
def test_range_and_order(records: Any, shuffler: random.Random) -> None:
    predictions = {key: prediction for key, (prediction, _) in records.items()}
    references = {key: answers for key, (_, answers) in records.items()}
    keys = list(records)
    shuffler.shuffle(keys)
    shuffled = {key: shuffler.sample(references[key], len(references[key])) for key in keys}
    for metric in (exact_match, relaxed_accuracy):
        result = metric(predictions, references)
        assert 0 <= result.score <= 1
        assert metric(predictions, shuffled) == result


@given(records)
def test_a_reference_scores_1_but_for_what_is_no_number_to_be_near(records: Any) -> None:
    references = {key: answers for key, (_, answers) in records.items()}
    predictions = {key: answers[0] for key, answers in references.items()}
    assert exact_match(predictions, references).score == 1
    # The script compares these two as numbers, and neither is near anything.
    known = {key for key, text in predictions.items() if text.strip("+-% \n").lower() not in ("nan", "inf", "infinity")}
    scores = relaxed_accuracy(predictions, references).per_question
    assert all(scores[key] for key in known)
