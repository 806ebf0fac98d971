"""Make one model of several that were tuned from the same one, without training; no GPU is needed, and little memory.

python launch/merge.py base=runs/base models=[runs/vqa,runs/docvqa] method=ties density=0.3 output=runs/merged
python launch/merge.py models=[runs/one,runs/two] method=slerp weights=[0.7,0.3] output=runs/between
python launch/merge.py models=[runs/lora-a,runs/lora-b] method=ties samples=200 output=runs/merged   and score it
python launch/merge.py adapter=runs/lora-a output=runs/whole
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from vlmvqa import __version__
from vlmvqa.cli import refuse_overrides, run
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, all_answered, count_questions
from vlmvqa.data.submissions import replace_file
from vlmvqa.data.tasks import DataSettings, data_settings, read_examples, scoring
from vlmvqa.errors import InputError
from vlmvqa.extras.merging.logit_diff import answer_logits, logit_diff, split_questions
from vlmvqa.extras.merging.merge import Merge
from vlmvqa.extras.merging.settings import MergeSettings
from vlmvqa.extras.merging.validation import adapter_settings, own_config
from vlmvqa.inference.predictor import load
from vlmvqa.metrics.registry import metric, refuse_unscorable, score
from vlmvqa.models import model_folder
from vlmvqa.settings import build_settings

COMPARED = 16  # questions that an adapter over its base and the merged model are compared on


@dataclass(frozen=True)
class Asked:
    """A task that the models are compared on."""

    name: str
    data: DataSettings
    examples: list[Example]
    scoring: dict[str, Any]


def main(config: DictConfig) -> None:
    merge = _merge(config)
    folder = Path(config.output).expanduser()
    if folder.resolve() in {model.folder.resolve() for model in (*merge.models, merge.base)}:
        raise InputError(f"output={folder} is one of the models that are merged; choose another")
    if folder.exists() and any(folder.iterdir()) and not config.run.overwrite:
        raise InputError(f"output={folder} is there already; choose another, or set run.overwrite=true")
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
    _write(folder, record)
    if record["parts"]:
        print(table(record["parts"], [config.adapter] if config.adapter else list(config.models)))
    if config.adapter and asked:
        record["drift"] = _drift(Path(merge.models[0].folder), folder, asked, config.samples or COMPARED)
    elif asked:
        record["scores"] = _scores(config, merge, folder, asked)
    elif why:
        print(f"nothing was compared: {why}")
    _write(folder, record)
    print(f"model: {folder}")


INTO = {
    "full": "the merged model uses the full ones; the logits drift",
    "dequantized": "the merged model uses these, unpacked; the logits are equal to rounding",
}


def _merge(config: DictConfig) -> Merge:
    """What is to be merged, found to fit together."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    if isinstance(values["layers"], str):  # a pattern is seldom in Hydra's grammar, which then leaves it as text
        values["layers"] = yaml.safe_load(values["layers"])
    keys = [field.name for field in fields(MergeSettings)]
    base = None if config.base is None else model_folder.find(config.base)
    if config.adapter is None:
        settings = build_settings(MergeSettings, {key: values[key] for key in keys}, "merge")
        return Merge(base, [model_folder.find(folder) for folder in config.models], settings, config.into)
    refuse_overrides("of several models, and adapter= is one; give models=[...] for it", "models", *keys)
    adapter = model_folder.find(config.adapter)
    if adapter_settings(adapter) is None:
        raise InputError(
            f"adapter={config.adapter} is a whole model, not an adapter; name the run of an adapter, or give "
            "models=[...] to merge whole models"
        )
    return Merge(base, [adapter], MergeSettings("task_arithmetic"), config.into)


def table(counted: dict[str, Any], models: list[str]) -> str:
    """A row for each part and model: how far tuning moved it, and what of that was kept."""
    lines = [f"{'part':<12}{'model':<32}{'moved by, of the norm':>24}{'kept':>9}{'sign conflicts':>16}"]
    for part, one in counted.items():
        for number, model in enumerate(models):
            moved = one["norms_of_deltas"][number] / one["norm_of_base"] if one["norm_of_base"] else float("inf")
            conflicts = f"{one['sign_conflicts']:.1%}" if number == 0 else ""
            name = part if number == 0 else ""
            kept = "-" if one["kept"][number] is None else f"{one['kept'][number]:.1%}"
            lines.append(f"{name:<12}{model[-31:]:<32}{moved:>24.3%}{kept:>9}{conflicts:>16}")
    return "\n".join(lines)


# ---- what they are compared on


def _tasks(config: DictConfig, merge: Merge) -> tuple[list[Asked], str | None]:
    """The tasks with their questions, read before anything is merged; or none, and why, if that is to be told."""
    given = config.get("data") is not None
    if config.samples == 0 or not (given or config.samples or config.adapter):
        return [], None
    if given:
        settings = data_settings(config)
        named = {name or task.source: task for name, task in settings.tasks.items()}
    else:
        named, why = _own([model.folder for model in merge.models])
        if why:
            return [], f"{why}; give data="
    prompts = own_config(merge.config).get("prompts", {})
    asked = []
    for name, task in named.items():
        task = replace(task, prompt=prompts.get(task.source, task.prompt))
        most = config.samples or (COMPARED if config.adapter else None)
        limits = [limit for limit in (most, task.max_eval_samples) if limit is not None]
        examples = read_examples(task, task.eval_split, min(limits, default=None), BadRecords("skip"))
        if not config.adapter:
            if not all_answered(examples):
                raise InputError(f"{name}: {task.eval_split} has no answers to score with; choose another eval_split")
            refuse_unscorable(task.metric, examples)
        asked.append(Asked(name, task, examples, scoring(task, task.eval_split)))
    return asked, None


def _own(models: Sequence[Path]) -> tuple[dict[str, DataSettings], str | None]:
    """What the models' own runs evaluated on, as their config.yaml says; or why that is not known."""
    found: dict[str, DataSettings] = {}
    for folder in models:
        path = folder.parent / "config.yaml"
        if folder.name != "model" or not path.is_file():
            return {}, f"{folder} is not in the folder of its run, whose config.yaml says what it was evaluated on"
        for name, task in data_settings(OmegaConf.create({"data": OmegaConf.load(path).data})).tasks.items():
            name = name or task.source
            if found.setdefault(name, task) != task:
                found[f"{name} ({folder.parent.name})"] = task
    return found, None


def _drift(adapter: Path, merged: Path, asked: Sequence[Asked], most: int) -> dict[str, Any]:
    """The adapter over its base, and the merged model."""
    examples = [one for task in asked for one in split_questions(task.examples, most)]
    logits, kinds = [], []
    for folder in (adapter, merged):
        predictor = load(folder)
        bits = predictor.adapter and predictor.adapter.settings.bits
        kinds.append(predictor.settings.dtype + (f", {bits} bits" if bits else ""))
        logits.append(answer_logits(predictor, examples))
        del predictor
        gc.collect()
    found = logit_diff(*logits)
    print(f"largest logit difference, adapter over its base ({kinds[0]}) to merged ({kinds[1]}): {found}")
    return {**asdict(found), "adapter": kinds[0], "merged": kinds[1]}


def _scores(config: DictConfig, merge: Merge, merged: Path, asked: Sequence[Asked]) -> dict[str, Any]:
    """Every task by its official metric: of the base, of each model, of the merged one."""
    named = {config.base or str(merge.base.folder): merge.base.folder} if merge.knows_base else {}
    named |= {str(name): model.folder for name, model in zip(config.models, merge.models, strict=True)}
    named[str(merged)] = merged
    found: dict[str, Any] = {
        task.name: {
            "metric": task.data.metric,
            "split": task.data.eval_split,
            "questions": count_questions(task.examples),
            "prompt": task.data.prompt,
            "scores": {},
        }
        for task in asked
    }
    for name, folder in named.items():
        predictor = load(folder)
        for task in asked:
            answers = predictor.answer_examples(task.examples, batch_size=config.batch_size, progress=True)
            texts = {question: answer.text for question, answer in answers.items()}
            result = score(task.examples, texts, task.data.metric, **task.scoring)
            found[task.name]["scores"][name] = result.overall
        del predictor
        gc.collect()
    print(scores_table(found))
    return found


def scores_table(found: dict[str, Any]) -> str:
    """A row for each model, a column for each task."""
    titles = [f"{name}: {metric(one['metric']).title}, n={one['questions']}" for name, one in found.items()]
    lines = [f"{'model':<36}" + "".join(f"{title:>{len(title) + 3}}" for title in titles)]
    for model in next(iter(found.values()))["scores"]:
        cells = [one["scores"][model] for one in found.values()]
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        row = (f"{cell:>{len(title) + 3}}" for cell, title in zip(shown, titles, strict=True))
        lines.append(f"{model[-35:]:<36}" + "".join(row))
    return "\n".join(lines)


def _write(folder: Path, record: dict[str, Any]) -> None:
    replace_file(folder / "merge.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run(main, "merge")
