"""Score answers with the official metric, its confidence interval and the control baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmvqa.data.example import Example, Question, all_answered
from vlmvqa.inference import bootstrap
from vlmvqa.inference.baselines import CONTROLS, blank_images, prior_answers, shuffle_images
from vlmvqa.inference.predictor import Answer
from vlmvqa.metrics.registry import Id, Score, metric, score, variants, version


@dataclass(frozen=True)
class EvalSpec:
    """The questions, metric and controls of an evaluation.

    Attributes:
        examples: the split, with references.
        train: the training split, for the prior control; or the reason why there is none.
        metric: its name in the registry.
        seed: seed of the shuffled images and of the intervals.
        blank: whether to run the control with blank images.
        variants: whether to compute the scores that other toolkits would print.
        options: options of the metric: `data.metric_options`, GQA's choices.
        extra_metrics: further metrics to print, each with its options.
    """

    examples: Sequence[Example]
    train: Sequence[Example] | str
    metric: str = "vqa_accuracy"
    seed: int = 0
    blank: bool = False
    variants: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    extra_metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def questions(self) -> list[Question]:
        """All questions of the split."""
        return [question for example in self.examples for question in example.questions]

    @property
    def answered(self) -> bool:
        """Whether the split has answers to score against."""
        return all_answered(self.examples)


AnswerAll = Callable[[Sequence[Example]], Mapping[Id, Answer]]


def evaluate(
    spec: EvalSpec, answers: Mapping[Id, Answer], answer: AnswerAll | str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score answers and the control baselines.

    Args:
        answers: the model's, by question id; questions without one have unreadable images that were skipped.
        answer: runs the model again, for the controls; or the reason why that is impossible.

    Returns:
        the scores for `metrics.json`, and one record per question for `predictions.jsonl`.
    """
    texts = {question: one.text for question, one in answers.items()}
    found: dict[str, Any] = {
        "n": len(answers),
        "unit": "question" if any(question.text for question in spec.questions) else "image",
        "cut_short": sum(one.cut for one in answers.values()),
        "metric": spec.metric,
        "metric_version": version(spec.metric, spec.options),
    }
    result: Score | None = None
    if spec.answered:
        result = score(spec.examples, texts, spec.metric, **spec.options)
        found |= {
            "n": len(result.per_question) or len(answers),  # GQA scores the balanced ones
            "metrics": {**figures(result, spec), **_extra_scores(spec, texts)},
            "controls": _controls(spec, texts, answer),
            "variants": variants(spec.examples, texts, spec.metric, **spec.options) if spec.variants else {},
        }
    else:
        nothing = _nothing("the split has no answers")
        found |= {
            "metrics": {spec.metric: nothing},
            "controls": dict.fromkeys(_control_names(spec), nothing),
            "variants": {},
        }
    per_question = result.per_question if result else {}
    return found, [
        _record(example, question, answers[question.id], spec.metric, per_question.get(question.id))
        for example in spec.examples
        for question in example.questions
        if question.id in answers
    ]


def figures(result: Score, spec: EvalSpec) -> dict[str, Any]:
    """Return a score as `metrics.json` holds it: the metric with its interval and tables, and its further numbers."""
    (name, overall), *others = result.numbers.items()
    about = {question.id: example.image_id for example in spec.examples for question in example.questions}
    found = bootstrap.bootstrap(result.per_question, about, spec.seed) if result.per_question else None
    first: dict[str, Any] = {"overall": overall, "interval": [found.low, found.high] if found else None}
    for table, kinds in result.tables.items():
        first[f"per_{table}"] = {kind: value for kind, (value, _) in kinds.items()}
        first[f"n_per_{table}"] = {kind: n for kind, (_, n) in kinds.items()}
        if table in ("answer_type", "question_type"):
            groups = {q.id: getattr(q, table) or "unknown" for q in spec.questions if q.id in result.per_question}
            sure = bootstrap.bootstrap_groups(result.per_question, about, groups, spec.seed)
            first[f"interval_per_{table}"] = {kind: [one.low, one.high] for kind, one in sure.items() if one}
    numbers = {name: first, **{other: {"overall": value} for other, value in others}}
    for other, reason in result.reasons.items():
        numbers[other]["reason"] = reason
    return numbers


def _extra_scores(spec: EvalSpec, texts: Mapping[Id, str]) -> dict[str, Any]:
    """Return the scores of the further metrics."""
    scores = [score(spec.examples, texts, name, **options) for name, options in spec.extra_metrics.items()]
    return {name: {"overall": value} for one in scores for name, value in one.numbers.items()}


def _control_names(spec: EvalSpec) -> list[str]:
    return [name for name in CONTROLS if name != "blank_images" or spec.blank]


def _controls(spec: EvalSpec, texts: Mapping[Id, str], answer: AnswerAll | str) -> dict[str, dict[str, Any]]:
    """Return the scores of the controls, on the same questions: without the image, and with another image."""
    readable = [example for example in spec.examples if example.questions[0].id in texts]

    def of(other: Mapping[Id, str]) -> dict[str, Any]:
        result = score(spec.examples, {question: other[question] for question in texts}, spec.metric, **spec.options)
        return figures(result, spec)[spec.metric]

    def shown(others: Sequence[Example] | None) -> dict[str, Any]:
        if isinstance(answer, str):
            return _nothing(answer)
        if others is None:
            return _nothing("one image cannot be shuffled")
        return of({question: one.text for question, one in answer(others).items()})

    found = {
        "prior": _nothing(spec.train) if isinstance(spec.train, str) else of(prior_answers(spec.train, spec.examples)),
        "shuffled_images": shown(shuffle_images(readable, spec.seed)),
    }
    return {**found, "blank_images": shown(blank_images(readable))} if spec.blank else found


def table(metrics: Mapping[str, Any]) -> str:
    """Format the scores: a column each for the model and the controls, then the numbers without controls."""
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
    """Return a missing score with its reason; it is never shown as 0."""
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
