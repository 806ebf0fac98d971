"""Two runs on the same questions: which is better, how sure that is, and which answers changed.

A paired comparison tells apart what two separate intervals cannot: both runs find the same questions hard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmvqa.errors import InputError, counted
from vlmvqa.inference import bootstrap
from vlmvqa.metrics.registry import metric

Record = Mapping[str, Any]
MOST_SHOWN = 10  # of the questions that flipped


def compare_runs(first: Path, second: Path, seed: int = 0) -> dict[str, Any]:
    """The second run against the first, as `compare.json` holds it: overall, by category, and the flipped questions.

    Raises:
        InputError: a folder holds no scored results, or the two were not scored by one metric on the same questions.
    """
    (one, before), (two, after) = (_read(folder) for folder in (first, second))
    name = one["metric"]
    for key in ("metric", "metric_version", "data", "split"):
        if one.get(key) != two.get(key):
            raise InputError(
                f"{first} and {second} cannot be compared: {key} is {one.get(key)} in one and {two.get(key)} in the "
                "other; score both alike"
            )
    if before.keys() != after.keys():
        apart = sorted(before.keys() ^ after.keys(), key=repr)
        raise InputError(
            f"{first} and {second} cannot be compared: they differ by {counted(len(apart), 'question')} "
            f"({apart[0]}...); score both on the same split and slice"
        )
    for question, record in before.items():
        if any(record[key] != after[question][key] for key in ("image_id", "question", "answers")):
            raise InputError(
                f"{first} and {second} cannot be compared: question {question} has another image, text or reference "
                "answers in one; score both on the same files"
            )
    scored = [question for question, record in before.items() if record[name] is not None]
    found: dict[str, Any] = {"first": str(first), "second": str(second), "metric": name, "n": len(scored)}
    found["overall"] = _compare(scored, before, after, name, seed)
    for kind in ("answer_type", "question_type"):
        groups: dict[str, list[Any]] = {}
        for question in scored:
            groups.setdefault(before[question][kind] or "unknown", []).append(question)
        found[f"per_{kind}"] = {
            group: _compare(questions, before, after, name, seed) for group, questions in sorted(groups.items())
        }
    flips = [question for question in scored if before[question][name] != after[question][name]]
    flips.sort(key=lambda question: (before[question][name] - after[question][name], repr(question)))
    found["flipped"] = [
        {
            "question_id": question,
            "image_id": before[question]["image_id"],
            "question": before[question]["question"],
            "answers": before[question]["answers"],
            "first": before[question]["answer"],
            "second": after[question]["answer"],
            "difference": after[question][name] - before[question][name],
        }
        for question in flips
    ]
    return found


def table(found: Mapping[str, Any]) -> str:
    """The comparison as text."""
    title = metric(found["metric"]).title
    lines = [f"{title:<28}{'n':>8}{'first':>9}{'second':>9}{'difference':>12}{'95 % interval':>20}{'p':>9}"]
    kinds = {f"  {kind}": row for kind, row in found["per_answer_type"].items()}
    for kind, row in {"overall": found["overall"], **(kinds if len(kinds) > 1 else {})}.items():
        line = f"{kind:<28}{row['n']:>8,}{row['first']:>9.2f}{row['second']:>9.2f}{row['difference']:>+12.2f}"
        if row["interval"]:
            low, high = row["interval"]
            line += f"{f'{low:+.2f} to {high:+.2f}':>20}{row['p_permutation']:>9.4f}"
        lines.append(line)
    flipped = found["flipped"]
    better = sum(flip["difference"] > 0 for flip in flipped)
    lines.append(
        f"{counted(len(flipped), 'answer')} scored otherwise: {better:,} better, {len(flipped) - better:,} worse"
    )
    half = MOST_SHOWN // 2
    for flip in flipped if len(flipped) <= MOST_SHOWN else [*flipped[:half], *flipped[-half:]]:
        lines.append(f"  {flip['difference']:+7.1f}  {flip['question']}  {flip['first']!r} -> {flip['second']!r}")
    return "\n".join(lines)


def _read(folder: Path) -> tuple[dict[str, Any], dict[Any, Record]]:
    """A run's metrics, and its records by question."""
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
            f"{folder} holds no whole result ({error!r:.80}); score it again with launch/eval.py"
        ) from None
    if scored["overall"] is None:
        raise InputError(f"{folder} is not scored: {scored.get('reason')}")
    return metrics, records


def _compare(
    questions: Sequence[Any], before: Mapping[Any, Record], after: Mapping[Any, Record], name: str, seed: int
) -> dict[str, Any]:
    one, two = ({question: of[question][name] for question in questions} for of in (before, after))
    about = {question: before[question]["image_id"] for question in questions}
    found = bootstrap.compare(one, two, about, seed)
    first, second = (sum(of.values()) / len(of) for of in (one, two))
    row: dict[str, Any] = {"n": len(questions), "first": first, "second": second, "difference": second - first}
    if found is None:
        return {**row, "interval": None, "p_bootstrap": None, "p_permutation": None}
    of = asdict(found)
    interval = [of["difference"]["low"], of["difference"]["high"]]
    return {**row, "interval": interval, "p_bootstrap": found.p_bootstrap, "p_permutation": found.p_permutation}
