"""The folder of a training run: what a resumed run may not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.configs import train_config
from tests.unit.test_trainer import write_checkpoint
from vlmvqa.config.compose import to_yaml
from vlmvqa.errors import InputError
from vlmvqa.training.run_folder import open_run

GIVEN = ("resume=auto", "trainer.per_device_train_batch_size=2", "model.attention_pattern=causal")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """That of a run with 8 rows a step."""
    (tmp_path / "config.yaml").write_text(to_yaml(train_config(*GIVEN)))
    return write_checkpoint(tmp_path, 2, **{"progress.json": json.dumps({"global_batch": 8})})


def resumed_from(checkpoint: Path, *changed: str, **how: int) -> Path | None:
    return open_run(checkpoint.parent, train_config(*GIVEN, *changed), **{"global_batch": 8, "world": 2, **how})[0]


@pytest.mark.parametrize(
    "changed",
    [
        "init_from=there",
        "model.attention_pattern=prefix_lm",
        "adapt=lora",
        "data.target=sampled",
        "seed=1",
        "trainable.vision=none",
        "learning_rates.vision=1e-5",
        "trainer.learning_rate=1e-4",
        "clip_percentile=50",
        "loss_weighting=question",
    ],
)
def test_what_decides_the_run_cannot_be_changed(checkpoint: Path, changed: str) -> None:
    before = (checkpoint.parent / "config.yaml").read_text()
    with pytest.raises(InputError, match=f"{changed.partition('=')[0]}.* was .* and is now"):
        resumed_from(checkpoint, changed)
    assert (checkpoint.parent / "config.yaml").read_text() == before


@pytest.mark.parametrize("changed", ["data.root=there", "trainer.logging_steps=5", "model.language.attention=flex"])
def test_what_does_not_can(checkpoint: Path, changed: str) -> None:
    assert resumed_from(checkpoint, changed) == checkpoint


def test_another_global_batch_is_refused_with_the_accumulation_that_keeps_it(checkpoint: Path) -> None:
    for rows in (4, 16):
        with pytest.raises(InputError, match=rf"with 8 rows a step.* {rows}.*gradient_accumulation_steps=2"):
            resumed_from(checkpoint, global_batch=rows)
