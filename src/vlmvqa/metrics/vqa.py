"""VQA accuracy, equal to the official script's to the last digit.

Source: `vqaEval.py` of github.com/GT-Vision-Lab/VQA as of 2021 (BSD-2). The rules that papers and other evaluators use
instead are options and never the default: numbers are comparable only if they were computed by the same rules.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from vlmvqa.metrics.registry import (
    Answers,
    AnyId,
    Metric,
    Score,
    check_answers,
    check_ids,
    check_option,
    references_by_id,
)

if TYPE_CHECKING:
    from vlmvqa.data.example import Question

NORMALIZE = ("official", "always", "never")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
# The script mistypes its first lookaround as `(?!<=\d)`, so a period after a digit is removed too: "3." -> "3".
_PERIOD = re.compile(r"\.(?!\d)")
# The script passes `re.UNICODE` to `sub` as `count`: it removes 32 periods and keeps the 33rd.
_MOST_PERIODS = int(re.UNICODE)

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGIT = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# The script lists each word with one apostrophe missing; "im", "ive", "shes" and "lets" are not in its list.
_CONTRACTION = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the script swaps the two sides of this entry


@dataclass(frozen=True, slots=True)
class VqaAccuracy:
    """VQA accuracy in percent: means rounded to two digits as in the script, per-question values unrounded."""

    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    per_question: dict[int | str, float]


def vqa_accuracy(
    predictions: Mapping[AnyId, str],
    references: Mapping[AnyId, Sequence[str]],
    *,
    answer_types: Mapping[AnyId, str] | None = None,
    question_types: Mapping[AnyId, str] | None = None,
    normalize: str = "official",
    consensus: str = "leave_one_out",
) -> VqaAccuracy:
    """Compute the mean agreement of predicted answers with the annotators' answers.

    With fewer than four references the official rule cannot reach 100, and with one it is always 0.

    Args:
        references: raw annotator answers (ten in VQAv2, any number here) by question id.
        answer_types, question_types: category by question id, for the means by type.
        normalize: "official" normalises prediction and references unless all references are equal;
            "always" (lmms-eval, VLMEvalKit) normalises those too; "never" compares raw text.
        consensus: "leave_one_out" is official; "min3" is min(matches / 3, 1) over all references, the short form
            in many READMEs, which gives 1.3 (TextVQA) to 2.4 (VizWiz) points more.

    Raises:
        InputError: ids differ between the mappings, a question has no reference, or an option is unknown.
    """
    check_option("normalize", normalize, NORMALIZE)
    check_option("consensus", consensus, CONSENSUS)
    check_answers(predictions, references)
    check_ids("answer type", answer_types, references)
    check_ids("question type", question_types, references)
    agreement = CONSENSUS[consensus]
    accuracy = {
        question: agreement(*_matches(predictions[question], answers, normalize))
        for question, answers in references.items()
    }
    return VqaAccuracy(
        overall=_mean(accuracy.values()),
        per_answer_type=_mean_per_type(accuracy, answer_types),
        per_question_type=_mean_per_type(accuracy, question_types),
        per_question={question: 100 * value for question, value in accuracy.items()},
    )


def _matches(prediction: str, answers: Sequence[str], normalize: str) -> tuple[int, int]:
    """Return the number of answers equal to the prediction, and the number of answers."""
    prediction = _clean(prediction)
    counts = Counter(map(_clean, answers))
    # The official script leaves answers unprocessed when all ten agree, so "Yes" scores 0 against ten times "yes".
    if normalize == "always" or (normalize == "official" and len(counts) > 1):
        prediction = normalize_answer(prediction)
        return sum(count for answer, count in counts.items() if normalize_answer(answer) == prediction), len(answers)
    return counts[prediction], len(answers)


def _leave_one_out(matches: int, references: int) -> float:
    """Return the mean over the references of min(1, matches among the others / 3), in closed form."""
    thirds = matches * min(3, matches - 1) + (references - matches) * min(3, matches)
    return thirds / 3 / references


CONSENSUS: dict[str, Callable[[int, int], float]] = {
    "leave_one_out": _leave_one_out,
    "min3": lambda matches, references: min(1.0, matches / 3),
}


@lru_cache(maxsize=1 << 17)
def normalize_answer(text: str) -> str:
    """Normalise an answer as the official script does: punctuation, case, number words, articles, contractions."""
    words = (_DIGIT.get(word, word) for word in _strip_punctuation(_clean(text)).lower().split())
    return " ".join(_CONTRACTION.get(word, word) for word in words if word not in _ARTICLES)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    """Delete each punctuation mark or replace it by a space, depending on the original text alone."""
    digits_around_comma = _DIGITS_AROUND_COMMA.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        if mark in text:
            deleted = digits_around_comma or f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if deleted else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def _mean(values: Iterable[float]) -> float:
    """Return `round(100 * mean, 2)` as in the script; `fsum` makes it independent of the order of the questions."""
    values = list(values)
    return round(100 * math.fsum(values) / len(values), 2)


def _mean_per_type(accuracy: Mapping[AnyId, float], types: Mapping[AnyId, str] | None) -> dict[str, float]:
    if types is None:
        return {}
    groups: dict[str, list[float]] = {}
    for question, value in accuracy.items():
        groups.setdefault(types[question], []).append(value)
    return {name: _mean(values) for name, values in groups.items()}


def _score(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
    answer_types = {question.id: question.answer_type or "unknown" for question in questions}
    question_types = {question.id: question.question_type or "unknown" for question in questions}
    result = vqa_accuracy(
        answers, references_by_id(questions), answer_types=answer_types, question_types=question_types, **options
    )
    answer_counts, question_counts = Counter(answer_types.values()), Counter(question_types.values())
    tables = {
        "answer_type": {name: (mean, answer_counts[name]) for name, mean in result.per_answer_type.items()},
        "question_type": {name: (mean, question_counts[name]) for name, mean in result.per_question_type.items()},
    }
    return Score({"vqa_accuracy": result.overall}, dict(result.per_question), tables)


VQA_ACCURACY = Metric(
    title="VQA accuracy (%)",
    version="vqa_accuracy: official script of 2021",
    score=_score,
    check_options=partial(vqa_accuracy, {0: "a"}, {0: ["a"]}),
    options=("normalize", "consensus"),
    variants={
        "normalize=always": {"normalize": "always"},
        "normalize=never": {"normalize": "never"},
        "consensus=min3": {"consensus": "min3"},
    },
)
