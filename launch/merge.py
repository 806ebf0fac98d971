"""Make one model of several that were tuned from the same one, without training; no GPU is needed, and little memory.

python launch/merge.py base=runs/base models=[runs/vqa,runs/docvqa] method=ties density=0.3 output=runs/merged
python launch/merge.py models=[runs/one,runs/two] method=slerp weights=[0.7,0.3] output=runs/between
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from command_line import run
from vlmvqa import __version__
from vlmvqa.data.submissions import replace_file
from vlmvqa.errors import InputError
from vlmvqa.merging.merge import Merge, MergeSettings
from vlmvqa.models import saved
from vlmvqa.settings import build_settings


def main(config: DictConfig) -> None:
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    if not isinstance(values["models"], list):
        raise InputError(f"models={values['models']} should be a list: models=[runs/a,runs/b]")
    if isinstance(values["layers"], str):  # a pattern is seldom in Hydra's grammar, which then leaves it as text
        values["layers"] = yaml.safe_load(values["layers"])
    given = {field.name: values[field.name] for field in fields(MergeSettings)}
    settings = build_settings(MergeSettings, given, "merge")
    base = None if config.base is None else saved.find(config.base)
    merge = Merge(base, [saved.find(folder) for folder in config.models], settings)
    folder = Path(config.output).expanduser()
    if folder.resolve() in {model.folder.resolve() for model in (*merge.models, merge.base)}:
        raise InputError(f"output={folder} is one of the models that are merged; choose another")
    if folder.exists() and any(folder.iterdir()) and not config.run.overwrite:
        raise InputError(f"output={folder} is there already; choose another, or set run.overwrite=true")
    merge.run(folder)
    counted = {name: counts.record() for name, counts in merge.counts.items()}
    record = {
        "base": None if base is None else str(base),
        "models": [str(model.folder) for model in merge.models],
        **asdict(settings),
        "parts": counted,
        "vlmvqa": __version__,
    }
    replace_file(folder / "merge.json", json.dumps(record, indent=2) + "\n")
    if counted:
        print(table(counted, [str(folder) for folder in config.models]))
    print(f"model: {folder}")


def table(counted: dict[str, Any], models: list[str]) -> str:
    """A row for each part and model: how far tuning moved it, and what of that was kept."""
    lines = [f"{'part':<12}{'model':<32}{'moved by, of the norm':>24}{'kept':>9}{'sign conflicts':>16}"]
    for part, one in counted.items():
        for number, model in enumerate(models):
            moved = one["norms_of_deltas"][number] / one["norm_of_base"] if one["norm_of_base"] else float("inf")
            conflicts = f"{one['sign_conflicts']:.1%}" if number == 0 else ""
            name = part if number == 0 else ""
            lines.append(f"{name:<12}{model[-31:]:<32}{moved:>24.3%}{one['kept'][number]:>9.1%}{conflicts:>16}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, "merge")
