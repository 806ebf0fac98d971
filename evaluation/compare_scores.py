"""Compare our score with a harness's score of the same questions, and find the reason for a difference.

    python -m vlmvqa.evaluation.compare_scores RUN HARNESS_OUTPUT

RUN is a folder with results of launch/eval.py or of a training run; HARNESS_OUTPUT is what a harness wrote about the
files of `launch/prepare.py harness` for the same split:

    lmms-eval     <date>_samples_<task>.jsonl, with --log_samples
    VLMEvalKit    <model>_<dataset>_results.xlsx (or .tsv)
"""

from __future__ import annotations

import ast
import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from vlmvqa.data.example import Example, Question
from vlmvqa.data.tasks import data_settings, metric_options, read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.report.compare import read_results
from vlmvqa.metrics.registry import Id, metric, score

SAME = 1e-4  # percent, for the score of a question
REASONS = {
    "normalize=always": "it normalises all answers; the official script leaves those on which all annotators agree",
    "normalize=never": "it compares raw answers; the official script normalises them",
    "consensus=min3": "it counts matches among all annotators; the official script leaves one out at a time",
    "inclusive=false": "it gives a similarity of exactly 0.5 no credit; the official script does",
    "postprocess=llava": "it ignores case and a final full stop; the official script compares text as it is",
    "postprocess=vqa": "it normalises answers as VQAv2's script does; GQA's script compares text as it is",
}


@dataclass(frozen=True)
class Theirs:
    """A harness's answers, and its score of each in percent, by question id."""

    answers: Mapping[Id, str]
    scores: Mapping[Id, float]


def read_harness(path: Path, questions: Sequence[Question], name: str) -> Theirs:
    """Read a harness's output about these questions, all or some, in their order.

    Args:
        name: our metric.

    Raises:
        InputError: the file cannot be read, or is about other questions.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; correct the path")
    rows = _lmms_eval_rows(path) if path.suffix == ".jsonl" else _vlmevalkit_rows(path, METHODS.get(name, fmean))
    answers, scores = {}, {}
    for number, text, answer, value in rows:
        if number >= len(questions) or questions[number].text not in text:
            raise InputError(
                f"{path}, question {number}: {text!r} is not the run's; score the files that launch/prepare.py harness "
                "wrote of the same split"
            )
        answers[questions[number].id], scores[questions[number].id] = answer, value
    if not answers:
        raise InputError(f"{path} holds no answers; correct the path")
    return Theirs(answers, scores)


Row = tuple[int, str, str, float]  # number of the question, its text, the answer, its score in percent


def _lmms_eval_rows(path: Path) -> Iterable[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        value = next((record[key] for key in ("exact_match", "anls") if key in record), None)
        if value is None or not isinstance(record.get("filtered_resps"), str):
            raise InputError(f"{path} holds no scored answers; give the samples of a task that generates them")
        yield record["doc_id"], record["input"], record["filtered_resps"], 100 * float(value)


def _vlmevalkit_rows(path: Path, method: Callable[[Sequence[float]], float]) -> Iterable[Row]:
    table = _table(path)
    if "eval_match" not in (table[0] if table else {}):
        raise InputError(f"{path} has no column eval_match; give the file whose name ends in _results")
    for row in table:
        value = 100 * float(method(ast.literal_eval(str(row["eval_match"]))))
        yield int(row["index"]), str(row["question"]), str(row["prediction"] or ""), value


def _table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))
    try:
        from openpyxl import load_workbook
    except ModuleNotFoundError:
        raise InputError("openpyxl is not installed, which reads .xlsx; run: pip install openpyxl") from None
    first, *rows = load_workbook(path, read_only=True).active.iter_rows(values_only=True)
    return [dict(zip(first, row, strict=True)) for row in rows]


def _anls(distances: Sequence[float]) -> float:
    return similarity if (similarity := 1 - min(distances)) >= 0.5 else 0.0


# How VLMEvalKit combines the matches of an answer with its references (`hit_calculate` in vlmeval); default: the mean.
METHODS: dict[str, Callable[[Sequence[float]], float]] = {"anls": _anls, "exact_match": max}


def compare(run: Path, output: Path) -> str:
    """Return a table of scores, and the reason for a difference.

    Raises:
        InputError: the run is not scored, or the output is about other questions.
    """
    metrics, records = read_results(run)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    data = data_settings(settings).single
    examples = read_examples(data, metrics["split"], metrics["max_samples"], BadRecords("skip"))
    examples = [example for example in examples if all(question.id in records for question in example.questions)]
    questions = [question for example in examples for question in example.questions]
    name, options = metrics["metric"], metric_options(data, metrics["split"])
    theirs = read_harness(output, questions, name)
    ours = {question: records[question]["answer"] for question in theirs.answers}
    return table(examples, name, options, ours, theirs)


def table(
    examples: Sequence[Example], name: str, options: Mapping[str, Any], ours: Mapping[Id, str], theirs: Theirs
) -> str:
    """Return the table of `compare`.

    Args:
        ours: our answers to the questions that the harness asked.
    """
    scored = {
        variant: score(examples, theirs.answers, name, **{**options, **changed})
        for variant, changed in {"": {}, **metric(name).variants}.items()
    }
    questions = list(scored[""].per_question)  # GQA scores the balanced ones
    differing = {
        variant: [one for one in questions if abs(found.per_question[one] - theirs.scores[one]) > SAME]
        for variant, found in scored.items()
    }
    equal = sum(ours[one].strip() == theirs.answers[one].strip() for one in theirs.answers)
    lines = [
        (f"{name}, our answers", score(examples, ours, name, **options).overall, ""),
        (f"{name}, their answers", scored[""].overall, f"{equal:,} of {len(ours):,} answers are equal"),
        ("their score", fmean(theirs.scores[one] for one in questions), ""),
    ]
    for variant, found in scored.items():
        same = f"equal to theirs for {len(questions) - len(differing[variant]):,} of {len(questions):,} questions"
        lines.append((f"{name} {variant}".strip(), found.overall, same))
    width = max(len(line[0]) for line in lines)
    text = "\n".join(f"{label:<{width}}{value:>9.2f}  {note}".rstrip() for label, value, note in lines)
    return f"{text}\n{_reason(differing, scored[''].per_question, theirs)}"


def _reason(differing: Mapping[str, Sequence[Id]], ours: Mapping[Id, float], theirs: Theirs) -> str:
    explained = next((variant for variant, questions in differing.items() if not questions), None)
    if explained == "":
        return "reason: none is needed; the harness scores every answer as our metric does"
    if explained is not None:
        return f"reason: the harness scores as our {explained}: {REASONS[explained]}"
    shown = [
        f"{one}: {theirs.answers[one]!r} {ours[one]:.1f}, theirs {theirs.scores[one]:.1f}" for one in differing[""][:5]
    ]
    return f"reason: none of our variants scores every answer as the harness does; for example {'; '.join(shown)}"


def main(arguments: Sequence[str]) -> None:
    """Print the comparison of a run with a harness's output."""
    if len(arguments) != 2:
        raise InputError("usage: python -m vlmvqa.evaluation.compare_scores RUN HARNESS_OUTPUT")
    print(compare(*(Path(argument).expanduser() for argument in arguments)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
