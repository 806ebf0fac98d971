"""Comparison of two runs on the same questions: difference, confidence interval, and changed answers.

A paired comparison can separate runs whose own intervals overlap, because both runs find the same questions hard.
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
    (metrics, before), (other_metrics, after) = (_read_results(folder) for folder in (first, second))
    _check_comparable(f"{first} and {second} cannot be compared", metrics, other_metrics, before, after)
    name = metrics["metric"]
    scored = [question for question, record in before.items() if record[name] is not None]
    result: dict[str, Any] = {"first": str(first), "second": str(second), "metric": name, "n": len(scored)}
    result["overall"] = _compare(scored, before, after, name, seed)
    for kind in ("answer_type", "question_type"):
        groups: dict[str, list[Any]] = {}
        for question in scored:
            groups.setdefault(before[question][kind] or "unknown", []).append(question)
        result[f"per_{kind}"] = {
            group: _compare(questions, before, after, name, seed) for group, questions in sorted(groups.items())
        }
    result["flipped"] = _changed(scored, before, after, name)
    return result


def _check_comparable(
    problem: str,
    metrics: Mapping[str, Any],
    other_metrics: Mapping[str, Any],
    before: Mapping[Any, Record],
    after: Mapping[Any, Record],
) -> None:
    for key in ("metric", "metric_version", "data", "split"):
        if metrics.get(key) != other_metrics.get(key):
            raise InputError(
                f"{problem}: {key} is {metrics.get(key)} in one and {other_metrics.get(key)} in the other; score both "
                "in the same way"
            )
    if before.keys() != after.keys():
        different = sorted(before.keys() ^ after.keys(), key=repr)
        raise InputError(
            f"{problem}: they differ by {counted(len(different), 'question')} ({different[0]}...); score both on the "
            "same split and slice"
        )
    for question, record in before.items():
        if any(record[key] != after[question][key] for key in ("image_id", "question", "answers")):
            raise InputError(
                f"{problem}: question {question} has another image, text or reference answers in one; score both on "
                "the same files"
            )


def _changed(
    scored: Sequence[Any], before: Mapping[Any, Record], after: Mapping[Any, Record], name: str
) -> list[dict[str, Any]]:
    """Return the questions whose score changed, the largest improvement first."""
    changed = [question for question in scored if before[question][name] != after[question][name]]
    changed.sort(key=lambda question: (before[question][name] - after[question][name], repr(question)))
    return [
        {
            "question_id": question,
            "image_id": before[question]["image_id"],
            "question": before[question]["question"],
            "answers": before[question]["answers"],
            "first": before[question]["answer"],
            "second": after[question]["answer"],
            "difference": after[question][name] - before[question][name],
        }
        for question in changed
    ]


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
    half = MAX_SHOWN // 2
    for answer in changed if len(changed) <= MAX_SHOWN else [*changed[:half], *changed[-half:]]:
        lines.append(
            f"  {answer['difference']:+7.1f}  {answer['question']}  {answer['first']!r} -> {answer['second']!r}"
        )
    return "\n".join(lines)


def _read_results(folder: Path) -> tuple[dict[str, Any], dict[Any, Record]]:
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
    images = {question: before[question]["image_id"] for question in questions}
    result = bootstrap.compare(first, second, images, seed)
    means = [sum(scores.values()) / len(scores) for scores in (first, second)]
    row = {"n": len(questions), "first": means[0], "second": means[1], "difference": means[1] - means[0]}
    if result is None:
        return {**row, "interval": None, "p_bootstrap": None, "p_permutation": None}
    return {
        **row,
        "interval": [result.difference.low, result.difference.high],
        "p_bootstrap": result.p_bootstrap,
        "p_permutation": result.p_permutation,
    }
