"""Score a model on a split: official metric, two controls beside it, and the files that a result leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmvqa.data import images
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.vqav2 import write_submission
from vlmvqa.inference.baselines import prior_answers, shuffle_images
from vlmvqa.inference.predict import Answer, Predictor
from vlmvqa.inference.report import choose_gallery, write_report
from vlmvqa.metrics import VqaAccuracy, vqa_accuracy

METRIC_VERSION = "vqa_accuracy: official script of 2021"


def score(examples: Sequence[Example], answers: Mapping[int | str, str]) -> VqaAccuracy:
    """The official VQA accuracy of answers by question id, over the questions that have one."""
    questions = [question for question in _questions(examples) if question.id in answers]
    return vqa_accuracy(
        {question.id: answers[question.id] for question in questions},
        {question.id: question.answers for question in questions},
        answer_types={question.id: question.answer_type or "unknown" for question in questions},
        question_types={question.id: question.question_type or "unknown" for question in questions},
    )


def evaluate(
    predictor: Predictor,
    examples: Sequence[Example],
    train: Sequence[Example] | str,
    facts: Mapping[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    bad_records: BadRecords | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Answer every question; score the answers and the two controls.

    Args:
        train: the training split, for the prior control; or the reason why there is none.
        facts: what the numbers were measured with (split, checkpoint, ...), copied into the metrics.

    Returns:
        `metrics.json`'s content, and a record a question for `predictions.jsonl`.
    """
    bad_records = bad_records or BadRecords()
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "workers": workers,
        "bad_records": bad_records,
        "progress": True,
    }
    answers = predictor.answer_examples(examples, **options)
    texts = {question: answer.text for question, answer in answers.items()}
    metrics: dict[str, Any] = {"n": len(answers), **facts}
    if all(question.answers for question in _questions(examples)):
        result = score(examples, texts)
        metrics["metrics"] = {"vqa_accuracy": _table(result)}
        metrics["controls"] = {
            "prior": _prior(examples, texts, train),
            "shuffled_images": _shuffled(predictor, examples, texts, seed, options),
        }
        per_question: Mapping[Any, float] = result.per_question
    else:
        nothing = _nothing("the split has no answers")
        metrics["metrics"] = {"vqa_accuracy": nothing}
        metrics["controls"] = {"prior": nothing, "shuffled_images": nothing}
        per_question = {}
    metrics |= {"metric_version": METRIC_VERSION, "skipped": bad_records.listed()}
    return metrics, [
        _record(example, question, answers[question.id], per_question.get(question.id))
        for example in examples
        for question in example.questions
        if question.id in answers
    ]


def write_results(
    folder: Path,
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    *,
    title: str,
    log: Sequence[Mapping[str, Any]],
    config_yaml: str,
) -> None:
    """Leave `metrics.json`, `predictions.jsonl`, `submission.json` (the official results file) and `report.html`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in predictions)
    write_submission(folder / "submission.json", {record["question_id"]: record["answer"] for record in predictions})
    shown = {record["image_id"] for group in choose_gallery(predictions) for record in group}
    pictures = {
        example.image_id: images.decode(example.image, example.name)
        for example in examples
        if example.image_id in shown
    }
    write_report(
        folder / "report.html",
        title=title,
        metrics=metrics,
        log=log,
        predictions=predictions,
        images=pictures,
        config_yaml=config_yaml,
    )


def table(metrics: Mapping[str, Any]) -> str:
    """The headline as text: VQA accuracy by answer type, beside its controls."""
    columns = {
        "model": metrics["metrics"]["vqa_accuracy"],
        "prior": metrics["controls"]["prior"],
        "shuffled images": metrics["controls"]["shuffled_images"],
    }
    kinds = sorted(columns["model"]["per_answer_type"])
    lines = [f"{'VQA accuracy (%)':<20}" + "".join(f"{name:>17}" for name in columns)]
    for kind in ["overall", *kinds]:
        values = [
            column["overall"] if kind == "overall" else column["per_answer_type"].get(kind)
            for column in columns.values()
        ]
        lines.append(f"{kind:<20}" + "".join(f"{'-' if value is None else f'{value:.2f}':>17}" for value in values))
    reasons = [f"{name}: {column['reason']}" for name, column in columns.items() if column.get("reason")]
    return "\n".join([*lines, f"{metrics['n']} questions", *reasons])


def _questions(examples: Sequence[Example]) -> list[Question]:
    return [question for example in examples for question in example.questions]


def _table(result: VqaAccuracy) -> dict[str, Any]:
    return {
        "overall": result.overall,
        "per_answer_type": result.per_answer_type,
        "per_question_type": result.per_question_type,
    }


def _nothing(reason: str) -> dict[str, Any]:
    """A result that could not be had, and why: never a 0."""
    return {"overall": None, "per_answer_type": {}, "per_question_type": {}, "reason": reason}


def _prior(
    examples: Sequence[Example], texts: Mapping[int | str, str], train: Sequence[Example] | str
) -> dict[str, Any]:
    if isinstance(train, str):
        return _nothing(train)
    answers = prior_answers(train, examples)
    return _table(score(examples, {question: answers[question] for question in texts}))


def _shuffled(
    predictor: Predictor,
    examples: Sequence[Example],
    texts: Mapping[int | str, str],
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    readable = [example for example in examples if example.questions[0].id in texts]
    shuffled = shuffle_images(readable, seed)
    if shuffled is None:
        return _nothing("one image cannot be shuffled")
    answers = predictor.answer_examples(shuffled, **options)
    return _table(score(shuffled, {question: answer.text for question, answer in answers.items()}))


def _record(example: Example, question: Question, answer: Answer, accuracy: float | None) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "image_id": example.image_id,
        "question": question.text,
        "answer": answer.text,
        "log_probability": answer.log_probability,
        "target": question.target,
        "answers": list(question.answers),
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "vqa_accuracy": accuracy,
    }
