"""Every command of the README, as it stands there; where it names weights or VQAv2, on tiny ones of its classes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.end_to_end.scripts import LONGER, SHAPES, call, done
from vlmvqa.data import shapes

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (launch/(?!merge|serve).*)$", README, re.MULTILINE)
DEMO = [command for command in COMMANDS if "runs/demo" in command or "show.py" in command]
# The planner's, at real size, is run by tests/unit/test_planner.py; launchers by tests/distributed/test_launchers.py.
# Other tasks' and merging's are run by test_docs_tasks.py, and the page, which does not end, by test_serve.py.
OTHERS = [command for command in COMMANDS if "gqa" in command]
REAL = [command for command in COMMANDS if command not in [*DEMO, *OTHERS] and "plan.py" not in command]
LANGUAGE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TINY = (
    "model.language.name=gemma2",
    "model.language.weights=random",
    "model.language.tokenizer=trained",
    *(f"model.language.overrides.{key}={value}" for key, value in LANGUAGE.items()),
    "model.vision.weights=random",
    "model.vision.image_size=28",
    *(f"model.vision.overrides.{key}" for key in ("embed_dim=32", "depth=1", "num_heads=2")),
    "trainer.max_steps=2",
    "trainer.dataloader_num_workers=1",
    "trainer.use_cpu=true",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths exist: a trained runs/demo, data/shapes, photo.jpg, VQAv2."""
    home = tmp_path_factory.mktemp("home")
    run = (f"run.dir={home}/runs/demo", f"data.root={home}/data/shapes", *LONGER, "trainer.max_steps=2")
    done(call("train", *run))
    Image.new("RGB", (60, 40), "red").save(home / "photo.jpg")
    vqav2 = shapes.write(home / "vqav2", train_images=8, val_images=4, questions_per_image=2)
    (vqav2 / "test2015").mkdir()
    for picture in (vqav2 / "val2014").iterdir():
        shutil.copy(picture, vqav2 / "test2015" / picture.name.replace("val2014", "test2015"))
    names = (f"v2_OpenEnded_mscoco_{subset}_questions.json" for subset in ("val2014", "test-dev2015"))
    shutil.copy(*(vqav2 / name for name in names))
    return home


def run(command: str, home: Path, *more: str) -> str:
    script, *arguments = shlex.split(command.replace("/data/vqav2", str(home / "vqav2")))
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments, *more],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_readme_has_the_commands_that_are_tested() -> None:
    assert len(DEMO) == 3 and len(REAL) == 4 and len(OTHERS) == 5
    makes = set(re.findall(r"^make (\S+)$", README, re.MULTILINE))
    assert makes == {"demo", "test"}  # `make test` is what runs this; `make demo` is run below


@pytest.mark.parametrize("command", DEMO)
def test_what_follows_the_demo(home: Path, command: str) -> None:
    assert run(command, home, *(SHAPES if "predict" not in command else ()))


def test_the_python_lines(home: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"-\d", done.stdout)


def test_training_for_real(home: Path) -> None:
    for command in REAL:
        run(command, home, *(TINY if "train.py" in command else ()))
    submission = json.loads((home / "runs" / "test-dev" / "submission.json").read_text())
    assert {"question_id", "answer"} == submission[0].keys()


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_make_demo_keeps_its_promise() -> None:
    """At least 95 % on pictures never seen, at most 55 % with the pictures shuffled."""
    alone = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # with all threads
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((ROOT / "runs" / "demo" / "metrics.json").read_text())
    print(done.stdout[-900:])
    assert metrics["metrics"]["vqa_accuracy"]["overall"] >= 95
    assert metrics["controls"]["shuffled_images"]["overall"] <= 55
    assert "report: runs/demo/report.html" in done.stdout
