"""What answers are scored with: each benchmark's official metric by its name, in one form for tables and reports.

A source's yaml names its metric (`data.metric`). Everything here is in percent, or times 100 where papers print it so
(ANLS, CIDEr, BLEU, ROUGE-L).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlmvqa import metrics
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError, suggest
from vlmvqa.metrics.captions import check_scorers
from vlmvqa.metrics.checks import check_option
from vlmvqa.metrics.gqa import POSTPROCESS

Id = int | str
Answers = Mapping[Id, str]


@dataclass(frozen=True)
class Score:
    """A metric's figures.

    Attributes:
        numbers: by name, that which the metric is known by first; None where it could not be had.
        per_question: what the first number is the mean of.
        tables: of the first number: for a category (`answer_type`), each kind's value and how many questions it has.
        reasons: why a number is None.
    """

    numbers: dict[str, float | None]
    per_question: dict[Id, float] = field(default_factory=dict)
    tables: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def overall(self) -> float | None:
        return next(iter(self.numbers.values()))


@dataclass(frozen=True)
class Metric:
    """How answers are scored, and how that is called.

    Attributes:
        title: over a column of it.
        version: which definition it is, for `metrics.json`.
        score: questions with their references, and an answer to each.
        check: refuses options of `data.metric_options` that `score` would stumble over, before anything runs.
        options: what may be given there.
        pictures: whether it looks at the image, which `score` is then given as `images`.
        right_from: the score from which an answer is shown as right; None: there is no such score, as of a caption.
        variants: what other toolkits change, by name: what they would print for the same answers.
    """

    title: str
    version: str
    score: Callable[..., Score]
    check: Callable[..., Any] = field(default=lambda: None)
    options: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    right_from: float | None = 50.0
    pictures: bool = False

    def right(self, score: float | None) -> bool | None:
        """Whether an answer of this score is shown as right; None: it has none, or no score says so."""
        return None if self.right_from is None or score is None else score >= self.right_from


def _vqa(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
    kinds = {
        kind: {q.id: getattr(q, kind) or "unknown" for q in questions} for kind in ("answer_type", "question_type")
    }
    found = metrics.vqa_accuracy(
        answers,
        {question.id: question.answers for question in questions},
        answer_types=kinds["answer_type"],
        question_types=kinds["question_type"],
        **options,
    )
    means = {"answer_type": found.per_answer_type, "question_type": found.per_question_type}
    counts = {kind: Counter(of.values()) for kind, of in kinds.items()}
    tables = {kind: {name: (mean, counts[kind][name]) for name, mean in of.items()} for kind, of in means.items()}
    return Score({"vqa_accuracy": found.overall}, dict(found.per_question), tables)


def _anls(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
    found = metrics.anls(answers, {question.id: question.answers for question in questions}, **options)
    per_question = _percent(found.per_question)
    return Score({"anls": 100 * found.score}, per_question, _tables(questions, per_question))


def _gqa(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
    _refuse_gqa(questions)
    records = {str(question.id): dict(question.details or {}) for question in questions}
    texts = {str(name): text for name, text in answers.items()}
    found = metrics.gqa_scores(texts, records, consistency=True, **options)
    named = ("binary", "open", "consistency", "validity", "plausibility", "distribution")
    numbers = {"gqa_accuracy": found.accuracy, **{name: getattr(found, name) for name in named}}
    tables: dict[str, Mapping[Any, tuple[float, int]]] = {
        "question_type": found.per_structural_type,
        "answer_type": found.per_semantic_type,
        "words": found.per_words,
        "steps": found.per_steps,
    }
    balanced = [question for question in questions if records[str(question.id)]["isBalanced"]]
    clean = POSTPROCESS[options.get("postprocess") or "none"]
    right = {question.id: 100.0 * (clean(answers[question.id]) == question.answers[0]) for question in balanced}
    listed = {table: {str(kind): value for kind, value in of.items()} for table, of in tables.items()}
    return Score(numbers, right, listed, dict(found.reasons))


def _refuse_gqa(questions: Sequence[Question]) -> None:
    unknown = [question.id for question in questions if question.details is None]
    if unknown:
        raise InputError(
            f"gqa_accuracy: question {unknown[0]} lacks what the official evaluation reads of it, as all of a training "
            "split do; evaluate on val or testdev"
        )
    if not any(question.details["isBalanced"] for question in questions if question.details):
        raise InputError(
            "gqa_accuracy: no question of the evaluated split is balanced, and only those count; take more"
        )


def _captions(questions: Sequence[Question], answers: Answers, **options: Any) -> Score:
    # CIDEr, which captions are known by, is always among them.
    asked = options.get("metrics", ("bleu", "rouge_l"))
    options["metrics"] = tuple(dict.fromkeys(["cider", *([asked] if isinstance(asked, str) else asked)]))
    found = metrics.caption_scores(answers, {question.id: question.answers for question in questions}, **options)
    names = ("cider", *(name for name in found.corpus if name != "cider"))
    per_image = {name: 100 * of["cider"] for name, of in found.per_image.items()}
    return Score({name: 100 * found.corpus[name] for name in names}, per_image)


def _exact(questions: Sequence[Question], answers: Answers) -> Score:
    found = metrics.exact_match(answers, {question.id: question.answers for question in questions})
    per_question = _percent(found.per_question)
    return Score({"exact_match": 100 * found.score}, per_question, _tables(questions, per_question))


def _relaxed(questions: Sequence[Question], answers: Answers) -> Score:
    found = metrics.relaxed_accuracy(answers, {question.id: question.answers for question in questions})
    per_question = _percent(found.per_question)
    return Score({"relaxed_accuracy": 100 * found.score}, per_question, _tables(questions, per_question))


def _helm_bleu_1(questions: Sequence[Question], answers: Answers) -> Score:
    found = metrics.helm_bleu_1(answers, {question.id: question.answers for question in questions})
    per_question = _percent(found.per_question)
    return Score({"helm_bleu_1": 100 * found.score}, per_question, _tables(questions, per_question))


def _corpus_bleu(questions: Sequence[Question], answers: Answers) -> Score:
    found = metrics.corpus_bleu(answers, {question.id: question.answers for question in questions})
    return Score({"corpus_bleu": found.score})


def _clip(questions: Sequence[Question], answers: Answers, images: Mapping[Id, Any], **options: Any) -> Score:
    found = metrics.clip_similarity(answers, images, **options)
    return Score({"clip_similarity": 100 * found.score}, _percent(found.per_question))


METRICS = {
    "vqa_accuracy": Metric(
        "VQA accuracy (%)",
        "vqa_accuracy: official script of 2021",
        _vqa,
        lambda **options: metrics.vqa_accuracy({0: "a"}, {0: ["a"]}, **options),
        ("normalize", "consensus"),
        {
            "normalize=always": {"normalize": "always"},
            "normalize=never": {"normalize": "never"},
            "consensus=min3": {"consensus": "min3"},
        },
    ),
    "anls": Metric(
        "ANLS (x 100)",
        "anls: the challenge's script, threshold 0.5",
        _anls,
        lambda **options: metrics.anls({0: "a"}, {0: ["a"]}, **options),
        ("threshold", "inclusive"),
        {"inclusive=false": {"inclusive": False}},
    ),
    "gqa_accuracy": Metric(
        "GQA accuracy (%)",
        "gqa_accuracy: official script",
        _gqa,
        lambda postprocess=None: check_option("postprocess", postprocess or "none", POSTPROCESS),
        ("postprocess",),
        {"postprocess=llava": {"postprocess": "llava"}, "postprocess=vqa": {"postprocess": "vqa"}},
    ),
    "cider": Metric(
        "CIDEr (x 100)",
        "cider: CIDEr-D as pycocoevalcap 1.2, the project's own PTB tokens",
        _captions,
        check_scorers,
        ("metrics", "tokenizer"),
        right_from=None,
    ),
    "exact_match": Metric("exact match (%)", "exact_match", _exact),
    "helm_bleu_1": Metric("HELM's BLEU-1 (%)", "helm_bleu_1: the best of the references, nltk's words", _helm_bleu_1),
    "corpus_bleu": Metric("corpus BLEU", "corpus_bleu: sacrebleu's defaults", _corpus_bleu),
    "clip_similarity": Metric(
        "CLIP similarity (x 100)",
        "clip_similarity: CLIPScore, of ViT-B/32 where no model is named",
        _clip,
        lambda model="", prefix="": None,
        ("model", "prefix"),
        right_from=None,
        pictures=True,
    ),
    "relaxed_accuracy": Metric("relaxed accuracy (%)", "relaxed_accuracy: ChartQA's, 5 % of the number", _relaxed),
}


def metric(name: str) -> Metric:
    """A metric by the name that `data.metric` gives.

    Raises:
        InputError: there is none of that name.
    """
    if name not in METRICS:
        raise InputError(f"data.metric={name} is unknown{suggest(name, METRICS)}; use one of {', '.join(METRICS)}")
    return METRICS[name]


def check_options(name: str, options: Mapping[str, Any], where: str = "data.metric_options") -> None:
    """Refuse what `data.metric_options` asks of a metric and cannot be had.

    Raises:
        InputError: the metric has no such option or no such value of it, or needs Java for it and there is none.
    """
    known = metric(name).options
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise InputError(f"{where} has no key '{option}' for {name}{suggest(option, known)} (known: {listed})")
    try:
        metric(name).check(**options)
    except TypeError as error:
        raise InputError(f"{where}={dict(options)} is not what {name} takes ({error})") from None


def version(name: str, options: Mapping[str, Any]) -> str:
    """Which definition the numbers have, with the options that change it."""
    changing = set(metric(name).options) - {"metrics"}
    asked = ", ".join(f"{option}={value}" for option, value in options.items() if option in changing)
    return f"{metric(name).version}{f', but for {asked}' if asked else ''}"


def refuse_unscorable(name: str, examples: Iterable[Example], **options: Any) -> None:
    """Stop before a week of training if its end could not be scored."""
    if metric(name).score is _clip:
        metrics.clip_similarity({0: "a"}, {0: Image.new("RGB", (8, 8))}, **options)
    if metric(name).score is _gqa:
        _refuse_gqa([question for example in examples for question in example.questions])


def score(examples: Iterable[Example], answers: Answers, name: str = "vqa_accuracy", **options: Any) -> Score:
    """Answers by question id, over the questions that have one."""
    examples = list(examples)
    questions = [question for example in examples for question in example.questions if question.id in answers]
    if metric(name).pictures:
        pictures = {question.id: example.image for example in examples for question in example.questions}
        options["images"] = {question.id: pictures[question.id] for question in questions}
    return metric(name).score(questions, {question.id: answers[question.id] for question in questions}, **options)


def variants(examples: Sequence[Example], answers: Answers, name: str, **given: Any) -> dict[str, float | None]:
    """What other toolkits would print for the same answers, by what they do differently."""
    return {
        variant: score(examples, answers, name, **{**given, **options}).overall
        for variant, options in metric(name).variants.items()
    }


def _percent(per_question: Mapping[Any, float]) -> dict[Id, float]:
    return {question: 100 * value for question, value in per_question.items()}


def _tables(questions: Sequence[Question], per_question: Mapping[Id, float]) -> dict[str, dict[str, tuple[float, int]]]:
    """Means by the questions' own categories, where they have any."""
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
