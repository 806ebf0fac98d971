"""Config to objects: what every launch script builds the same way. The library itself never sees Hydra."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from vlmvqa.cli import given_keys, group
from vlmvqa.data.tasks import DataSettings
from vlmvqa.models.generation import Decoding
from vlmvqa.sequence.masks import SHAREABLE


def most_questions(data: DataSettings, mode: str) -> int | None:
    """Questions that may share a row: one where the image sees its question."""
    return data.questions_per_row if mode in SHAREABLE else 1


def run_folder(config: DictConfig) -> Path:
    return Path(group(config, "run")["dir"]).expanduser()


def decoding(config: DictConfig, trained: Decoding) -> Decoding:
    """The decoding a model was trained and scored with, but for what the command line says."""
    keys = [key.removeprefix("decoding.") for key in given_keys() if key.startswith("decoding.")]
    values = group(config, "decoding")
    return replace(trained, **{key: values[key] for key in keys})
