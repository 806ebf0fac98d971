"""Merge models from a config, record the merge, and compare the models on their tasks."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from vlmvqa import __version__
from vlmvqa.config.compose import build_settings, refuse_overrides
from vlmvqa.config.schema import DataSettings, RunSettings
from vlmvqa.data.example import Example, all_answered, count_questions
from vlmvqa.data.tasks import data_settings, metric_options, read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.merging.logit_diff import answer_logits, logit_diff, one_question_each
from vlmvqa.extras.merging.merge import Merge
from vlmvqa.extras.merging.settings import MergeSettings
from vlmvqa.extras.merging.validation import adapter_settings
from vlmvqa.inference.predictor import load
from vlmvqa.metrics.registry import check_scorable, metric, score
from vlmvqa.models import loading
from vlmvqa.models.checkpoint import OURS
from vlmvqa.paths import replace_file

COMPARED = 16  # questions that an adapter over its base and the merged model are compared on


@dataclass(frozen=True)
class MergeConfig:
    """Config of launch/merge.py; conf/merge.yaml documents its keys."""

    run: RunSettings
    output: str
    method: str = "ties"
    density: float = 0.3
    scale: float = 1.0
    weights: Sequence[float] = ()
    layers: Mapping[str, Sequence[float]] | str = field(default_factory=dict)
    trim: str = "tensor"
    seed: int = 0
    base: str | None = None
    models: Sequence[str] = ()
    adapter: str | None = None
    into: str = "full"
    data: DataSettings | None = None
    samples: int | None = None
    batch_size: int = 64
    given: frozenset[str] = frozenset()

    @property
    def settings(self) -> MergeSettings:
        """The settings of the merge, without those of the comparison.

        Patterns in `layers` are seldom valid in Hydra's grammar, which then passes all of them as one string.
        """
        values = {key.name: getattr(self, key.name) for key in fields(MergeSettings)}
        if isinstance(self.layers, str):
            values["layers"] = yaml.safe_load(self.layers)
        return build_settings(MergeSettings, values, "merge")


@dataclass(frozen=True)
class MergeTask:
    """A task that the models are compared on."""

    name: str
    data: DataSettings
    examples: list[Example]
    metric_options: dict[str, Any]


def merge_models(config: MergeConfig) -> None:
    """Merge the models, write the result with `merge.json`, and compare them."""
    merge = _merge(config)
    folder = Path(config.output).expanduser()
    if folder.resolve() in {model.folder.resolve() for model in (*merge.models, merge.base)}:
        raise InputError(f"output={folder} is one of the models that are merged; choose another")
    if folder.exists() and any(folder.iterdir()) and not config.run.overwrite:
        raise InputError(f"output={folder} already exists; choose another, or set run.overwrite=true")
    asked, why = _tasks(config, merge)
    for one in merge.over_four_bits:
        print(f"{one} was trained over 4-bit weights: {INTO[merge.into]}")
    merge.run(folder)
    record = {
        "base": str(merge.base.folder) if merge.knows_base else None,
        "models": [str(model.folder) for model in merge.models],
        **merge.settings.record(),
        "into": merge.into,
        "over_four_bits": [str(one) for one in merge.over_four_bits],
        "parts": {name: statistics.record() for name, statistics in merge.statistics.items()},
        "vlmvqa": __version__,
    }
    replace_file(folder / "merge.json", json.dumps(record, indent=2) + "\n")
    if record["parts"]:
        print(table(record["parts"], [config.adapter] if config.adapter else list(config.models)))
    if config.adapter and asked:
        record["drift"] = _drift(Path(merge.models[0].folder), folder, asked, config.samples or COMPARED)
    elif asked:
        record["scores"] = _scores(config, merge, folder, asked)
    elif why:
        print(f"nothing was compared: {why}")
    replace_file(folder / "merge.json", json.dumps(record, indent=2) + "\n")
    print(f"model: {folder}")


INTO = {
    "full": "the merged model uses the full-precision weights; the logits drift",
    "dequantized": "the merged model uses these weights, dequantized; the logits are equal up to rounding",
}


def _merge(config: MergeConfig) -> Merge:
    """Return the merge of the config's models, checked to fit together."""
    base = None if config.base is None else loading.find(config.base)
    if config.adapter is None:
        return Merge(base, [loading.find(folder) for folder in config.models], config.settings, config.into)
    keys = [one.name for one in fields(MergeSettings)]
    refuse_overrides(config.given, "for several models, and adapter= is one; give models=[...] for it", "models", *keys)
    adapter = loading.find(config.adapter)
    if adapter_settings(adapter) is None:
        raise InputError(
            f"adapter={config.adapter} is a complete model, not an adapter; name the run of an adapter, or "
            "give models=[...] to merge complete models"
        )
    return Merge(base, [adapter], MergeSettings("task_arithmetic"), config.into)


def table(counted: dict[str, Any], models: list[str]) -> str:
    """Return a table with a row per part and model: the norm of its change, and the share of it that was kept."""
    lines = [f"{'part':<12}{'model':<32}{'moved by, of the norm':>24}{'kept':>9}{'sign conflicts':>16}"]
    for part, one in counted.items():
        first = f"{part:<12}", f"{one['sign_conflicts']:>16.1%}"
        for model, norm, share in zip(models, one["norms_of_deltas"], one["kept"], strict=True):
            moved = norm / one["norm_of_base"] if one["norm_of_base"] else float("inf")
            kept = "-" if share is None else f"{share:.1%}"
            lines.append(f"{first[0]}{model[-31:]:<32}{moved:>24.3%}{kept:>9}{first[1]}")
            first = " " * 12, " " * 16
    return "\n".join(lines)


# ---- comparison


def _tasks(config: MergeConfig, merge: Merge) -> tuple[list[MergeTask], str | None]:
    """Read the tasks before merging; without any, return the reason, if there is one to print."""
    if config.samples == 0 or not (config.data or config.samples or config.adapter):
        return [], None
    if config.data is not None:
        named = {name or task.source: task for name, task in config.data.tasks.items()}
    else:
        named = {}
        for folder in (model.folder for model in merge.models):
            path = folder.parent / "config.yaml"
            if folder.name != "model" or not path.is_file():
                reason = f"{folder} is not in the folder of its run, whose config.yaml has its evaluation data"
                return [], f"{reason}; give data="
            for name, task in data_settings(yaml.safe_load(path.read_text(encoding="utf-8"))["data"]).tasks.items():
                name = name or task.source
                if named.setdefault(name, task) != task:
                    named[f"{name} ({folder.parent.name})"] = task
    prompts = merge.config.get(OURS, merge.config).get("prompts", {})
    asked = []
    for name, task in named.items():
        task = replace(task, prompt=prompts.get(task.source, task.prompt))
        limits = (config.samples or (COMPARED if config.adapter else None), task.max_eval_samples)
        most = min((limit for limit in limits if limit is not None), default=None)
        examples = read_examples(task, task.eval_split, most, BadRecords("skip"))
        if not config.adapter:
            if not all_answered(examples):
                raise InputError(f"{name}: {task.eval_split} has no answers to score with; choose another eval_split")
            check_scorable(task.metric, examples)
        asked.append(MergeTask(name, task, examples, metric_options(task, task.eval_split)))
    return asked, None


def _drift(adapter: Path, merged: Path, asked: Sequence[MergeTask], most: int) -> dict[str, Any]:
    """Compare the logits of the adapter on its base with those of the merged model."""
    examples = [one for task in asked for one in one_question_each(task.examples, most)]
    logits, kinds = [], []
    for folder in (adapter, merged):
        predictor = load(folder, dtype="saved")
        bits = predictor.adapter and predictor.adapter.settings.bits
        kinds.append(predictor.settings.dtype + (f", {bits} bits" if bits else ""))
        logits.append(answer_logits(predictor, examples))
        del predictor
        gc.collect()
    found = logit_diff(*logits)
    print(f"largest logit difference, adapter over its base ({kinds[0]}) to merged ({kinds[1]}): {found}")
    return {**asdict(found), "adapter": kinds[0], "merged": kinds[1]}


def _scores(config: MergeConfig, merge: Merge, merged: Path, asked: Sequence[MergeTask]) -> dict[str, Any]:
    """Score the base, each model and the merged one on every task."""
    named = {config.base or str(merge.base.folder): merge.base.folder} if merge.knows_base else {}
    named |= {str(name): model.folder for name, model in zip(config.models, merge.models, strict=True)}
    named[str(merged)] = merged
    found: dict[str, Any] = {
        task.name: {
            "metric": task.data.metric,
            "split": task.data.eval_split,
            "questions": count_questions(task.examples),
            "prompt": task.data.prompt,
            "dtype": {},
            "scores": {},
        }
        for task in asked
    }
    for name, folder in named.items():
        predictor = load(folder)
        for task in asked:
            answers = predictor.answer_examples(task.examples, batch_size=config.batch_size, progress=True)
            texts = {question: answer.text for question, answer in answers.items()}
            result = score(task.examples, texts, task.data.metric, **task.metric_options)
            found[task.name]["scores"][name] = result.overall
            found[task.name]["dtype"][name] = predictor.dtype
        del predictor
        gc.collect()
    print(scores_table(found))
    return found


def scores_table(found: dict[str, Any]) -> str:
    """Return a table with a row for each model and a column for each task."""
    titles = [f"{name}: {metric(one['metric']).title}, n={one['questions']}" for name, one in found.items()]
    lines = [f"{'model':<36}" + "".join(f"   {title}" for title in titles)]
    for model in next(iter(found.values()))["scores"]:
        cells = [one["scores"][model] for one in found.values()]
        shown = ("-" if cell is None else f"{cell:.2f}" for cell in cells)
        row = (f"   {cell:>{len(title)}}" for cell, title in zip(shown, titles, strict=True))
        lines.append(f"{model[-35:]:<36}" + "".join(row))
    return "\n".join(lines)
