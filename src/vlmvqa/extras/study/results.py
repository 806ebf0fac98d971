"""Results of a study's runs: read from their folders, and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml

from vlmvqa.errors import InputError
from vlmvqa.extras.report.compare import read_results, why_incomparable
from vlmvqa.extras.stages.log import join, stage_logs
from vlmvqa.extras.study.settings import StudySettings
from vlmvqa.extras.study.statistics import compare_arms, holm, verdicts

CONTROLS = {"prior": "majority", "shuffled_images": "shuffled"}


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        records: content of predictions.jsonl by question.
        metrics: content of metrics.json.
        steps: optimizer steps trained.
        schedule: scheduler, warmup and learning rate; empty for runs without a config.
        parameters: `total` and `trained` numbers of weights; empty for runs that don't record them.
        log: records of log.jsonl.
        measured: speed, peak memory and operations of the training, which are not the same in every repetition.
    """

    folder: Path
    metrics: Mapping[str, Any]
    records: Mapping[Any, Mapping[str, Any]]
    steps: int
    schedule: str
    parameters: Mapping[str, int]
    measured: Mapping[str, float]
    log: Sequence[Mapping[str, Any]] = ()

    def scores(self, name: str) -> dict[Any, float]:
        """Return the score of each question.

        Raises:
            InputError: the metric has no score per question.
        """
        found = {question: record[name] for question, record in self.records.items() if record.get(name) is not None}
        if not found or len(found) < len(self.records):
            raise InputError(f"{self.folder}: {name} has no score for each question; choose another study.metric")
        return found


def read_run(folder: Path) -> RunResult:
    """Return the result of a finished run.

    Raises:
        InputError: the run is not scored.
    """
    metrics, records = read_results(folder)
    logs = stage_logs(folder)
    every, _ = join(logs)
    log = [record for record in every if "loss" in record]
    steps = max((record["step"] for record in every), default=0)
    starts = json.loads((folder / "run.json").read_text())["starts"] if (folder / "run.json").is_file() else []
    measured: dict[str, float] = {}
    if log:
        speeds = [record["questions_per_second"] for record in log]
        measured["questions_per_second"] = sorted(speeds)[len(speeds) // 2]
        if all("tera_flop" in record for record in log):
            measured["tera_flop"] = sum(map(_operations, logs.values()))
        if any(record["peak_memory_gib"] != record["peak_rss_gib"] for record in log):  # a GPU's, not the process's
            measured["peak_memory_gib"] = max(record["peak_memory_gib"] for record in log)
    parameters = starts[-1].get("parameters", {}) if starts else {}
    schedule = _schedule(folder / "config.yaml")
    return RunResult(folder, metrics, records, steps, schedule, parameters, measured, every)


def _operations(log: Sequence[Mapping[str, Any]]) -> float:
    """Return the operations of a training, in 10^12."""
    log = [record for record in log if "loss" in record]
    # Per step, because the first record after a resume lacks the steps before its checkpoint.
    before = (0, *(record["step"] for record in log))
    rates = [one["tera_flop"] / (one["step"] - last) for one, last in zip(log, before, strict=False)]
    return float(median(rates) * log[-1]["step"])


def _schedule(path: Path) -> str:
    """Describe the learning rate schedule of a run's config."""
    trainer = yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer") if path.is_file() else None
    if trainer is None:  # an evaluation
        return ""
    kind, warmup = trainer.get("lr_scheduler_type", "linear"), trainer.get("warmup_steps") or 0
    rate = trainer.get("learning_rate", 5e-5)  # transformers' default
    return f"{kind}, warmup {warmup:g}{' of the steps' if 0 < warmup < 1 else ''}, rate {rate:g}"


def summarize(
    study: StudySettings,
    results: Mapping[str, Mapping[str, RunResult]],
    failed: Mapping[str, str],
    home: Path,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the content of `study.json`.

    Args:
        results: arm -> seed -> result; runs of two arms with the same seed are a pair.
        failed: run -> error message.
        home: the study's folder.
        seed: of the intervals and the permutation test.

    Raises:
        InputError: two runs cannot be compared.
    """
    every = [result for runs in results.values() for result in runs.values()]
    for result in every[1:]:
        problem = why_incomparable(every[0].metrics, result.metrics, every[0].records, result.records)
        if problem:
            raise InputError(f"{every[0].folder} and {result.folder} cannot be compared: {problem}")
    name = study.metric or every[0].metrics["metric"]
    images = {question: record["image_id"] for question, record in every[0].records.items()}
    arms = {arm: _arm(name, study.arms.get(arm, ()), runs, home) for arm, runs in results.items()}
    baseline, differences, pairs = results[study.baseline], {}, {}
    for arm, runs in results.items():
        paired = [one for one in runs if one in baseline]
        if arm != study.baseline and paired:
            before, after = ([one[pair].scores(name) for pair in paired] for one in (baseline, runs))
            differences[arm], pairs[arm] = compare_arms(before, after, images, seed), len(paired)
    adjusted = holm({arm: one.p_permutation for arm, one in differences.items()})
    verdict = verdicts(differences)
    for arm, one in differences.items():
        arms[arm]["difference"] = {**asdict(one), "p_holm": adjusted[arm], "verdict": verdict[arm], "pairs": pairs[arm]}
    return {
        "title": study.title,
        "motivation": study.motivation,
        "baseline": study.baseline,
        "equal": study.equal,
        "metric": name,
        "questions": len(images),
        "images": len(set(images.values())),
        "published": [dict(one) for one in study.published],
        "arms": arms,
        "failed": dict(failed),
    }


def _arm(name: str, overrides: Sequence[str], runs: Mapping[str, RunResult], home: Path) -> dict[str, Any]:
    """Return an arm's part of `study.json`."""
    scores = {seed: fmean(result.scores(name).values()) for seed, result in runs.items()}
    first = next(iter(runs.values()))
    controls = {
        shown: fmean([result.metrics["controls"][key]["overall"] for result in runs.values()])
        for key, shown in CONTROLS.items()
        if all(result.metrics.get("controls", {}).get(key) for result in runs.values())
    }
    measured = [key for key in first.measured if all(key in result.measured for result in runs.values())]
    return {
        "overrides": list(overrides),
        "scores": scores,
        "mean": fmean(scores.values()),
        "deviation": stdev(scores.values()) if len(scores) > 1 else None,
        "steps": first.steps,
        "schedule": first.schedule,
        "parameters": dict(first.parameters),
        "controls": controls,
        "folders": {seed: os.path.relpath(result.folder, home) for seed, result in runs.items()},
        "measured": {key: fmean([result.measured[key] for result in runs.values()]) for key in measured},
    }
