"""Our score and a harness's of the same answers, and the reason for a difference."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.evaluation.compare_scores import Theirs, read_harness, table

# "Yes" is scored unnormalised by the official script, because all agree.
ANSWERS = {0: ("Yes",) * 10, 1: ("red",) * 3 + ("blue",) * 7, 2: ("2",) * 10}
EXAMPLES = [Example(b"", 0, tuple(Question(n, f"question {n}?", "", answers=known) for n, known in ANSWERS.items()))]
QUESTIONS = EXAMPLES[0].questions
GIVEN = {0: "yes", 1: "red", 2: "two"}


def lines(text: str) -> dict[str, float]:
    return {found[1].strip(): float(found[2]) for found in re.finditer(r"^(.*?) +(\d+\.\d\d)", text, re.MULTILINE)}


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ((0.0, 90.0, 0.0), "reason: none is needed"),
        ((100.0, 90.0, 100.0), "reason: the harness scores as our normalize=always: it normalises all answers"),
        ((0.0, 100.0, 0.0), "reason: the harness scores as our consensus=min3"),
        (
            (0.0, 50.0, 0.0),
            "reason: none of our variants scores every answer as the harness does; for example 1: ",
        ),
    ],
)
def test_the_reason_is_the_variant_that_scores_every_answer_as_the_harness(
    scores: tuple[float, ...], reason: str
) -> None:
    text = table(EXAMPLES, "vqa_accuracy", {}, GIVEN, Theirs(GIVEN, dict(enumerate(scores))))
    assert text.splitlines()[-1].startswith(reason), text
    found = lines(text)
    assert found["vqa_accuracy, our answers"] == found["vqa_accuracy"] == 30.0
    assert found["their score"] == pytest.approx(sum(scores) / 3, abs=0.01)
    assert found["vqa_accuracy normalize=always"] == 96.67
    assert "3 of 3 answers are equal" in text


def test_other_answers_are_counted() -> None:
    theirs = Theirs({**GIVEN, 1: "blue"}, {0: 0.0, 1: 100.0, 2: 0.0})
    text = table(EXAMPLES, "vqa_accuracy", {}, GIVEN, theirs)
    assert "2 of 3 answers are equal" in text
    assert (lines(text)["vqa_accuracy, our answers"], lines(text)["vqa_accuracy, their answers"]) == (30.0, 33.33)


def write_jsonl(path: Path, **changed: Any) -> Path:
    records = [
        {"doc_id": n, "input": f"question {n}?", "filtered_resps": answer, "exact_match": 0.9, **changed}
        for n, answer in GIVEN.items()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_samples_of_lmms_eval(tmp_path: Path) -> None:
    found = read_harness(write_jsonl(tmp_path / "samples.jsonl"), QUESTIONS, "vqa_accuracy")
    assert found == Theirs(GIVEN, dict.fromkeys(GIVEN, 90.0))


@pytest.mark.parametrize(("name", "expected"), [("vqa_accuracy", 80.0), ("anls", 90.0), ("exact_match", 90.0)], ids=str)
def test_results_of_vlmevalkit(tmp_path: Path, name: str, expected: float) -> None:
    """Its column holds the matches with each reference: for ANLS distances."""
    path = tmp_path / "a_results.tsv"
    matches = "[0.1, 0.9]" if name == "anls" else "[0.7, 0.9]"
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(("index", "question", "prediction", "eval_match"))
        rows.writerows((n, f"question {n}?", answer, matches) for n, answer in GIVEN.items())
    found = read_harness(path, QUESTIONS, name)
    assert found.answers == GIVEN and found.scores[0] == pytest.approx(expected)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for changed, said in (
        ({"input": "another?"}, "question 0: 'another?' is not the run's; score the files"),
        ({"doc_id": 3}, "question 3: 'question 0?' is not the run's"),
        ({"filtered_resps": ["-1.2", "True"]}, "holds no scored answers"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            read_harness(write_jsonl(path, **changed), QUESTIONS, "vqa_accuracy")
    (tmp_path / "answers.tsv").write_text("index\tquestion\tprediction\n0\tquestion 0?\tyes\n")
    with pytest.raises(InputError, match="give the file whose name ends in _results"):
        read_harness(tmp_path / "answers.tsv", QUESTIONS, "vqa_accuracy")
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        read_harness(tmp_path / "none.jsonl", QUESTIONS, "vqa_accuracy")
