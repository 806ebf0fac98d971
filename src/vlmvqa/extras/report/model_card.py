"""Model card: description, scores with their controls, licences and configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmvqa.extras.report.templates import template
from vlmvqa.metrics.registry import metric
from vlmvqa.models.checkpoint import OURS
from vlmvqa.models.loading import read_config
from vlmvqa.paths import is_hub_id

# Licences by a substring of the model's name: the hub's identifier, and the text for the card.
LICENCES = {
    "idefics2": ("apache-2.0", "Apache-2.0"),
    "gemma": ("gemma", "[Gemma terms of use](https://ai.google.dev/gemma/terms)"),
    "dinov2": ("apache-2.0", "Apache-2.0"),
}
METHODS = {"lora": "LoRA", "dora": "DoRA"}


def licences(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the model's licence as a hub identifier ("other" if unknown), and a sentence for each part's weights."""
    identifiers, sentences = [], []
    model = config["model"]
    parts = {"pretrained": {"name": model["pretrained"], **model}} if "pretrained" in model else model
    for part in [part for part in ("pretrained", "vision", "language") if part in parts]:
        settings = parts[part]
        name, weights = str(settings["name"]), str(settings["weights"])
        if weights == "random":
            identifier, terms = "apache-2.0", "randomly initialised and trained here, Apache-2.0"
        else:
            known = [licence for family, licence in LICENCES.items() if family in name.lower() and weights == "hub"]
            source = _without_paths(name if weights == "hub" else weights)
            identifier, terms = known[0] if known else ("other", f"the terms of {source}")
        identifiers.append(identifier)
        sentences.append(f"The {part} model's weights, {_without_paths(name)}: {terms}")
    strict = [identifier for identifier in identifiers if identifier != "apache-2.0"]
    return ("other" if "other" in strict or len(set(strict)) > 1 else (strict or ["apache-2.0"])[0]), sentences


def write_card(folder: Path, name: str, metrics: Sequence[Mapping[str, Any]], config_yaml: str) -> None:
    """Write the model card `README.md` next to the weights, without absolute paths.

    Args:
        folder: the folder of a saved model.
        name: hub id or folder that users will load the model by.
        metrics: content of `metrics.json` of each task.
        config_yaml: the resolved config of the run.
    """
    config, saved = yaml.safe_load(config_yaml), read_config(folder)
    base = _base(saved)
    licence, terms = licences(config)
    terms.append(f"The data's terms: those of the publisher of {', '.join(one['data'] for one in metrics)}")
    card = template("model_card.md.j2").render(
        name=name,
        folder_name=_folder_name(folder, name),
        title=Path(name).expanduser().resolve().name,
        licence=licence,
        terms=terms,
        base=base,
        base_on_hub=is_hub_id(base),
        adapter=saved["adapter"]["settings"] if "adapter" in saved else None,
        architecture=saved["architectures"][0] if OURS in saved else None,
        registered=saved.get("model_type") == OURS,
        exportable=_is_exportable(saved),
        origin=_origin(folder.resolve().parent),
        tasks=metrics,
        config=yaml.safe_dump(_without_paths(config), sort_keys=False, allow_unicode=True).strip(),
        methods=METHODS,
        title_of=lambda name: metric(name).title,
        without_paths=_without_paths,
        repr=repr,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _base(saved: Mapping[str, Any]) -> str:
    """Return the base of the adapters, or the model that training started from: a hub id, a folder, or ""."""
    if "adapter" in saved:
        return str(saved["adapter"]["base"])
    return str((saved.get(OURS, saved).get("started_from") or {"model": ""})["model"])


def _folder_name(folder: Path, name: str) -> str:
    """Return the name that transformers loads the model by: it doesn't find the folder `model` of a run."""
    return f"{name}/{folder.name}" if Path(name).expanduser().resolve() == folder.resolve().parent else name


def _is_exportable(saved: Mapping[str, Any]) -> bool:
    """Return whether `launch/export.py` can write the model in PaliGemma's format."""
    if saved.get("model_type") != OURS:
        return False
    model, language = saved["model"], saved["language_config"]["model_type"]
    return (
        model["attention_pattern"] == "prefix_lm"
        and model["projector"]["kind"] == "linear"
        and language in ("gemma", "gemma2")
    )


def _origin(run: Path) -> str:
    """Return the run that trained the model, with its study, the commit of the code and the day."""
    study = run.parent.parent
    is_of_study = (study / "study.yaml").is_file()
    name = f"{run.name} of {run.parent.name} in the study {study.name}" if is_of_study else f"the run {run.name}"
    if not (run / "run.json").is_file():
        return name
    last = json.loads((run / "run.json").read_text(encoding="utf-8"))["starts"][-1]
    commit = last["git"]["commit"]
    return f"{name}, {last['time'][:10]}{f', at commit {commit[:12]} of the code' if commit else ''}"


def _without_paths(value: Any) -> Any:
    """Replace each absolute path in a setting with its last component, and `<run>/model` with the run's name."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path = Path(value)
    return path.parent.name if path.name == "model" else path.name
