"""A pretrained model, trained in full while sharded: its score during training is the saved model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import forks
from tests.end_to_end.scripts import metrics
from vlmvqa.training.log import read_log

DATA = ("data.row_tokens=null", "data.options.train_images=60", "data.options.val_images=12")
QUIET = ("trainer.report_to=none", "trainer.use_cpu=true", "trainer.save_strategy=no", "trainer.logging_steps=1")
STEPS = ("trainer.max_steps=20", "trainer.eval_steps=20", "trainer.per_device_train_batch_size=8")


@pytest.mark.parametrize(
    "dist",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp", "zero2")),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_the_score_during_training_is_the_saved_models(dist: str, tmp_path: Path) -> None:
    given = ("model=tiny_paligemma", f"dist={dist}", f"data.root={tmp_path / 'shapes'}", *DATA, *QUIET, *STEPS)
    process = forks.ranks(2, ["launch/train.py", *given, f"run.dir={tmp_path / 'run'}"])
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    (meanwhile,) = [record for record in read_log(tmp_path / "run" / "log.jsonl") if "eval_vqa_accuracy" in record]
    final = metrics(tmp_path / "run")["metrics"]["vqa_accuracy"]["overall"]
    assert meanwhile["eval_vqa_accuracy"] == pytest.approx(final) and final > 5
