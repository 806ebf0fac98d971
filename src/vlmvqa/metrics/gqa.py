"""GQA's scores, equal to the official script's: accuracy, consistency, validity, plausibility, distribution.

Source: `eval.py` of cs.stanford.edu/people/dorarad/gqa (Hudson and Manning, "GQA", CVPR 2019, section 4.4). If a score
is undefined (consistency without a correct answer), the script prints 0 or stops; here the score is None and `reasons`
holds the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vlmvqa.errors import InputError
from vlmvqa.metrics.registry import Answers, Metric, Score, check_ids, check_option, check_text, first_ids
from vlmvqa.metrics.vqa import normalize_answer

if TYPE_CHECKING:
    from vlmvqa.data.example import Question

Table = dict[str, tuple[float, int]]
Record = Mapping[str, Any]

POSTPROCESS: dict[str, Callable[[str], str]] = {
    "none": lambda answer: answer,
    "llava": lambda answer: answer.rstrip(".").lower(),  # LLaVA's convert_gqa_for_eval.py
    "vqa": normalize_answer,  # LAVIS normalises the prediction alone, so a gold answer with a hyphen never matches
}
# Operations of a question's program that the script does not count as reasoning steps.
_UNCOUNTED_STEPS = ("exist", "query: name", "choose name")
# Questions like "What do both have in common?" have these valid answers, whatever `choices` lists.
_COMMON = ("color", "material", "shape")


@dataclass(frozen=True, slots=True)
class GqaScores:
    """GQA's scores in percent, except `distribution`: chi-square / 100, lower is better.

    Attributes:
        accuracy: accuracy on the balanced questions.
        binary, open: accuracy on the questions answered by yes, no or a choice, and on the others.
        consistency: accuracy on the questions entailed by correctly answered ones.
        validity, plausibility: share of answers in the question's scope, and of answers that make sense.
        distribution: distance between the distributions of predicted and gold answers.
        per_structural_type, per_semantic_type: accuracy in percent and number of questions by type.
        per_words, per_steps: accuracy in percent and number of questions by length of the question and of its program.
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
    """Score answers by exact, case-sensitive equality with the gold answer, over the balanced questions.

    Gold answers as predictions score 100 everywhere and 0 in `distribution`; validity and plausibility only if
    `choices` lists every gold answer.

    Args:
        predictions: answer by question id, for every balanced question, and any others for `consistency`.
        questions: the official records by question id, from `*_balanced_questions.json` or `*_all_questions.json`.
        choices: `{"valid": [...], "plausible": [...]}` by question id, from `*_choices.json`, for those two scores.
        consistency: whether to compute it. It needs questions and predictions for all questions that the correctly
            answered ones entail, which only the `all` files have.
        postprocess: applied to predictions: "none" (official), "llava" (no final period, lower case), "vqa" (VQA's
            normalisation).

    Raises:
        InputError: a balanced question has no prediction, a prediction has no question, a record lacks a field, no
            question is balanced, or `postprocess` is unknown.
    """
    check_option("postprocess", postprocess or "none", POSTPROCESS)
    balanced = _balanced(questions)
    check_ids("prediction", predictions, balanced)
    if unknown := [key for key in predictions if key not in questions]:
        raise InputError(
            f"{len(unknown)} of {len(predictions)} predictions have no question ({first_ids(unknown)}); "
            "give the question file that was answered."
        )
    check_text(predictions)
    answers = {key: POSTPROCESS[postprocess or "none"](answer) for key, answer in predictions.items()}
    correct = {key: answers[key] == question["answer"] for key, question in balanced.items()}
    kinds = {key: "open" if q["types"]["structural"] == "query" else "binary" for key, q in balanced.items()}
    by_kind = _table(correct, kinds)
    scores: dict[str, float | str] = {  # or the reason why a score is undefined
        "binary": by_kind["binary"][0] if "binary" in by_kind else "there is no binary question",
        "open": by_kind["open"][0] if "open" in by_kind else "there is no open question",
        "consistency": _consistency(answers, questions, correct) if consistency else "not requested (consistency=True)",
        "validity": _share_in_choices(answers, balanced, choices, "valid"),
        "plausibility": _share_in_choices(answers, balanced, choices, "plausible"),
        "distribution": _distribution(answers, balanced),
    }
    known = {name: None if isinstance(score, str) else score for name, score in scores.items()}
    return GqaScores(
        accuracy=100 * fmean(correct.values()),
        **known,
        per_structural_type=_table(correct, {key: q["types"]["structural"] for key, q in balanced.items()}),
        per_semantic_type=_table(correct, {key: q["types"]["semantic"] for key, q in balanced.items()}),
        per_words=_table(correct, {key: len(q["question"].split()) for key, q in balanced.items()}),
        per_steps=_table(correct, {key: _steps(q) for key, q in balanced.items()}),
        reasons={name: score for name, score in scores.items() if isinstance(score, str)},
    )


def _balanced(questions: Mapping[str, Record]) -> dict[str, Record]:
    """Return the balanced questions; raise an InputError if there is none, or one lacks a field."""
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
    """Return the number of reasoning steps in the question's program."""
    steps = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(text in step for text in _UNCOUNTED_STEPS) for step in steps)


def _table(correct: Mapping[str, bool], keys: Mapping[str, Any]) -> dict[Any, tuple[float, int]]:
    """Return accuracy in percent and number of questions by key, sorted by key."""
    groups: dict[Any, list[bool]] = {}
    for question, key in keys.items():
        groups.setdefault(key, []).append(correct[question])
    return {key: (100 * fmean(groups[key]), len(groups[key])) for key in sorted(groups)}


def _consistency(
    answers: Mapping[str, str], questions: Mapping[str, Record], correct: Mapping[str, bool]
) -> float | str:
    """Return the mean accuracy on the questions that a correct answer entails, in percent; or why it is undefined."""
    shares, missing = [], set()
    for key, is_correct in correct.items():
        if "entailed" not in questions[key]:
            return f"question {key!r} has no list `entailed`"
        entailed = [other for other in questions[key]["entailed"] if other != key] if is_correct else []
        lacking = [other for other in entailed if other not in answers or "answer" not in questions.get(other, ())]
        missing.update(lacking)
        if entailed and not lacking:
            shares.append(fmean(answers[other] == questions[other]["answer"] for other in entailed))
    if missing:
        return (
            f"{len(missing)} entailed questions have no record or prediction ({first_ids(sorted(missing, key=str))}); "
            "answer the split's all_questions file (split=testdev_all, val_all)"
        )
    return 100 * fmean(shares) if shares else "no correctly answered question entails another"


def _share_in_choices(
    answers: Mapping[str, str],
    balanced: Mapping[str, Record],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None,
    kind: str,
) -> float | str:
    """Return the percentage of answers among the question's choices of this kind, or why it is undefined."""
    if choices is None:
        return "no choices were given: the official val_choices.json or testdev_choices.json, in data.root"
    if missing := [key for key in balanced if kind not in choices.get(key, {})]:
        return f"choices has no {kind!r} for {len(missing)} of {len(balanced)} questions ({first_ids(missing)})"
    return 100 * fmean(
        answers[key] in (_COMMON if "Common" in question["types"]["detailed"] else choices[key][kind])
        for key, question in balanced.items()
    )


def _distribution(answers: Mapping[str, str], balanced: Mapping[str, Record]) -> float | str:
    """Return chi-square / 100 of predicted against gold answers, the mean over global groups weighted by size."""
    gold: dict[str, Counter[str]] = {}
    predicted: dict[str, Counter[str]] = {}
    for key, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            gold.setdefault(group, Counter())[question["answer"]] += 1
            predicted.setdefault(group, Counter())[answers[key]] += 1
    if not gold:
        return "no question has a global group"
    # As in the script, predictions that are never a gold answer add nothing.
    weighted = [
        group.total() * math.fsum((predicted[name][answer] - count) ** 2 / count for answer, count in group.items())
        for name, group in gold.items()
    ]
    return math.fsum(weighted) / sum(group.total() for group in gold.values()) / 100


def _score(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
    _check_questions(questions)
    records = {str(question.id): dict(question.details or {}) for question in questions}
    texts = {str(name): text for name, text in answers.items()}
    result = gqa_scores(texts, records, consistency=True, **options)
    others = ("binary", "open", "consistency", "validity", "plausibility", "distribution")
    numbers = {"gqa_accuracy": result.accuracy, **{name: getattr(result, name) for name in others}}
    tables = {
        "question_type": result.per_structural_type,
        "answer_type": result.per_semantic_type,
        "words": {str(key): value for key, value in result.per_words.items()},
        "steps": {str(key): value for key, value in result.per_steps.items()},
    }
    balanced = [question for question in questions if records[str(question.id)]["isBalanced"]]
    clean = POSTPROCESS[options.get("postprocess") or "none"]
    correct = {question.id: 100.0 * (clean(answers[question.id]) == question.answers[0]) for question in balanced}
    return Score(numbers, correct, tables, dict(result.reasons))


def _check_questions(questions: Sequence[Question]) -> None:
    unknown = [question.id for question in questions if question.details is None]
    if unknown:
        raise InputError(
            f"gqa_accuracy: question {unknown[0]} lacks fields that the official evaluation reads, like all questions "
            "of a training split; evaluate on val or testdev"
        )
    if not any(question.details["isBalanced"] for question in questions if question.details):
        raise InputError(
            "gqa_accuracy: no question of the evaluated split is balanced, and only balanced ones are scored; evaluate "
            "more questions"
        )


GQA_ACCURACY = Metric(
    title="GQA accuracy (%)",
    version="gqa_accuracy: official script",
    score=_score,
    check_options=lambda postprocess=None: check_option("postprocess", postprocess or "none", POSTPROCESS),
    check_examples=lambda examples, **options: _check_questions([q for one in examples for q in one.questions]),
    options=("postprocess",),
    variants={"postprocess=llava": {"postprocess": "llava"}, "postprocess=vqa": {"postprocess": "vqa"}},
)
