"""ANLS equals the challenge script's on its own printed scores."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmvqa.errors import InputError
from vlmvqa.metrics import anls

pytest.importorskip("rapidfuzz")

GOLDEN = Path(os.environ.get("VLMVQA_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")) / "docvqa"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason=f"the official scores are not in {GOLDEN}; set VLMVQA_GOLDEN to the folder that holds docvqa/",
)
COLA = ["Coca Cola", "Coca Cola Company"]


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def read_set(name: str) -> tuple[dict[int, str], dict[int, list[str]]]:
    predictions = {row["questionId"]: row["answer"] for row in read(f"{name}_submission.json")}
    return predictions, {row["questionId"]: row["answers"] for row in read(f"{name}_gold.json")["data"]}


def one(prediction: str, *answers: str, **options: Any) -> float:
    return anls({1: prediction}, {1: list(answers)}, **options).score


@needs_golden
@pytest.mark.parametrize("name", ["cocacola", "textvqa_as_docvqa_500"])
def test_scores_what_the_official_script_scores(name: str) -> None:
    official = read(f"{name}_official.json")
    result = anls(*read_set(name))
    assert result.score == pytest.approx(official["score"], abs=1e-9)
    assert {str(key): score for key, score in result.per_question.items()} == pytest.approx(
        official["per_sample"], abs=1e-9
    )


@needs_golden
def test_without_threshold_too() -> None:
    official = read("textvqa_as_docvqa_500_official.json")["score_without_threshold"]
    assert anls(*read_set("textvqa_as_docvqa_500"), threshold=0).score == pytest.approx(official, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "score"), [("The Coca", 0), ("CocaCola", 8 / 9), ("Coca cola", 1), ("Coca", 0), ("Cat", 0)]
)
def test_the_task_pages_example(prediction: str, score: float) -> None:
    assert one(prediction, *COLA) == pytest.approx(score)


def test_a_likeness_of_exactly_the_threshold() -> None:
    assert one("ab", "ax") == 0.5
    assert one("ab", "ax", inclusive=False) == 0
    assert one("abc", "abx", threshold=0.7) == 0
    assert one("abc", "abx", threshold=0.6) == pytest.approx(2 / 3)


def test_case_and_white_space_are_no_edits_but_lengthen() -> None:
    assert one("  TWO \n words", "two words") == 1
    # One edit, over the eight characters that were given, not the three that are compared.
    assert one(" ab     ", "abc") == 1 - 1 / 8
    # The longer string is measured in upper case, where "ß" has two letters.
    assert one("ß", "s", threshold=0) == 0.5


def test_empty_answers() -> None:
    assert one("", "") == 1
    assert one("", "a") == 0
    assert one(" ", "\n") == 1


def test_lower_case_can_be_longer_than_upper() -> None:
    assert one("İ", "x", threshold=0) == 0


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ({}, {}, {}, "no reference answers"),
        ({1: "a"}, {2: ["a"]}, {}, r"1 of 1 questions have no prediction \(2\) and 1 of 1 predictions"),
        ({1: "a"}, {1: "a"}, {}, "no list of reference answers"),
        ({1: 5}, {1: ["5"]}, {}, "predictions are not text"),
        ({1: "a"}, {1: ["a"]}, {"threshold": 50}, "threshold=50 is not in 0..1"),
        ({1: "a"}, {1: ["a"]}, {"threshold": float("nan")}, "threshold=nan is not in 0..1"),
    ],
)
def test_bad_input_gets_one_sentence(predictions: Any, references: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        anls(predictions, references, **options)


texts = st.one_of(st.sampled_from(["Coca Cola", "coca  cola", "cola", "ß", "İ"]), st.text(max_size=12))
records = st.dictionaries(st.integers(), st.tuples(texts, st.lists(texts, min_size=1, max_size=4)), min_size=1)


@given(records, st.sampled_from([0, 0.5, 1]), st.booleans())
def test_scores_lie_in_range_and_nothing_is_changed(records: Any, threshold: float, inclusive: bool) -> None:
    predictions = {key: prediction for key, (prediction, _) in records.items()}
    references = {key: answers for key, (_, answers) in records.items()}
    before = copy.deepcopy((predictions, references))
    result = anls(predictions, references, threshold=threshold, inclusive=inclusive)
    assert (predictions, references) == before
    assert all(0 <= value <= 1 for value in [result.score, *result.per_question.values()])


@given(records, st.randoms())
def test_no_order_matters(records: Any, shuffler: random.Random) -> None:
    predictions = {key: prediction for key, (prediction, _) in records.items()}
    references = {key: answers for key, (_, answers) in records.items()}
    keys = list(records)
    shuffler.shuffle(keys)
    shuffled = {key: shuffler.sample(references[key], len(references[key])) for key in keys}
    assert anls(predictions, shuffled) == anls(predictions, references)


@given(records)
def test_an_answer_that_is_a_reference_scores_1(records: Any) -> None:
    references = {key: answers for key, (_, answers) in records.items()}
    assert anls({key: f" {answers[-1]}\t" for key, answers in references.items()}, references).score == 1
