"""The folder of a training run: what a resumed run may not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.unit.test_trainer import write_checkpoint
from vlmvqa.errors import InputError
from vlmvqa.training.run_folder import open_run

CONFIG = {
    "init_from": None,
    "model": {"mode": "causal", "language": {"attention": "dense"}},
    "adapt": None,
    "data": {"target": "most_common", "root": "here"},
    "seed": 0,
    "trainable": {"vision": "all"},
    "learning_rates": {"vision": None},
    "trainer": {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "logging_steps": 1},
    "clip_percentile": None,
    "loss_weighting": "token",
    "resume": "auto",
    "resume_force": False,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """That of a run of `CONFIG` with 8 rows a step."""
    OmegaConf.save(OmegaConf.create(CONFIG), tmp_path / "config.yaml")
    return write_checkpoint(tmp_path, 2, **{"progress.json": json.dumps({"global_batch": 8})})


def resumed_from(checkpoint: Path, key: str = "resume", value: Any = "auto", **how: int) -> Path | None:
    config = OmegaConf.create(CONFIG)
    OmegaConf.update(config, key, value)
    return open_run(checkpoint.parent, config, **{"global_batch": 8, "world": 2, **how})[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_from", "there"),
        ("model.mode", "prefix_lm"),
        ("adapt", {"method": "lora"}),
        ("data.target", "sampled"),
        ("seed", 1),
        ("trainable.vision", "none"),
        ("learning_rates.vision", 1e-5),
        ("trainer.learning_rate", 1e-4),
        ("clip_percentile", 50),
        ("loss_weighting", "question"),
    ],
)
def test_what_decides_the_run_cannot_be_changed(checkpoint: Path, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{key}.* was .* and is now"):
        resumed_from(checkpoint, key, value)
    assert OmegaConf.load(checkpoint.parent / "config.yaml") == CONFIG


@pytest.mark.parametrize(
    ("key", "value"), [("data.root", "there"), ("trainer.logging_steps", 5), ("model.language.attention", "flex")]
)
def test_what_does_not_can(checkpoint: Path, key: str, value: Any) -> None:
    assert resumed_from(checkpoint, key, value) == checkpoint


def test_another_global_batch_is_refused_with_the_accumulation_that_keeps_it(checkpoint: Path) -> None:
    for rows in (4, 16):
        with pytest.raises(InputError, match=rf"with 8 rows a step.* {rows}.*gradient_accumulation_steps=2"):
            resumed_from(checkpoint, global_batch=rows)
