"""Score a model on a split: the official metric, controls beside it, and the files that a result leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlmvqa.data import images
from vlmvqa.data.example import Example, Question, all_answered
from vlmvqa.data.submissions import replace_file
from vlmvqa.errors import InputError
from vlmvqa.extras.report.gallery import Record
from vlmvqa.extras.report.report import shown_images, write_report
from vlmvqa.inference import bootstrap
from vlmvqa.inference.baselines import CONTROLS, blank_images, prior_answers, shuffle_images
from vlmvqa.inference.predictor import Answer
from vlmvqa.metrics.registry import Id, Score, metric, score, variants, version


@dataclass(frozen=True)
class Asked:
    """What is evaluated.

    Attributes:
        examples: a split.
        train: the training split, for the prior control; or the reason why there is none.
        metric: its name in `scores.METRICS`.
        seed: of the shuffled images and of the intervals.
        blank: whether the control with blank images is asked for.
        variants: whether what other toolkits would print is asked for.
        options: what the metric takes besides: `data.metric_options`, GQA's choices.
        also: the metrics to print beside it, each with its options.
    """

    examples: Sequence[Example]
    train: Sequence[Example] | str
    metric: str = "vqa_accuracy"
    seed: int = 0
    blank: bool = False
    variants: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def questions(self) -> list[Question]:
        return [question for example in self.examples for question in example.questions]

    @property
    def answered(self) -> bool:
        """Whether there is anything to score against."""
        return all_answered(self.examples)


ID_KEYS = ("question_id", "questionId", "image_id", "id")
ANSWER_KEYS = ("answer", "prediction", "caption")
AnswerAll = Callable[[Sequence[Example]], Mapping[Id, Answer]]


def evaluate(
    asked: Asked, answers: Mapping[Id, Answer], answer: AnswerAll | str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score answers, and the controls beside them.

    Args:
        answers: the model's, by question id; of questions that have none, the images were left out.
        answer: asks the model again, for the controls; or the reason why it cannot be asked.

    Returns:
        the part of `metrics.json` that says how good the answers are, and a record a question for `predictions.jsonl`.
    """
    texts = {question: one.text for question, one in answers.items()}
    found: dict[str, Any] = {
        "n": len(answers),
        "unit": "question" if any(question.text for question in asked.questions) else "image",
        "cut_short": sum(one.cut for one in answers.values()),
        "metric": asked.metric,
        "metric_version": version(asked.metric, asked.options),
    }
    result: Score | None = None
    if asked.answered:
        result = score(asked.examples, texts, asked.metric, **asked.options)
        found |= {
            "n": len(result.per_question) or len(answers),  # GQA scores the balanced ones
            "metrics": {**figures(result, asked), **_beside(asked, texts)},
            "controls": _controls(asked, texts, answer),
            "variants": variants(asked.examples, texts, asked.metric, **asked.options) if asked.variants else {},
        }
    else:
        nothing = _nothing("the split has no answers")
        found |= {
            "metrics": {asked.metric: nothing},
            "controls": dict.fromkeys(_controls_asked(asked), nothing),
            "variants": {},
        }
    per_question = result.per_question if result else {}
    return found, [
        _record(example, question, answers[question.id], asked.metric, per_question.get(question.id))
        for example in asked.examples
        for question in example.questions
        if question.id in answers
    ]


def read_answers(
    path: Path, questions: Sequence[Question], named: Callable[[Id], Id] = lambda name: name, *, others: bool = False
) -> dict[Id, Answer]:
    """Answers that something else wrote, by question id.

    Either JSON lines or one JSON list of records that hold an id (`question_id`, `questionId`, `image_id` or `id`) and
    an answer (`answer`, `prediction` or `caption`), as the benchmarks' own results files do.

    Args:
        named: what a question's id is called in the benchmark's results file, where that differs.
        others: whether answers to other questions may be among them, which are passed over.

    Raises:
        InputError: the file cannot be read as such, or it does not answer exactly these questions, each once.
    """
    records = _read_records(path)
    # A key of JSON is text, the data's may be a number.
    ids = {str(name): question.id for question in questions for name in (named(question.id), question.id)}
    found: dict[Id, Answer] = {}
    for number, record in enumerate(records, start=1):
        name = next((record[key] for key in ID_KEYS if key in record), None) if isinstance(record, dict) else None
        answer = next((record[key] for key in ANSWER_KEYS if key in record), None) if name is not None else None
        if not isinstance(answer, str):
            raise InputError(
                f"{path}, record {number}: it should hold one of {', '.join(ID_KEYS)} and, as text, one of "
                f"{', '.join(ANSWER_KEYS)}"
            )
        if str(name) not in ids and others:
            continue
        if str(name) not in ids:
            raise InputError(
                f"{path}, record {number}: the split has no question {name}; score the split or slice it was made for"
            )
        if ids[str(name)] in found:
            raise InputError(f"{path}, record {number}: question {name} is answered twice; keep one answer")
        known = record.get("log_probability")
        if known is not None and not isinstance(known, int | float):
            raise InputError(f"{path}, record {number}: its log_probability is no number; fix it or leave it out")
        found[ids[str(name)]] = Answer(answer, float("nan") if known is None else known)
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        raise InputError(
            f"{path} does not answer {len(missing)} of {len(questions)} questions (question {missing[0]} first); "
            "answer all, or score a slice"
        )
    return found


def _read_records(path: Path) -> list[Any]:
    """A JSON list, or a line of JSON each."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"predictions={path} does not exist; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"predictions={path} cannot be read as text ({error})") from None
    listed = text.lstrip().startswith("[")
    records: list[Any] = []
    for number, piece in enumerate([text] if listed else text.split("\n"), start=1):
        try:
            if piece.strip():
                records.append(json.loads(piece))
        except json.JSONDecodeError as error:
            place = number + error.lineno - 1
            raise InputError(f"{path}, line {place}: broken JSON ({error.msg}); write a record a line") from None
    return records[0] if listed else records


def figures(result: Score, asked: Asked) -> dict[str, Any]:
    """A score as `metrics.json` holds it: the metric with its interval and tables, and the numbers beside it."""
    (name, overall), *others = result.numbers.items()
    about = {question.id: example.image_id for example in asked.examples for question in example.questions}
    found = bootstrap.bootstrap(result.per_question, about, asked.seed) if result.per_question else None
    first: dict[str, Any] = {"overall": overall, "interval": [found.low, found.high] if found else None}
    for table, kinds in result.tables.items():
        first[f"per_{table}"] = {kind: value for kind, (value, _) in kinds.items()}
        first[f"n_per_{table}"] = {kind: n for kind, (_, n) in kinds.items()}
        if table in ("answer_type", "question_type"):
            groups = {q.id: getattr(q, table) or "unknown" for q in asked.questions if q.id in result.per_question}
            sure = bootstrap.bootstrap_groups(result.per_question, about, groups, asked.seed)
            first[f"interval_per_{table}"] = {kind: [one.low, one.high] for kind, one in sure.items() if one}
    numbers = {name: first, **{other: {"overall": value} for other, value in others}}
    for other, reason in result.reasons.items():
        numbers[other]["reason"] = reason
    return numbers


def _beside(asked: Asked, texts: Mapping[Id, str]) -> dict[str, Any]:
    """The numbers of the metrics that are asked for beside the task's own."""
    scores = [score(asked.examples, texts, name, **options) for name, options in asked.also.items()]
    return {name: {"overall": value} for one in scores for name, value in one.numbers.items()}


def _controls_asked(asked: Asked) -> list[str]:
    return [name for name in CONTROLS if name != "blank_images" or asked.blank]


def _controls(asked: Asked, texts: Mapping[Id, str], answer: AnswerAll | str) -> dict[str, dict[str, Any]]:
    """How far one gets without the image, and with a wrong one: the same figures of the same questions."""
    readable = [example for example in asked.examples if example.questions[0].id in texts]

    def of(other: Mapping[Id, str]) -> dict[str, Any]:
        result = score(asked.examples, {question: other[question] for question in texts}, asked.metric, **asked.options)
        return figures(result, asked)[asked.metric]

    def shown(others: Sequence[Example] | None) -> dict[str, Any]:
        if isinstance(answer, str):
            return _nothing(answer)
        if others is None:
            return _nothing("one image cannot be shuffled")
        return of({question: one.text for question, one in answer(others).items()})

    found = {
        "prior": _nothing(asked.train)
        if isinstance(asked.train, str)
        else of(prior_answers(asked.train, asked.examples)),
        "shuffled_images": shown(shuffle_images(readable, asked.seed)),
    }
    return {**found, "blank_images": shown(blank_images(readable))} if asked.blank else found


def write_results(
    folder: Path,
    metrics: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    write_submission: Callable[[Path, Mapping[Id, str]], None],
    *,
    title: str,
    log: Sequence[Record],
    config_yaml: str,
    samples: Sequence[Record] = (),
    attributions: Sequence[tuple[Record, Image]] | str = (),
) -> None:
    """Leave `metrics.json`, `predictions.jsonl`, `submission.json` and `report.html`.

    Args:
        write_submission: the source's, of the benchmark's official results file.
        log, samples, attributions: for the report, as it takes them.
    """
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in predictions)
    replace_file(folder / "predictions.jsonl", "".join(lines))
    write_submission(folder / "submission.json", {record["question_id"]: record["answer"] for record in predictions})
    shown = shown_images(predictions, metrics["metric"], samples)
    pictures = {}
    for example in examples:
        with suppress(InputError):  # of answers that another program wrote; here a picture was read before
            if example.image_id in shown:
                pictures[example.image_id] = images.decode(example.image, example.name)
    write_report(
        folder / "report.html",
        title=title,
        metrics=metrics,
        log=log,
        predictions=predictions,
        images=pictures,
        config_yaml=config_yaml,
        samples=samples,
        attributions=attributions,
    )
    # Last: a folder that has it is whole.
    replace_file(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def table(metrics: Mapping[str, Any]) -> str:
    """The scores as text: the metric and its kinds beside the controls, and the numbers that have none beside them."""
    name = metrics["metric"]
    columns = {"model": metrics["metrics"][name]}
    columns |= {CONTROLS[control].name: of for control, of in metrics["controls"].items()}
    kinds = sorted(columns["model"].get("per_answer_type", {}))
    lines = [f"{metric(name).title:<20}" + "".join(f"{column:>19}" for column in columns)]
    for kind in ["overall", *kinds]:
        values = [
            of["overall"] if kind == "overall" else of.get("per_answer_type", {}).get(kind) for of in columns.values()
        ]
        lines.append(f"{kind:<20}" + "".join(f"{_printed(value):>19}" for value in values))
        if kind == "overall" and columns["model"].get("interval"):
            low, high = columns["model"]["interval"]
            lines.append(f"{'95 % interval':<20}" + f"{f'{low:.2f} - {high:.2f}':>19}")
    others = {other: of["overall"] for other, of in metrics["metrics"].items() if other != name}
    others |= metrics["variants"]
    lines += [f"{other:<20}{_printed(value):>19}" for other, value in others.items()]
    named = {**columns, **{other: of for other, of in metrics["metrics"].items() if other != name}}
    reasons = [f"{column}: {of['reason']}" for column, of in named.items() if of.get("reason")]
    if metrics.get("cut_short"):
        reasons.append(f"truncated at decoding.max_new_tokens: {metrics['cut_short']} of the answers")
    return "\n".join([*lines, f"{metrics['n']} {metrics['unit']}s", *reasons])


def _printed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _nothing(reason: str) -> dict[str, Any]:
    """A result that could not be had, and why: never a 0."""
    return {"overall": None, "interval": None, "reason": reason}


def _record(example: Example, question: Question, answer: Answer, metric: str, value: float | None) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "image_id": example.image_id,
        "question": question.text,
        "answer": answer.text,
        "log_probability": None if math.isnan(answer.log_probability) else answer.log_probability,
        "target": question.target,
        "answers": list(question.answers),
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        metric: value,
    }
