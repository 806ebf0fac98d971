"""What HELM measured: read from its files, checked against our own metrics, with intervals over images."""

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
# What the table shows beside it, the benchmark's official accuracy first; HELM's names and their headings.
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
        values: by metric and question.
        answers: by question, as they were scored.
        cut: how many went on after their first line, which HELM is not shown.
        references: by question.
    """

    values: Mapping[str, Mapping[str, float]]
    answers: Mapping[str, str]
    references: Mapping[str, Sequence[str]]
    cut: int


def read(folder: Path) -> Scored:
    """What helm-run left in a run's folder."""
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
    """The folder of the run of a model over a scenario with these arguments.

    Raises:
        InputError: HELM left none.
    """
    for path in sorted(suite.glob("*/run_spec.json")):
        spec = json.loads(path.read_text(encoding="utf-8"))
        if spec["adapter_spec"]["model"] == model and spec["scenario_spec"]["args"] == dict(scenario):
            return path.parent
    raise InputError(f"{suite} has no finished run of {model} with {dict(scenario)}; look at helm's log")


def remove(suite: Path, model: str) -> None:
    """Delete a model's runs, so that no older one stays beside those to come."""
    for path in suite.glob("*/run_spec.json"):
        if json.loads(path.read_text(encoding="utf-8"))["adapter_spec"]["model"] == model:
            shutil.rmtree(path.parent)


def adapter(folder: Path) -> dict[str, Any]:
    """How HELM asked: its instructions (which the model's own prompt may leave out) and its limits."""
    spec = json.loads((folder / "run_spec.json").read_text(encoding="utf-8"))["adapter_spec"]
    return {key: spec[key] for key in ("instructions", "max_tokens", "temperature")}


def refuse_other(scored: Scored, examples: Sequence[Example], where: Path) -> None:
    """Stop unless exactly the questions that were asked for were scored, and BLEU-1 is what our own metric says.

    Raises:
        InputError: they differ.
    """
    asked = {str(question.id) for example in examples for question in example.questions}
    for name, values in scored.values.items():
        if values.keys() != asked:
            raise InputError(f"{where}: HELM's {name} is of {len(values)} questions, {len(asked)} were asked for")
    ours = helm_bleu_1(scored.answers, scored.references).per_question
    for question, value in scored.values[HEADLINE].items():
        if abs(value - ours[question]) > TOLERANCE:
            raise InputError(
                f"{where}, question {question}: HELM's BLEU-1 of {scored.answers[question]!r} is {value}, recomputed "
                f"it is {ours[question]}; another version of crfm-helm or nltk?"
            )


def summary(scored: Mapping[str, Scored], examples: Sequence[Example], seed: int) -> dict[str, Any]:
    """Means with their 95 % intervals over images: `{image mode: {metric: {mean, interval}}}`, and the differences.

    Args:
        scored: by image mode, `real` first.
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
    """The scores as text, a row for each kind of image."""
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
