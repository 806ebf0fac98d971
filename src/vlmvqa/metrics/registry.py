"""Metrics by name (`data.metric`), imported on first use; and what all metrics share.

To add a metric, write its module with a `Metric` and add a line to `METRICS`. All values are in percent, or times 100
where papers print them so (ANLS, CIDEr, BLEU, ROUGE-L).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from vlmvqa.errors import InputError, suggest

if TYPE_CHECKING:
    from vlmvqa.data.example import Example, Question

Id = int | str
AnyId = TypeVar("AnyId", bound=int | str)
Answers = Mapping[Id, str]


@dataclass(frozen=True)
class Score:
    """Result of a metric.

    Attributes:
        numbers: value by name, the main one first; None if it could not be computed.
        per_question: value of the main number for each question.
        tables: main number and question count by category, for each table (`answer_type`, `question_type`).
        reasons: why a number is None, by its name.
    """

    numbers: dict[str, float | None]
    per_question: dict[Id, float] = field(default_factory=dict)
    tables: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def overall(self) -> float | None:
        """The main number."""
        return next(iter(self.numbers.values()))


@dataclass(frozen=True)
class Metric:
    """Entry of a metric in the registry.

    Attributes:
        title: column heading.
        version: definition of the metric, written to `metrics.json`.
        score: function of the questions (with references), their answers by id, and the options.
        check_options: raises for option values that `score` would reject.
        check_examples: raises if `score` could not score these examples with these options.
        options: names of the options accepted in `data.metric_options`.
        variants: options that reproduce other toolkits' numbers, by name.
        correct_from: lowest score of an answer shown as correct; None if no such score exists (captions).
        needs_images: whether `score` takes the images by question id as `images`.
    """

    title: str
    version: str
    score: Callable[..., Score]
    check_options: Callable[..., Any] = field(default=lambda: None)
    check_examples: Callable[..., None] = field(default=lambda examples, **options: None)
    options: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    correct_from: float | None = 50.0
    needs_images: bool = False

    def is_correct(self, score: float | None) -> bool | None:
        """Return whether an answer with this score is shown as correct; None if that is undefined."""
        return None if self.correct_from is None or score is None else score >= self.correct_from


@dataclass(frozen=True, slots=True)
class MeanScore:
    """The mean over all questions, and the score of each question by id."""

    score: float
    per_question: dict[Id, float]


def mean_over_questions(
    predictions: Mapping[AnyId, str],
    references: Mapping[AnyId, Sequence[str]],
    score: Callable[[str, Sequence[str]], float],
) -> MeanScore:
    """Check predictions and references, and score each question by its prediction and its references."""
    check_answers(predictions, references)
    scores: dict[Id, float] = {
        question: score(predictions[question], answers) for question, answers in references.items()
    }
    return MeanScore(fmean(scores.values()), scores)


def mean_scorer(name: str, function: Callable[..., MeanScore]) -> Callable[..., Score]:
    """Return the `Metric.score` function of a metric that averages per-question scores."""

    def score(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
        result = function(answers, references_by_id(questions), **options)
        per_question = percent(result.per_question)
        return Score({name: 100 * result.score}, per_question, tables_by_type(questions, per_question))

    return score


def references_by_id(questions: Sequence[Question]) -> dict[Id, Sequence[str]]:
    """Return the reference answers by question id."""
    return {question.id: question.answers for question in questions}


def percent(per_question: Mapping[Any, float]) -> dict[Id, float]:
    """Convert shares to percent."""
    return {question: 100 * value for question, value in per_question.items()}


def tables_by_type(
    questions: Sequence[Question], per_question: Mapping[Id, float]
) -> dict[str, dict[str, tuple[float, int]]]:
    """Return mean score and question count by answer type and by question type, where questions have types."""
    tables = {}
    for kind in ("answer_type", "question_type"):
        groups: dict[str, list[float]] = {}
        for question in questions:
            name = getattr(question, kind)
            if name is not None:
                groups.setdefault(name, []).append(per_question[question.id])
        if groups:
            tables[kind] = {name: (sum(values) / len(values), len(values)) for name, values in groups.items()}
    return tables


# ---- metrics by name

# Module under `vlmvqa.metrics`, and the `Metric` in it.
METRICS = {
    "vqa_accuracy": "vqa:VQA_ACCURACY",
    "anls": "levenshtein:ANLS",
    "gqa_accuracy": "gqa:GQA_ACCURACY",
    "cider": "captions:CIDER",
    "exact_match": "string_match:EXACT_MATCH",
    "helm_bleu_1": "bleu:HELM_BLEU_1",
    "corpus_bleu": "bleu:CORPUS_BLEU",
    "clip_similarity": "clip_score:CLIP_SIMILARITY",
    "relaxed_accuracy": "string_match:RELAXED_ACCURACY",
}


def metric(name: str) -> Metric:
    """Return a metric by the name used in `data.metric`."""
    if name not in METRICS:
        raise InputError(f"data.metric={name} is unknown{suggest(name, METRICS)}; use one of {', '.join(METRICS)}")
    module, _, attribute = METRICS[name].partition(":")
    found: Metric = getattr(importlib.import_module(f"vlmvqa.metrics.{module}"), attribute)
    return found


def check_options(name: str, options: Mapping[str, Any], where: str = "data.metric_options") -> None:
    """Raise an InputError if an option of a metric or its value is unknown, or needs Java and Java is missing."""
    known = metric(name).options
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise InputError(f"{where} has no key '{option}' for {name}{suggest(option, known)} (known: {listed})")
    try:
        metric(name).check_options(**options)
    except TypeError as error:
        raise InputError(f"{where}={dict(options)} cannot be passed to {name} ({error}); correct the value") from None


def check_scorable(name: str, examples: Iterable[Example], **options: Any) -> None:
    """Raise an InputError if the questions lack what the metric needs, or its model cannot be loaded."""
    metric(name).check_examples(examples, **options)


def version(name: str, options: Mapping[str, Any]) -> str:
    """Return the definition of a metric, with the options that change its value."""
    changing = set(metric(name).options) - {"metrics"}
    changed = ", ".join(f"{option}={value}" for option, value in options.items() if option in changing)
    return f"{metric(name).version}{f', but for {changed}' if changed else ''}"


def score(examples: Iterable[Example], answers: Answers, name: str = "vqa_accuracy", **options: Any) -> Score:
    """Score answers by question id with the metric `name`; questions without an answer are left out."""
    examples = list(examples)
    questions = [question for example in examples for question in example.questions if question.id in answers]
    if metric(name).needs_images:
        if any(example.more_images for example in examples):
            raise InputError(f"the metric {name} compares with one image, but a question has several; leave it out")
        images = {question.id: example.image for example in examples for question in example.questions}
        options["images"] = {question.id: images[question.id] for question in questions}
    return metric(name).score(questions, {question.id: answers[question.id] for question in questions}, **options)


def variants(examples: Sequence[Example], answers: Answers, name: str, **options: Any) -> dict[str, float | None]:
    """Return the numbers that other toolkits would print for the same answers, by variant."""
    return {
        variant: score(examples, answers, name, **{**options, **changed}).overall
        for variant, changed in metric(name).variants.items()
    }


# ---- checks of a metric's input


def check_option(option: str, name: str, known: Iterable[str]) -> None:
    """Raise an error unless `name` is a known value of the option."""
    if name not in known:
        raise InputError(f"{option}={name!r} is unknown{suggest(name, known)}; use one of {', '.join(known)}.")


def check_answers(predictions: Mapping[AnyId, str], references: Mapping[AnyId, Sequence[str]]) -> None:
    """Raise an InputError unless each question has a prediction (a string) and a list of references (strings)."""
    if not references:
        raise InputError("There are no reference answers to score against; use a split that has answers.")
    check_ids("prediction", predictions, references, exactly=True)
    if wrong := [question for question, answers in references.items() if not _is_list_of_text(answers)]:
        raise InputError(
            f"{len(wrong)} of {len(references)} questions have no list of reference answers ({first_ids(wrong)}); "
            "give each a list of at least one string."
        )
    check_text(predictions)


def check_text(predictions: Mapping[AnyId, str]) -> None:
    """Raise an error unless all predictions are strings."""
    if wrong := [question for question, answer in predictions.items() if not isinstance(answer, str)]:
        raise InputError(
            f"{len(wrong)} of {len(predictions)} predictions are not text ({first_ids(wrong)}); give strings."
        )


def _is_list_of_text(answers: object) -> bool:
    if not isinstance(answers, Sequence) or isinstance(answers, str):  # a string is a sequence of strings too
        return False
    return len(answers) > 0 and all(isinstance(answer, str) for answer in answers)


def check_ids(
    noun: str, given: Mapping[AnyId, object] | None, references: Mapping[AnyId, object], exactly: bool = False
) -> None:
    """Raise an InputError unless `given` has a value (a `noun`) for each question, and `exactly` these if set.

    None is not checked.
    """
    if given is None:
        return
    missing = [question for question in references if question not in given]
    extra = [question for question in given if question not in references] if exactly else []
    if not missing and not extra:
        return
    problems = [f"{len(missing)} of {len(references)} questions have no {noun} ({first_ids(missing)})"] * bool(missing)
    problems += [f"{len(extra)} of {len(given)} {noun}s have no reference answers ({first_ids(extra)})"] * bool(extra)
    raise InputError(f"{' and '.join(problems)}; score exactly the questions of one split, with ids of the same kind.")


def first_ids(ids: Sequence[object]) -> str:
    """Format the first three ids for an error message."""
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")
