"""The interface between a metric and the registry: `Metric` describes a metric, `Score` holds its result.

All values are in percent, or times 100 where papers print them so (ANLS, CIDEr, BLEU, ROUGE-L).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmvqa.data.example import Question

Id = int | str
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


def mean_scorer(name: str, function: Callable[..., MeanScore]) -> Callable[..., Score]:
    """Return the `Metric.score` function of a metric that averages per-question scores in 0..1."""

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
