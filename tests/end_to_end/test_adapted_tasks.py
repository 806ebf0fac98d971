"""Tiny PaliGemma and Idefics2 learn each of the four tasks by LoRA and QLoRA, and beat their controls.

`make test-slow` runs one; all sixteen:

    .venv/bin/python -m pytest -m long -rP tests/end_to_end/test_adapted_tasks.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.end_to_end.scripts import call, done, metrics

EPOCHS = {"paligemma": 1, "idefics2": 5}  # of the base: Idefics2 sees through a resampler, which takes long to learn
KINDS = ("lora", "qlora")
STEPS = {"vqav2": 300, "docvqa": 450, "gqa": 300, "coco_captions": 300}
DRAWN = ("data.synthetic=true", "data.options.train_images=3000", "data.options.val_images=160")
QUIET = ("trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.report_to=none", "+trainer.use_cpu=true")
# Both towers, as the base knows shapes and nothing of pages or captions.
TARGETS = "adapt.targets=[language.*_proj,vision.*.?_proj,vision.*.out_proj,vision.*.fc?]"
ADAPTED = ("model.dtype=float32", "adapt.compute_dtype=float32", TARGETS)
MORE = {
    "paligemma": ("trainable.projector=all", "trainer.learning_rate=3e-3"),
    "idefics2": ("trainer.learning_rate=2e-3",),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a family, a model that has seen shapes, trained whole."""
    return functools.cache(lambda family: train(family, "vqav2", root, tmp_path_factory.mktemp(family), EPOCHS[family]))


def train(family: str, task: str, root: Path, folder: Path, epochs: int, *more: str) -> Path:
    data = (f"data={task}", f"data.root={root / task}", *DRAWN, "data.max_eval_samples=600")
    batch = ("trainer.per_device_train_batch_size=32", f"trainer.num_train_epochs={epochs}")
    group = "trainer" if any(word.startswith("init_from=") for word in more) else "model"
    done(call("train", f"{group}=tiny_{family}", *data, *batch, *QUIET, f"run.dir={folder}", *more))
    return folder


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("family", "kind", "task"), product(EPOCHS, KINDS, STEPS))
def test_a_task_is_learned(
    base: Callable[[str], Path], family: str, kind: str, task: str, root: Path, tmp_path: Path
) -> None:
    more = (*ADAPTED, *MORE[family], f"trainer.max_steps={STEPS[task]}")
    train(family, task, root, tmp_path / "run", 5, f"init_from={base(family)}", f"adapt={kind}", *more)
    found = metrics(tmp_path / "run")
    numbers = found["metrics"][found["metric"]]
    controls = [found["controls"][name]["overall"] for name in ("prior", "shuffled_images")]
    print(family, kind, task, numbers["overall"], numbers["interval"], controls)
    assert numbers["interval"][0] > max(controls)
    assert numbers["overall"] > max(controls) + 5
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
