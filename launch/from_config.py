"""Config to objects: what every launch script builds the same way. The library itself never sees Hydra."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.settings import build_settings


@dataclass(frozen=True)
class DataSettings:
    """The `data` group; its keys are explained in conf/data/vqav2.yaml."""

    source: str
    root: str
    options: Mapping[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "val"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    prompt: str = "answer en {question}\n"
    target: str = "most_common"
    resize: str = "squash"
    max_text_tokens: int | None = 64
    questions_per_row: int | None = None
    images_per_row: int = 1
    on_bad_record: str = "error"


def group(config: DictConfig, name: str) -> dict[str, Any]:
    """A resolved node of the config.

    Raises:
        InputError: a mandatory value (`???`) was not given.
    """
    missing = [key for key in OmegaConf.missing_keys(config) if key.startswith(name)]
    if missing:
        raise InputError(f"{missing[0]} must be given; add {missing[0]}=... to the command")
    node = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def data_settings(config: DictConfig) -> DataSettings:
    settings = build_settings(DataSettings, group(config, "data"), "data")
    if "{question}" not in settings.prompt:
        raise InputError(f"data.prompt={settings.prompt!r} has no {{question}} in it; say where the question goes")
    return settings


def read_examples(
    settings: DataSettings, split: str, max_samples: int | None, bad_records: BadRecords
) -> list[Example]:
    """A split of the source named by `data.source`, a module of `vlmvqa.data` with a function `read`."""
    return list(
        _source(settings.source).read(
            Path(settings.root).expanduser(),
            split,
            prompt=settings.prompt,
            max_samples=max_samples,
            bad_records=bad_records,
            **settings.options,
        )
    )


def run_folder(config: DictConfig) -> Path:
    return Path(group(config, "run")["dir"]).expanduser()


def _source(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"vlmvqa.data.{name}")
    except ModuleNotFoundError as error:
        raise InputError(f"data.source={name}: there is no src/vlmvqa/data/{name}.py") from error
