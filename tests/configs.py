"""Configurations as the command line composes them."""

from __future__ import annotations

from typing import Any, TypeVar

from vlmvqa.config.compose import build
from vlmvqa.config.overrides import compose
from vlmvqa.config.schema import DataSettings, TrainConfig

Config = TypeVar("Config")


def values(name: str, *overrides: str) -> dict[str, Any]:
    """The resolved values of `conf/<name>.yaml` with overrides."""
    return compose(list(overrides), name).jobs[0].values


def config(kind: type[Config], name: str, *overrides: str, launcher: tuple[str, str] | None = None) -> Config:
    """The typed object that a command's function receives."""
    (job, *_) = compose(list(overrides), name).jobs
    return build(kind, job.values, job.given, launcher)


def train_config(*overrides: str, launcher: tuple[str, str] | None = None) -> TrainConfig:
    return config(TrainConfig, "train", *overrides, launcher=launcher)


def data(*overrides: str) -> DataSettings:
    """The `data` group of a training run."""
    return train_config(*overrides).data
