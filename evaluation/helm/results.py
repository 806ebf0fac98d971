"""HELM's results: read from its files, checked against our metrics, with intervals over images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmvqa.data.example import Example
from vlmvqa.errors import InputError, counted
from vlmvqa.inference import bootstrap
from vlmvqa.metrics import helm_bleu_1

HEADLINE = "bleu_1"
# Columns of the table, by HELM's names: the headline, then the official accuracy, then the others.
COLUMNS = {
    HEADLINE: "BLEU-1",
    "vqa_accuracy": "VQA accuracy",
    "gqa_accuracy": "GQA accuracy",
    "exact_match": "exact match",
    "f1_score": "F1",
}
OTHERS = ("quasi_exact_match", "quasi_prefix_exact_match", "rouge_l")
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Scored:
    """HELM's numbers of one run, 0 to 1.

    Attributes:
        values: scores by metric and question.
        answers: scored answers by question.
        references: reference answers by question.
        cut: number of answers that continued after their first line, which HELM is not shown.
    """

    values: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, str]
    references: Mapping[str, Sequence[str]]
    cut: int


def read(folder: Path) -> Scored:
    """Read the results of helm-run from a run's folder."""
    values: dict[str, dict[str, float]] = {}
    for record in json.loads((folder / "per_instance_stats.json").read_text(encoding="utf-8")):
        for stat in record["stats"]:
            values.setdefault(stat["name"]["name"], {})[record["instance_id"]] = stat.get("mean")
    states = json.loads((folder / "scenario_state.json").read_text(encoding="utf-8"))["request_states"]
    texts = {state["instance"]["id"]: state["result"]["completions"][0]["text"].strip() for state in states}
    references = {
        state["instance"]["id"]: [one["output"]["text"] for one in state["instance"]["references"]] for state in states
    }
    cut = sum(state["result"]["completions"][0]["finish_reason"]["reason"] == "stop" for state in states)
    return Scored({name: values[name] for name in (*COLUMNS, *OTHERS) if name in values}, texts, references, cut)


def find(suite: Path, model: str, scenario: Mapping[str, Any]) -> Path:
    """Return the folder of a model's run on a scenario with these arguments.

    Raises:
        InputError: there is no such run.
    """
    for path in sorted(suite.glob("*/run_spec.json")):
        spec = json.loads(path.read_text(encoding="utf-8"))
        if spec["adapter_spec"]["model"] == model and spec["scenario_spec"]["args"] == dict(scenario):
            return path.parent
    raise InputError(f"{suite} has no finished run of {model} with {dict(scenario)}; see helm.log")


def remove(suite: Path, model: str) -> None:
    """Delete a model's earlier runs, so that they are not mixed with the new ones."""
    for path in suite.glob("*/run_spec.json"):
        if json.loads(path.read_text(encoding="utf-8"))["adapter_spec"]["model"] == model:
            shutil.rmtree(path.parent)


def adapter(folder: Path) -> dict[str, Any]:
    """Return HELM's instructions (which the model's own prompt may omit) and its limits."""
    spec = json.loads((folder / "run_spec.json").read_text(encoding="utf-8"))["adapter_spec"]
    return {key: spec[key] for key in ("instructions", "max_tokens", "temperature")}


def check_scores(scored: Scored, examples: Sequence[Example], where: Path) -> None:
    """Check that exactly the planned questions were scored, and that BLEU-1 equals our own metric.

    Raises:
        InputError: questions or scores differ.
    """
    asked = {str(question.id) for example in examples for question in example.questions}
    for name, values in scored.values.items():
        if values.keys() != asked:
            raise InputError(
                f"{where}: HELM's {name} covers {len(values)} questions instead of {len(asked)}; delete the folder"
            )
    ours = helm_bleu_1(scored.answers, scored.references).per_question
    for question, value in scored.values[HEADLINE].items():
        if abs(value - ours[question]) > TOLERANCE:
            raise InputError(
                f"{where}, question {question}: HELM's BLEU-1 of {scored.answers[question]!r} is {value}, recomputed "
                f"it is {ours[question]}; another version of crfm-helm or nltk?"
            )


def summary(scored: Mapping[str, Scored], examples: Sequence[Example], seed: int) -> dict[str, Any]:
    """Return means with 95 % intervals over images: `{image mode: {metric: {mean, interval}}}`, and differences.

    Args:
        scored: results by image mode, `real` first.
    """
    about = {str(question.id): example.image_id for example in examples for question in example.questions}
    modes = {
        mode: {name: _mean(values, about, seed) for name, values in one.values.items()} for mode, one in scored.items()
    }
    controls = [mode for mode in scored if mode != "real"]
    real = scored["real"].values[HEADLINE]
    return {
        "n": len(about),
        "images": len(set(about.values())),
        "headline": HEADLINE,
        "cut_at_their_first_line": {mode: one.cut for mode, one in scored.items()},
        "scores": modes,
        "real_minus": {mode: _difference(scored[mode].values[HEADLINE], real, about, seed) for mode in controls},
    }


def _mean(values: Mapping[str, float], about: Mapping[str, Any], seed: int) -> dict[str, Any]:
    found = bootstrap.bootstrap(values, about, seed)
    mean = sum(values.values()) / len(values)
    return {"mean": mean, "interval": [found.low, found.high] if found else None}


def _difference(
    control: Mapping[str, float], real: Mapping[str, float], about: Mapping[str, Any], seed: int
) -> dict[str, Any] | None:
    found = bootstrap.compare(control, real, about, seed)
    if found is None:
        return None
    one = found.difference
    return {"mean": one.mean, "interval": [one.low, one.high], "p_permutation": found.p_permutation}


def table(found: Mapping[str, Any]) -> str:
    """Format the scores as a table with a row per image mode."""
    columns = {name: title for name, title in COLUMNS.items() if name in found["scores"]["real"]}
    lines = [f"{'':<18}" + "".join(f"{title:>24}" for title in columns.values())]
    for mode, scores in found["scores"].items():
        lines.append(f"{mode + ' images':<18}" + "".join(f"{_shown(scores[name]):>24}" for name in columns))
    for mode, difference in found["real_minus"].items():
        if difference:
            lines.append(f"{'real - ' + mode:<18}{_shown(difference):>24}")
    lines.append(
        f"{counted(found['n'], 'question')} about {counted(found['images'], 'image')}; in brackets 95 % over images"
    )
    cut = found["cut_at_their_first_line"]["real"]
    return "\n".join([*lines, *([f"answers truncated after their first line: {cut}"] if cut else [])])


def _shown(one: Mapping[str, Any]) -> str:
    """Format a mean with its interval: 0.5831 (0.551 to 0.614)."""
    interval = one["interval"]
    return f"{one['mean']:.4f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
