"""The tiny model learns each of the four tasks from files in the benchmark's own format, and beats its controls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.scripts import call, done, metrics

# A task, how much it takes to learn it, and by how many points the model must beat both of its controls.
TASKS = {
    "vqav2": (("data.options.train_images=4000", "data.options.val_images=100"), 8),
    "docvqa": (("data.options.train_images=4000", "data.options.val_images=100"), 8),
    "gqa": (("data.options.train_images=4000", "data.options.val_images=100"), 8),
    "coco_captions": (("data.options.train_images=2500", "data.options.val_images=200"), 20),
}
QUIET = ("trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.report_to=none", "trainer.use_cpu=true")


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=pytest.mark.slow if name == "gqa" else pytest.mark.long) for name in TASKS]
)
def test_a_task_is_learned(task: str, tmp_path: Path) -> None:
    size, margin = TASKS[task]
    data = (f"data={task}", "data.synthetic=true", f"data.root={tmp_path / 'data'}", *size)
    done(call("train", *data, f"run.dir={tmp_path / 'run'}", "trainer.num_train_epochs=1", *QUIET))
    found = metrics(tmp_path / "run")
    numbers = found["metrics"][found["metric"]]
    controls = [found["controls"][name]["overall"] for name in ("prior", "shuffled_images")]
    assert numbers["interval"][0] > max(controls) + margin, (numbers["overall"], numbers["interval"], controls)
    assert (tmp_path / "run" / "report.html").exists()
    assert len(json.loads((tmp_path / "run" / "submission.json").read_text())) == found["n"]


@pytest.mark.long
def test_a_mixture_is_learned(tmp_path: Path) -> None:
    parts = {"vqav2": "train_images=2000,val_images=100", "gqa": "train_images=2000,val_images=100"}
    data = [
        f"data.parts.{name}.{key}={value}"
        for name, options in parts.items()
        for key, value in {
            "synthetic": "true",
            "root": tmp_path / name,
            "options": "{" + options.replace("=", ":") + "}",
        }.items()
    ]
    done(call("train", "data=mixture", *data, f"run.dir={tmp_path / 'run'}", "trainer.num_train_epochs=1", *QUIET))
    for name in parts:
        found = metrics(tmp_path / "run" / name)
        numbers = found["metrics"][found["metric"]]
        controls = [found["controls"][control]["overall"] for control in ("prior", "shuffled_images")]
        assert numbers["interval"][0] > max(controls) + 5, (name, numbers["overall"], numbers["interval"], controls)
        assert (tmp_path / "run" / name / "report.html").exists()
