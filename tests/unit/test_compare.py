"""Comparison of two scored runs; runs that cannot be compared are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmvqa.errors import InputError
from vlmvqa.extras.report.compare import compare_runs, table


def leave(folder: Path, right: set[int], n: int = 40, **changes: Any) -> Path:
    """Write the results of a run on `n` questions, four per image, some of them correct."""
    folder.mkdir()
    metrics = {
        "metric": "exact_match",
        "metric_version": "1",
        "data": "jsonl",
        "split": "val",
        "metrics": {"exact_match": {"overall": 100 * len(right) / n}},
        **changes,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    records = [
        {
            "question_id": number,
            "image_id": number // 4,
            "question": f"What is {number}?",
            "answer": "yes" if number in right else "no",
            "answers": ["yes"],
            "answer_type": "even" if number % 2 == 0 else "odd",
            "question_type": None,
            "exact_match": 100.0 * (number in right),
        }
        for number in range(n)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_better_run_is_better_by_what_it_answered_better(tmp_path: Path) -> None:
    first, second = leave(tmp_path / "a", set(range(0, 40, 4))), leave(tmp_path / "b", set(range(0, 40, 2)) - {0})
    found = compare_runs(first, second)
    overall = found["overall"]
    assert (overall["first"], overall["second"], overall["difference"]) == (25.0, 47.5, 22.5)
    assert overall["interval"][0] < 22.5 < overall["interval"][1] and overall["p_permutation"] < 0.05
    assert found["per_answer_type"]["odd"]["difference"] == 0
    assert found["per_answer_type"]["even"]["difference"] == 45
    flipped = {flip["question_id"]: flip["difference"] for flip in found["flipped"]}
    assert flipped == {0: -100.0, **dict.fromkeys(range(2, 40, 4), 100.0)}
    printed = table(found)
    assert "10 better, 1 worse" in printed and "What is 0?  'yes' -> 'no'" in printed
    assert "even" in printed and "+22.50" in printed


def test_the_same_run_twice(tmp_path: Path) -> None:
    folder = leave(tmp_path / "a", {1, 2, 3})
    found = compare_runs(folder, folder)
    assert found["overall"]["difference"] == 0 and found["overall"]["p_permutation"] == 1 and found["flipped"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "test"}, "split is val in one and test in the other"),
        ({"metric_version": "2"}, "metric_version is 1 in one and 2 in the other"),
        ({"n": 36}, "they differ by 4 questions"),
    ],
)
def test_what_is_not_comparable_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    one, two = leave(tmp_path / "a", {1}), leave(tmp_path / "b", {1}, **changes)
    with pytest.raises(InputError, match=said):
        compare_runs(one, two)


def test_an_unscored_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no metrics\.json"):
        compare_runs(tmp_path, tmp_path)
    nothing = {"exact_match": {"overall": None, "reason": "the split has no answers"}}
    folder = leave(tmp_path / "a", set(), metrics=nothing)
    with pytest.raises(InputError, match="the split has no answers"):
        compare_runs(folder, folder)


def test_other_references_to_the_same_questions_are_refused(tmp_path: Path) -> None:
    first, second = leave(tmp_path / "a", {1}), leave(tmp_path / "b", {2})
    predictions = second / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"answers": ["yes"]', '"answers": ["yes!"]', 1))
    with pytest.raises(InputError, match="question 0 has different images, texts or reference answers in the two runs"):
        compare_runs(first, second)


@pytest.mark.parametrize("name", ["metrics.json", "predictions.jsonl"])
def test_half_a_result_is_one_sentence(tmp_path: Path, name: str) -> None:
    first, second = leave(tmp_path / "a", {1}), leave(tmp_path / "b", {2})
    (second / name).write_text((second / name).read_text()[:-9])
    with pytest.raises(InputError, match=r"the results in .*b are incomplete .* score it again"):
        compare_runs(first, second)
