"""Metrics by name (`data.metric`), imported on first use.

To add a metric, write its module with a `Metric` and add a line to `METRICS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmvqa.errors import InputError, suggest
from vlmvqa.metrics.interface import Answers, Id, Metric, Score

if TYPE_CHECKING:
    from vlmvqa.data.example import Example

__all__ = ["METRICS", "Id", "Score", "check_options", "check_scorable", "metric", "score", "variants", "version"]

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
    """Return a metric by the name used in `data.metric`.

    Raises:
        InputError: the name is unknown.
    """
    if name not in METRICS:
        raise InputError(f"data.metric={name} is unknown{suggest(name, METRICS)}; use one of {', '.join(METRICS)}")
    module, _, attribute = METRICS[name].partition(":")
    found: Metric = getattr(importlib.import_module(f"vlmvqa.metrics.{module}"), attribute)
    return found


def check_options(name: str, options: Mapping[str, Any], where: str = "data.metric_options") -> None:
    """Check the options of a metric before anything is scored.

    Args:
        name: the metric.
        options: option values by name.
        where: config key of the options, for error messages.

    Raises:
        InputError: an option or its value is unknown, or an option needs Java and Java is missing.
    """
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
    """Check before training that the examples can be scored afterwards.

    Raises:
        InputError: the questions lack what the metric needs, or the model that it uses cannot be loaded.
    """
    metric(name).check_examples(examples, **options)


def version(name: str, options: Mapping[str, Any]) -> str:
    """Return the definition of a metric, with the options that change its value."""
    changing = set(metric(name).options) - {"metrics"}
    changed = ", ".join(f"{option}={value}" for option, value in options.items() if option in changing)
    return f"{metric(name).version}{f', but for {changed}' if changed else ''}"


def score(examples: Iterable[Example], answers: Answers, name: str = "vqa_accuracy", **options: Any) -> Score:
    """Score answers.

    Args:
        examples: images with their questions; questions without an answer are left out.
        answers: answer by question id.
        name: the metric.
        **options: options of the metric.
    """
    examples = list(examples)
    questions = [question for example in examples for question in example.questions if question.id in answers]
    if metric(name).needs_images:
        images = {question.id: example.image for example in examples for question in example.questions}
        options["images"] = {question.id: images[question.id] for question in questions}
    return metric(name).score(questions, {question.id: answers[question.id] for question in questions}, **options)


def variants(examples: Sequence[Example], answers: Answers, name: str, **options: Any) -> dict[str, float | None]:
    """Return the numbers that other toolkits would print for the same answers, by variant."""
    return {
        variant: score(examples, answers, name, **{**options, **changed}).overall
        for variant, changed in metric(name).variants.items()
    }
