"""GQA's scores equal the official script's on its own printed scores."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmvqa.errors import InputError
from vlmvqa.metrics import gqa_scores

GOLDEN = Path(os.environ.get("VLMVQA_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")) / "gqa"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason=f"the official scores are not in {GOLDEN}; set VLMVQA_GOLDEN to the folder that holds gqa/",
)
TABLES = {
    "per_structural_type": "accuracyPerStructuralType",
    "per_semantic_type": "accuracyPerSemanticType",
    "per_steps": "accuracyPerSteps",
    "per_words": "accuracyPerLength",
}


def read(name: str) -> Any:
    return json.loads((GOLDEN / f"xgqa_en_dev{name}.json").read_text(encoding="utf-8"))


def read_predictions(rule: str) -> dict[str, str]:
    return {row["questionId"]: row["prediction"] for row in read(f"_pred_{rule}")}


def question(answer: str = "red", **changes: Any) -> dict[str, Any]:
    """Return a record in the official format."""
    return {
        "isBalanced": True,
        "question": "What color is it?",
        "answer": answer,
        "semantic": [{"operation": "select", "argument": "car (1)"}, {"operation": "query", "argument": "color"}],
        "types": {"structural": "query", "semantic": "attr", "detailed": "color"},
        "groups": {"global": "color"},
        "entailed": [],
        **changes,
    }


@needs_golden
@pytest.mark.parametrize("rule", ["prev_every_third", "gold_capitalised"])
def test_scores_what_the_official_script_scores(rule: str) -> None:
    official = read(f"_pred_{rule}_official")
    questions, choices = read("_closed_questions"), read("_choices_SYNTHETIC")
    result = gqa_scores(read_predictions(rule), questions, choices=choices, consistency=True)
    for name in ("accuracy", "binary", "open", "validity", "plausibility", "distribution"):
        assert getattr(result, name) == pytest.approx(official[name], abs=1e-9), name
    for ours, theirs in TABLES.items():
        table: Mapping[Any, tuple[float, int]] = getattr(result, ours)
        assert {str(key): score for key, (score, _) in table.items()} == pytest.approx(
            {key: score for key, (score, _) in official[theirs].items()}, abs=1e-9
        )
        assert {str(key): count for key, (_, count) in table.items()} == {
            key: count for key, (_, count) in official[theirs].items()
        }
    if rule == "gold_capitalised":  # nothing is correct, and the script prints 0
        assert (result.consistency, official["consistency"]) == (None, 0)
        assert result.reasons == {"consistency": "no correctly answered question entails another"}
    else:
        assert result.consistency == pytest.approx(official["consistency"], abs=1e-9)
        assert result.reasons == {}


@needs_golden
def test_consistency_is_none_where_entailed_questions_are_not_there() -> None:
    predictions = read_predictions("prev_every_third")
    result = gqa_scores(predictions, read(""), consistency=True)
    assert result.consistency is None
    assert "entailed questions have no record or prediction" in result.reasons["consistency"]
    assert result.accuracy == gqa_scores(predictions, read("_closed_questions")).accuracy


@needs_golden
def test_llava_post_processing_forgives_capitals_and_periods() -> None:
    predictions, questions = read_predictions("gold_capitalised"), read("")
    assert gqa_scores(predictions, questions).accuracy == 0
    assert gqa_scores(predictions, questions, postprocess="llava").accuracy == 100
    assert gqa_scores(predictions, questions, postprocess="vqa").accuracy == 100


@needs_golden
def test_gold_answers_score_100() -> None:
    questions = read("_closed_questions")
    result = gqa_scores({key: q["answer"] for key, q in questions.items()}, questions, consistency=True)
    assert (result.accuracy, result.binary, result.open, result.consistency, result.distribution) == (100,) * 4 + (0,)


def test_only_balanced_questions_count_and_others_may_be_answered_or_not() -> None:
    questions = {"1": question(), "2": question(isBalanced=False)}
    assert gqa_scores({"1": "red", "2": "blue"}, questions).accuracy == 100
    assert gqa_scores({"1": "red"}, questions).accuracy == 100


def test_equality_is_exact() -> None:
    for answer in ("Red", " red", "red."):
        assert gqa_scores({"1": answer}, {"1": question()}).accuracy == 0


def test_the_vqa_normaliser_changes_the_prediction_alone() -> None:
    """As in LAVIS: the prediction "t-shirt" loses its hyphen, the gold answer keeps it."""
    questions = {"1": question("car"), "2": question("t-shirt")}
    predictions = {"1": "The Car.", "2": "t-shirt"}
    assert gqa_scores(predictions, questions).accuracy == 50
    assert gqa_scores(predictions, questions, postprocess="vqa").accuracy == 50
    assert gqa_scores(predictions, questions, postprocess="vqa").per_structural_type == {"query": (50, 2)}


def test_open_and_binary() -> None:
    verify = question("yes", types={"structural": "verify", "semantic": "obj", "detailed": "exist"})
    result = gqa_scores({"1": "red", "2": "no"}, {"1": question(), "2": verify})
    assert (result.accuracy, result.open, result.binary) == (50, 100, 0)
    assert result.per_structural_type == {"query": (100, 1), "verify": (0, 1)}
    assert result.per_semantic_type == {"attr": (100, 1), "obj": (0, 1)}
    assert result.per_words == {4: (50, 2)}
    alone = gqa_scores({"1": "red"}, {"1": question()})
    assert (alone.open, alone.binary, alone.reasons["binary"]) == (100, None, "there is no binary question")


def test_steps_that_ask_only_for_the_outcome_do_not_count() -> None:
    steps = [
        {"operation": "select", "argument": "car (1)"},
        {"operation": "filter color", "argument": "red"},
        {"operation": "exist", "argument": "?"},
        {"operation": "query", "argument": "name"},
        {"operation": "choose name", "argument": "car|bus"},
        {"operation": "query", "argument": "color"},
    ]
    assert gqa_scores({"1": "red"}, {"1": question(semantic=steps)}).per_steps == {3: (100, 1)}


def test_consistency_by_hand() -> None:
    questions = {
        "1": question(entailed=["1", "3", "4"]),  # right, and one of two right
        "2": question(entailed=["3"]),  # wrong, so that it entails nothing
        "3": question("yes", isBalanced=False),
        "4": question("no", isBalanced=False, entailed=["5"]),  # not balanced
        "5": question(entailed=["3"]),  # right, and it all right
    }
    predictions = {"1": "red", "2": "blue", "3": "yes", "4": "yes", "5": "red"}
    assert gqa_scores(predictions, questions, consistency=True).consistency == 75
    result = gqa_scores(predictions, questions)
    assert (result.consistency, result.reasons["consistency"]) == (None, "not requested (consistency=True)")
    del predictions["4"]
    result = gqa_scores(predictions, questions, consistency=True)
    assert result.consistency is None and "1 entailed questions" in result.reasons["consistency"]
    assert "('4')" in result.reasons["consistency"]


def test_validity_and_plausibility_by_hand() -> None:
    common = question("color", types={"structural": "query", "semantic": "attr", "detailed": "twoCommon"})
    questions = {"1": question(), "2": common}
    choices = {"1": {"valid": ["blue", "red"], "plausible": ["red"]}, "2": {"valid": [], "plausible": []}}
    result = gqa_scores({"1": "blue", "2": "shape"}, questions, choices=choices)
    assert (result.validity, result.plausibility) == (100, 50)
    assert gqa_scores({"1": "blue", "2": "blue"}, questions, choices=choices).validity == 50
    result = gqa_scores({"1": "blue", "2": "shape"}, questions, choices={"1": choices["1"]})
    assert result.validity is None and "no 'valid' for 1 of 2 questions ('2')" in result.reasons["validity"]
    result = gqa_scores({"1": "blue", "2": "shape"}, questions)
    assert result.plausibility is None and "no choices were given" in result.reasons["plausibility"]


def test_distribution_by_hand() -> None:
    """Color: red 2, blue 1, predicted red 3: 1/2 + 1. Object: car 1, predicted bus: 1. Weighted by 3 and 1."""
    questions = {
        "1": question("red"),
        "2": question("red"),
        "3": question("blue"),
        "4": question("car", groups={"global": "object"}),
        "5": question("yes", groups={"global": None}),
    }
    predictions = {"1": "red", "2": "red", "3": "red", "4": "bus", "5": "no"}
    assert gqa_scores(predictions, questions).distribution == pytest.approx((1.5 * 3 + 1 * 1) / 4 / 100)
    result = gqa_scores({"5": "no"}, {"5": questions["5"]})
    assert (result.distribution, result.reasons["distribution"]) == (None, "no question has a global group")


@pytest.mark.parametrize(
    ("predictions", "questions", "options", "message"),
    [
        ({}, {}, {}, "no questions to score against"),
        ({}, {"1": question()}, {}, r"1 of 1 questions have no prediction \('1'\)"),
        ({"1": "a", "2": "b"}, {"1": question()}, {}, r"1 of 2 predictions have no question \('2'\)"),
        ({"1": None}, {"1": question()}, {}, "predictions are not text"),
        ({"1": "a"}, {"1": question(isBalanced=False)}, {}, "None of the 1 questions is balanced"),
        ({"1": "a"}, {"1": {"isBalanced": True}}, {}, "record of question '1' is not an official one"),
        ({"1": "a"}, {"1": question(groups=None)}, {}, "record of question '1' is not an official one"),
        ({"1": "a"}, {"1": "red"}, {}, "record of question '1' is not an official one"),
        ({"1": "a"}, {"1": question()}, {"postprocess": "lava"}, "did you mean 'llava'"),
    ],
)
def test_bad_input_gets_one_sentence(predictions: Any, questions: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gqa_scores(predictions, questions, **options)


def test_records_without_entailed_have_no_consistency() -> None:
    record = question()
    del record["entailed"]
    result = gqa_scores({"1": "red"}, {"1": record}, consistency=True)
    assert result.consistency is None and "no list `entailed`" in result.reasons["consistency"]


answers = st.sampled_from(["red", "Red.", "blue", "yes", "no", "t-shirt"])
rows = st.fixed_dictionaries(
    {
        "prediction": answers,
        "answer": answers,
        "structural": st.sampled_from(["query", "verify"]),
        "group": st.sampled_from([None, "", "color"]),
        "entailed": st.lists(st.integers(0, 5).map(str), max_size=3),
    }
)


@given(st.lists(rows, min_size=6, max_size=12), st.sampled_from([None, "none", "llava", "vqa"]), st.randoms())
def test_range_order_and_unchanged(rows: Any, postprocess: str | None, shuffler: random.Random) -> None:
    questions = {
        str(n): question(
            row["answer"],
            types={"structural": row["structural"], "semantic": "attr", "detailed": "color"},
            groups={"global": row["group"]},
            entailed=row["entailed"],
        )
        for n, row in enumerate(rows)
    }
    predictions = {str(n): row["prediction"] for n, row in enumerate(rows)}
    before = copy.deepcopy((predictions, questions))
    result = gqa_scores(predictions, questions, consistency=True, postprocess=postprocess)
    assert (predictions, questions) == before
    percents = (result.accuracy, result.binary, result.open, result.consistency)
    assert all(value is None or 0 <= value <= 100 for value in percents)
    assert result.distribution is None or result.distribution >= 0
    keys = list(questions)
    shuffler.shuffle(keys)
    shuffled = {key: questions[key] for key in keys}
    assert gqa_scores(predictions, shuffled, consistency=True, postprocess=postprocess) == result
