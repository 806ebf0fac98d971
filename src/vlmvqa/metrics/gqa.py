"""GQA's scores as the official script counts them: accuracy, consistency, validity, plausibility, distribution.

Source: `eval.py` of cs.stanford.edu/people/dorarad/gqa (Hudson and Manning, "GQA", CVPR 2019, section 4.4). Where the
script prints 0 for what could not be counted (consistency without one correct answer) or stops, here stands None, and
`reasons` says why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vlmvqa.errors import InputError
from vlmvqa.metrics.checks import check_ids, check_option, check_text, few
from vlmvqa.metrics.vqa_accuracy import normalize_answer

Table = dict[str, tuple[float, int]]
Record = Mapping[str, Any]

POSTPROCESS: dict[str, Callable[[str], str]] = {
    "none": lambda answer: answer,
    "llava": lambda answer: answer.rstrip(".").lower(),  # LLaVA's convert_gqa_for_eval.py
    "vqa": normalize_answer,  # as LAVIS does: of the answer alone, so that no gold answer with a hyphen can be met
}
# Steps of a question's program that the script does not count as reasoning.
_NO_STEP = ("exist", "query: name", "choose name")
# "What do both have in common?" is answered with the name of an attribute, whatever `choices` lists.
_COMMON = ("color", "material", "shape")


@dataclass(frozen=True, slots=True)
class GqaScores:
    """GQA's scores in percent, but for `distribution`: chi-square / 100, lower is better.

    Attributes:
        accuracy, binary, open: of all balanced questions, of those answered yes, no or by a choice, and of the others.
        consistency: of the answers to what a correct answer entails.
        validity, plausibility: answers in the question's scope, and answers that make sense.
        per_structural_type, per_semantic_type, per_words, per_steps: percent and number of questions, by key.
        reasons: why a score is None, by its name.
    """

    accuracy: float
    binary: float | None
    open: float | None
    consistency: float | None
    validity: float | None
    plausibility: float | None
    distribution: float | None
    per_structural_type: Table
    per_semantic_type: Table
    per_words: dict[int, tuple[float, int]]
    per_steps: dict[int, tuple[float, int]]
    reasons: dict[str, str]


def gqa_scores(
    predictions: Mapping[str, str],
    questions: Mapping[str, Record],
    *,
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    consistency: bool = False,
    postprocess: str | None = None,
) -> GqaScores:
    """Exact, case-sensitive equality with the gold answer, over the balanced questions.

    Gold answers as predictions score 100 everywhere and 0 in `distribution`; validity and plausibility too only where
    `choices` lists every gold answer.

    Args:
        predictions: answer by question id: of every balanced question, and of any others for `consistency`.
        questions: the official records by question id, of `*_balanced_questions.json` or `*_all_questions.json`.
        choices: `{"valid": [...], "plausible": [...]}` by question id, of `*_choices.json`, for those two scores.
        consistency: count it. It needs questions and predictions for all that the correctly answered ones entail,
            which only the `all` files have.
        postprocess: of predictions: "none" (official), "llava" (no last period, lower case), "vqa" (VQA's normaliser).

    Raises:
        InputError: a balanced question has no prediction, a prediction has no question, a record lacks a field, no
            question is balanced, or `postprocess` is unknown.
    """
    check_option("postprocess", postprocess or "none", POSTPROCESS)
    balanced = _balanced(questions)
    check_ids("prediction", predictions, balanced)
    if unknown := [key for key in predictions if key not in questions]:
        raise InputError(
            f"{len(unknown)} of {len(predictions)} predictions have no question ({few(unknown)}); "
            "give the file of questions that was answered."
        )
    check_text(predictions)
    answers = {key: POSTPROCESS[postprocess or "none"](answer) for key, answer in predictions.items()}
    correct = {key: answers[key] == question["answer"] for key, question in balanced.items()}
    kinds = {key: "open" if q["types"]["structural"] == "query" else "binary" for key, q in balanced.items()}
    by_kind = _table(correct, kinds)

    reasons: dict[str, str] = {}

    def known(name: str, found: float | str) -> float | None:
        """A score, or None where its reason stands instead."""
        if isinstance(found, str):
            reasons[name] = found
            return None
        return found

    return GqaScores(
        accuracy=_percent(correct.values()),
        binary=known("binary", by_kind["binary"][0] if "binary" in by_kind else "there is no binary question"),
        open=known("open", by_kind["open"][0] if "open" in by_kind else "there is no open question"),
        consistency=known(
            "consistency",
            _consistency(answers, questions, correct) if consistency else "not asked for (consistency=True)",
        ),
        validity=known("validity", _chosen(answers, balanced, choices, "valid")),
        plausibility=known("plausibility", _chosen(answers, balanced, choices, "plausible")),
        distribution=known("distribution", _distribution(answers, balanced)),
        per_structural_type=_table(correct, {key: q["types"]["structural"] for key, q in balanced.items()}),
        per_semantic_type=_table(correct, {key: q["types"]["semantic"] for key, q in balanced.items()}),
        per_words=_table(correct, {key: len(q["question"].split()) for key, q in balanced.items()}),
        per_steps=_table(correct, {key: _steps(q) for key, q in balanced.items()}),
        reasons=reasons,
    )


def _balanced(questions: Mapping[str, Record]) -> dict[str, Record]:
    """The balanced questions, which have all that is read of them."""
    if not questions:
        raise InputError("There are no questions to score against; give the official records by question id.")
    balanced: dict[str, Record] = {}
    for key, question in questions.items():
        try:
            if question["isBalanced"]:
                balanced[key] = question
                for name in ("structural", "semantic", "detailed"):
                    question["types"][name]
                question["groups"]["global"], question["answer"], question["question"].split()
                _steps(question)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"The record of question {key!r} is not an official one ({type(error).__name__}: {error}); it needs "
                "isBalanced, question, answer, semantic, groups.global, and types.structural, .semantic and .detailed."
            ) from None
    if not balanced:
        raise InputError(f"None of the {len(questions)} questions is balanced (isBalanced); GQA scores only those.")
    return balanced


def _steps(question: Record) -> int:
    """Length of the question's program, without what only asks for the outcome."""
    steps = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(text in step for text in _NO_STEP) for step in steps)


def _percent(correct: Iterable[float]) -> float:
    return 100 * fmean(correct)


def _table(correct: Mapping[str, bool], keys: Mapping[str, Any]) -> dict[Any, tuple[float, int]]:
    """Percent and number of questions by key, the keys in order."""
    groups: dict[Any, list[bool]] = {}
    for question, key in keys.items():
        groups.setdefault(key, []).append(correct[question])
    return {key: (_percent(groups[key]), len(groups[key])) for key in sorted(groups)}


def _consistency(
    answers: Mapping[str, str], questions: Mapping[str, Record], correct: Mapping[str, bool]
) -> float | str:
    """Mean share of what a correct answer entails that is answered correctly, in percent, or why there is none."""
    found, missing = [], set()
    for key, is_correct in correct.items():
        if "entailed" not in questions[key]:
            return f"question {key!r} has no list `entailed`"
        entailed = [other for other in questions[key]["entailed"] if other != key] if is_correct else []
        lacking = [other for other in entailed if other not in answers or "answer" not in questions.get(other, ())]
        missing.update(lacking)
        if entailed and not lacking:
            found.append(fmean(answers[other] == questions[other]["answer"] for other in entailed))
    if missing:
        return (
            f"{len(missing)} entailed questions are without question or prediction ({few(sorted(missing, key=str))}); "
            "answer all of the split's all_questions file (split=testdev_all, val_all)"
        )
    return _percent(found) if found else "no correctly answered question entails another"


def _chosen(
    answers: Mapping[str, str],
    balanced: Mapping[str, Record],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None,
    kind: str,
) -> float | str:
    """Percent of answers among the question's `kind` of choices, or why it cannot be told."""
    if choices is None:
        return "no choices were given: the official val_choices.json or testdev_choices.json, in data.root"
    if missing := [key for key in balanced if kind not in choices.get(key, {})]:
        return f"choices has no {kind!r} for {len(missing)} of {len(balanced)} questions ({few(missing)})"
    return _percent(
        answers[key] in (_COMMON if "Common" in question["types"]["detailed"] else choices[key][kind])
        for key, question in balanced.items()
    )


def _distribution(answers: Mapping[str, str], balanced: Mapping[str, Record]) -> float | str:
    """Chi-square of predicted against gold answers in each global group, weighted by its questions, / 100."""
    gold: dict[str, Counter[str]] = {}
    predicted: dict[str, Counter[str]] = {}
    for key, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            gold.setdefault(group, Counter())[question["answer"]] += 1
            predicted.setdefault(group, Counter())[answers[key]] += 1
    if not gold:
        return "no question has a global group"
    # Only gold answers are looked at, so what is predicted besides them costs nothing more.
    weighted = [
        group.total() * math.fsum((predicted[name][answer] - count) ** 2 / count for answer, count in group.items())
        for name, group in gold.items()
    ]
    return math.fsum(weighted) / sum(group.total() for group in gold.values()) / 100
