"""VQA accuracy equals the official script's on its own printed scores, to the last digit."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmvqa.errors import InputError
from vlmvqa.metrics import normalize_answer, vqa_accuracy
from vlmvqa.metrics.vqa import _CONTRACTION, _strip_punctuation

GOLDEN = Path(os.environ.get("VLMVQA_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")) / "vqa"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason=f"the official scores are not in {GOLDEN}; set VLMVQA_GOLDEN to the folder that holds vqa/",
)

SETS = ("textvqa_val_500", "vizwiz_val_500")
RULES = ("annotator1", "majority", "majority_noisy", "last_of_prev")
FILES = [(name, rule) for name in SETS for rule in RULES]
TEN_YES = {1: ["yes"] * 10}


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def read_annotations(name: str) -> dict[str, Any]:
    rows = {row["question_id"]: row for row in read(f"{name}_annotations.json")["annotations"]}
    return {
        "references": {key: [answer["answer"] for answer in row["answers"]] for key, row in rows.items()},
        "answer_types": {key: row.get("answer_type") for key, row in rows.items()},
        "question_types": {key: row.get("question_type") for key, row in rows.items()},
    }


def read_predictions(name: str, rule: str) -> dict[int, str]:
    return {row["question_id"]: row["answer"] for row in read(f"{name}_pred_{rule}.json")}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@needs_golden
@pytest.mark.parametrize(("name", "rule"), FILES)
def test_prints_what_the_official_script_prints(name: str, rule: str) -> None:
    official = read(f"{name}_pred_{rule}_official_accuracy.json")["accuracy"]
    result = vqa_accuracy(read_predictions(name, rule), **read_annotations(name))
    assert result.overall == official["overall"]
    assert result.per_answer_type == official["perAnswerType"]
    assert result.per_question_type == official["perQuestionType"]
    assert list(result.per_question_type) == list(official["perQuestionType"])


@needs_golden
@pytest.mark.parametrize(("name", "rule"), FILES)
def test_every_question_scores_what_the_official_script_gives_it(name: str, rule: str) -> None:
    official = read(f"{name}_pred_{rule}_official_evalQA.json")
    result = vqa_accuracy(read_predictions(name, rule), **read_annotations(name))
    assert {str(question): value for question, value in result.per_question.items()} == official


@needs_golden
@pytest.mark.parametrize(("name", "rule"), FILES)
def test_agrees_before_rounding_too(name: str, rule: str) -> None:
    official = read(f"{name}_pred_{rule}_official_accuracy.json")["accuracy_6dp"]
    annotations = read_annotations(name)
    scores = vqa_accuracy(read_predictions(name, rule), **annotations).per_question
    assert mean(list(scores.values())) == pytest.approx(official["overall"], abs=1e-6)
    for types, expected in (
        (annotations["answer_types"], official["perAnswerType"]),
        (annotations["question_types"], official["perQuestionType"]),
    ):
        means = {kind: mean([scores[key] for key in scores if types[key] == kind]) for kind in expected}
        assert means == pytest.approx(expected, abs=1e-6)


@needs_golden
def test_candidate_answers_to_untouched_vqav2_questions() -> None:
    references = read_annotations("allennlp_vqav2")["references"]
    for candidate, official in read("allennlp_vqav2_official_scores.json")["scores"].items():
        result = vqa_accuracy(dict.fromkeys(references, candidate), references)
        assert {str(question): value for question, value in result.per_question.items()} == official, candidate


@needs_golden
def test_normalises_as_the_official_script() -> None:
    cases = read("normalisation_cases_official.json")
    assert {text: _strip_punctuation(text) for text in cases} == {
        text: case["processPunctuation"] for text, case in cases.items()
    }
    assert {text: normalize_answer(text) for text in cases} == {text: case["full"] for text, case in cases.items()}


@needs_golden
def test_scores_stated_in_public() -> None:
    for case in read("published_small_cases.json"):
        for answer, score in case.get("scores", case.get("scores_official", {})).items():
            assert vqa_accuracy({1: answer}, {1: case["answers"]}).overall == 100 * score, (case["source"], answer)
        for answer, score in case.get("scores_lmms_eval", {}).items():
            assert vqa_accuracy({1: answer}, {1: case["answers"]}, normalize="always").overall == 100 * score


@needs_golden
@pytest.mark.parametrize(("name", "points"), [("textvqa_val_500", 1.3), ("vizwiz_val_500", 2.4)])
def test_short_form_reads_higher_than_the_official_rule(name: str, points: float) -> None:
    predictions, references = read_predictions(name, "annotator1"), read_annotations(name)["references"]
    official = vqa_accuracy(predictions, references).overall
    assert vqa_accuracy(predictions, references, consensus="min3").overall - official == pytest.approx(points, abs=0.6)


@pytest.mark.parametrize(("matches", "percent"), [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (10, 100.0)])
def test_leave_one_out_over_ten(matches: int, percent: float) -> None:
    references = {1: ["cat"] * matches + ["dog"] * (10 - matches)}
    assert vqa_accuracy({1: "cat"}, references).per_question == {1: percent}


@pytest.mark.parametrize("references", [1, 2, 3, 4, 7, 10, 12])
def test_any_number_of_references(references: int) -> None:
    for matches in range(references + 1):
        answers = ["cat"] * matches + ["dog"] * (references - matches)
        by_hand = mean([min(1, (answers[:left] + answers[left + 1 :]).count("cat") / 3) for left in range(references)])
        assert vqa_accuracy({1: "cat"}, {1: answers}).per_question[1] == pytest.approx(100 * by_hand)


def test_unanimous_references_are_compared_raw_but_for_white_space() -> None:
    assert vqa_accuracy({1: "Yes"}, TEN_YES).overall == 0
    assert vqa_accuracy({1: "\tyes\n"}, TEN_YES).overall == 100
    assert vqa_accuracy({1: "Yes"}, {1: ["yes"] * 9 + ["no"]}).overall == 100


def test_always_and_never_normalise() -> None:
    assert vqa_accuracy({1: "Yes!"}, TEN_YES, normalize="always").overall == 100
    split = {1: ["yes"] * 9 + ["no"]}
    assert vqa_accuracy({1: "Yes!"}, split, normalize="never").overall == 0
    assert vqa_accuracy({1: " yes"}, split, normalize="never").overall == 100


def test_min3_counts_all_references() -> None:
    references = {1: ["cat"] * 2 + ["dog"] * 8}
    assert vqa_accuracy({1: "cat"}, references, consensus="min3").per_question[1] == pytest.approx(200 / 3)
    assert vqa_accuracy({1: "cat"}, references, consensus="min3").overall == 66.67


def test_at_most_32_periods_go() -> None:
    assert normalize_answer("." * 40) == "." * 8


def test_contractions() -> None:
    written = ["dont", "couldntve", "couldnt've", "couldn'tve", "yall'd've", "twas", "oclock", "im", "somebody'd"]
    assert [normalize_answer(word) for word in written] == [
        "don't", "couldntve", "couldn't've", "couldn't've", "y'all'd've", "'twas", "o'clock", "im", "somebodyd"
    ]  # fmt: skip
    assert len(_CONTRACTION) == 114


def test_types_are_optional_and_cover_every_question() -> None:
    result = vqa_accuracy({1: "yes"}, TEN_YES)
    assert (result.per_answer_type, result.per_question_type) == ({}, {})
    with pytest.raises(InputError, match=r"1 of 1 questions have no answer type \(1\)"):
        vqa_accuracy({1: "yes"}, TEN_YES, answer_types={})


def test_missing_and_extra_ids_are_counted_and_named() -> None:
    references = {number: ["yes"] * 10 for number in range(6)}
    predictions = {str(number): "yes" for number in range(5)}
    with pytest.raises(InputError) as error:
        vqa_accuracy(predictions, references)  # type: ignore[misc]
    assert "6 of 6 questions have no prediction (0, 1, 2, ...)" in str(error.value)
    assert "5 of 5 predictions have no reference answers ('0', '1', '2', ...)" in str(error.value)


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ({}, {}, {}, "no reference answers"),
        ({1: "yes"}, {1: []}, {}, "no list of reference answers"),
        ({1: "yes"}, {1: "yes"}, {}, "no list of reference answers"),
        ({1: "yes"}, {1: [None]}, {}, "no list of reference answers"),
        ({1: None}, TEN_YES, {}, "predictions are not text"),
        ({1: "yes"}, TEN_YES, {"normalize": "alway"}, "did you mean 'always'"),
        ({1: "yes"}, TEN_YES, {"consensus": "min"}, "did you mean 'min3'"),
    ],
)
def test_bad_input_gets_one_sentence(predictions: Any, references: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vqa_accuracy(predictions, references, **options)


texts = st.one_of(st.sampled_from(["yes", "Yes.", "no", "the dog", "dog", "2", "two", "dont"]), st.text(max_size=12))
records = st.dictionaries(st.integers(), st.tuples(texts, st.lists(texts, min_size=1, max_size=12)), min_size=1)


@given(records, st.sampled_from(["official", "always", "never"]), st.sampled_from(["leave_one_out", "min3"]))
def test_scores_are_percentages_and_references_stay_as_they_were(records: Any, normalize: str, consensus: str) -> None:
    predictions = {key: prediction for key, (prediction, _) in records.items()}
    references = {key: list(answers) for key, (_, answers) in records.items()}
    before = json.dumps([predictions, references])
    result = vqa_accuracy(predictions, references, normalize=normalize, consensus=consensus)
    assert json.dumps([predictions, references]) == before
    assert all(0 <= value <= 100 for value in [result.overall, *result.per_question.values()])


@given(records, st.randoms())
def test_no_order_matters(records: Any, shuffler: random.Random) -> None:
    predictions = {key: prediction for key, (prediction, _) in records.items()}
    references = {key: answers for key, (_, answers) in records.items()}
    keys = list(records)
    shuffler.shuffle(keys)
    shuffled = {key: shuffler.sample(references[key], len(references[key])) for key in keys}
    assert vqa_accuracy(predictions, shuffled) == vqa_accuracy(predictions, references)


@given(st.text(max_size=30))
def test_normalised_text_is_lower_case_words_with_single_spaces(text: str) -> None:
    normal = normalize_answer(text)
    assert normal == " ".join(normal.split())
    assert not {"a", "an", "the"} & set(normal.split())
