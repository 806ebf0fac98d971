"""Comparison of two runs on the same questions: difference, confidence interval, and changed answers.

A paired comparison can detect a difference between runs whose intervals overlap: the same questions are hard for both,
so their scores vary together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmvqa.errors import InputError, counted
from vlmvqa.inference import bootstrap
from vlmvqa.metrics.registry import metric

Record = Mapping[str, Any]
MAX_SHOWN = 10  # changed answers in the printed table


def compare_runs(first: Path, second: Path, seed: int = 0) -> dict[str, Any]:
    """Compare the second run with the first: overall, by category, and the questions whose score changed.

    Returns:
        The content of `compare.json`.

    Raises:
        InputError: a folder has no scored results, or the runs have different metrics or questions.
    """
    (metrics, before), (other_metrics, after) = (read_results(folder) for folder in (first, second))
    problem = why_incomparable(metrics, other_metrics, before, after)
    if problem:
        raise InputError(f"{first} and {second} cannot be compared: {problem}")
    name = metrics["metric"]
    scored = [question for question, record in before.items() if record[name] is not None]
    result: dict[str, Any] = {"first": str(first), "second": str(second), "metric": name, "n": len(scored)}
    result["dtypes"] = [one.get("dtype") for one in (metrics, other_metrics)]  # None: answers of another program
    result["overall"] = _compare(scored, before, after, name, seed)
    for kind in ("answer_type", "question_type"):
        groups: dict[str, list[Any]] = {}
        for question in scored:
            groups.setdefault(before[question][kind] or "unknown", []).append(question)
        result[f"per_{kind}"] = {
            group: _compare(questions, before, after, name, seed) for group, questions in sorted(groups.items())
        }
    changes = {question: after[question][name] - before[question][name] for question in scored}
    result["flipped"] = [  # the largest improvement first
        {
            "question_id": question,
            **{key: before[question][key] for key in ("image_id", "question", "answers")},
            "first": before[question]["answer"],
            "second": after[question]["answer"],
            "difference": change,
        }
        for question, change in sorted(changes.items(), key=lambda item: (-item[1], repr(item[0])))
        if change
    ]
    return result


def why_incomparable(
    metrics: Record, other_metrics: Record, before: Mapping[Any, Record], after: Mapping[Any, Record]
) -> str | None:
    """Return why the runs cannot be compared and what to do; None if they can be."""
    for key in ("metric", "metric_version", "data", "split"):
        if metrics.get(key) != other_metrics.get(key):
            values = f"{metrics.get(key)} in one and {other_metrics.get(key)} in the other"
            return f"{key} is {values}; score both in the same way"
    if before.keys() != after.keys():
        different = sorted(before.keys() ^ after.keys(), key=repr)
        number = counted(len(different), "question")
        return f"they differ by {number} ({different[0]}...); score both on the same split and slice"
    for question, record in before.items():
        if any(record[key] != after[question][key] for key in ("image_id", "question", "answers")):
            what = "different images, texts or reference answers in the two runs"
            return f"question {question} has {what}; score both on the same files"
    return None


def table(comparison: Mapping[str, Any]) -> str:
    """Format the result of `compare_runs` as text."""
    title = metric(comparison["metric"]).title
    lines = [f"{title:<28}{'n':>8}{'first':>9}{'second':>9}{'difference':>12}{'95 % interval':>20}{'p':>9}"]
    kinds = {f"  {kind}": row for kind, row in comparison["per_answer_type"].items()}
    for kind, row in {"overall": comparison["overall"], **(kinds if len(kinds) > 1 else {})}.items():
        line = f"{kind:<28}{row['n']:>8,}{row['first']:>9.2f}{row['second']:>9.2f}{row['difference']:>+12.2f}"
        if row["interval"]:
            low, high = row["interval"]
            line += f"{f'{low:+.2f} to {high:+.2f}':>20}{row['p_permutation']:>9.4f}"
        lines.append(line)
    changed = comparison["flipped"]
    better = sum(answer["difference"] > 0 for answer in changed)
    lines.append(
        f"{counted(len(changed), 'answer')} with another score: {better:,} better, {len(changed) - better:,} worse"
    )
    first, second = comparison["dtypes"]
    if first != second:
        lines.append(f"the first run answered in {first}, the second in {second}: some answers may differ by rounding")
    half = MAX_SHOWN // 2
    for answer in changed if len(changed) <= MAX_SHOWN else [*changed[:half], *changed[-half:]]:
        lines.append(
            f"  {answer['difference']:+7.1f}  {answer['question']}  {answer['first']!r} -> {answer['second']!r}"
        )
    return "\n".join(lines)


def read_results(folder: Path) -> tuple[dict[str, Any], dict[Any, Record]]:
    """Return a run's metrics, and its records by question id."""
    paths = folder / "metrics.json", folder / "predictions.jsonl"
    for path in paths:
        if not path.is_file():
            below = sorted(str(found.parent) for found in folder.glob("*/metrics.json"))
            remedy = f"did you mean {' or '.join(below)}?" if below else "score the run first with launch/eval.py"
            raise InputError(f"{folder} has no {path.name}; {remedy}")
    try:
        metrics = json.loads(paths[0].read_text(encoding="utf-8"))
        scored = metrics["metrics"][metrics["metric"]]
        lines = paths[1].read_text(encoding="utf-8").split("\n")
        records = {record["question_id"]: record for record in map(json.loads, filter(None, lines))}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the results in {folder} are incomplete ({error!r:.80}); score it again with launch/eval.py"
        ) from None
    if scored["overall"] is None:
        raise InputError(f"{folder} is not scored: {scored.get('reason')}")
    return metrics, records


def _compare(
    questions: Sequence[Any], before: Mapping[Any, Record], after: Mapping[Any, Record], name: str, seed: int
) -> dict[str, Any]:
    first, second = ({question: records[question][name] for question in questions} for records in (before, after))
    result = bootstrap.compare(first, second, {question: before[question]["image_id"] for question in questions}, seed)
    means = [sum(scores.values()) / len(scores) for scores in (first, second)]
    return {
        "n": len(questions),
        "first": means[0],
        "second": means[1],
        "difference": means[1] - means[0],
        "interval": result and [result.difference.low, result.difference.high],
        "p_bootstrap": result and result.p_bootstrap,
        "p_permutation": result and result.p_permutation,
    }
