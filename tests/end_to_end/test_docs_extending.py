"""docs/extending.md: its files written into a copy of the project, its changes applied, its commands run there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.end_to_end.scripts import SHAPES, SMALL, metrics
from tests.pages import Block, blocks

PAGE = ROOT / "docs" / "extending.md"
BLOCKS = list(blocks(PAGE))
FEW = [one for one in (*SMALL, *SHAPES) if "model." not in one]
WORDS = ("stop", "exit", "cafe", "taxi")
# All commands in one process: an import of the libraries takes longer than all of them.
RUN = """
import json, shlex, sys
from tests.end_to_end.scripts import call, done
for name, arguments in json.loads(sys.argv[1]):
    done(call(name, *arguments))
"""


def apply(block: Block, home: Path) -> None:
    """Write a new file, or change one: in each hunk, what has no `+` is replaced by what has no `-`."""
    assert block.written_to
    path = home / block.written_to
    if block.language != "diff":
        path.write_text(block.text + "\n")
        return
    text = path.read_text()
    for hunk in re.split(r"^@@\n", block.text, flags=re.MULTILINE):
        lines = hunk.splitlines()
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
        assert text.count(before) == 1, f"{block}: not once in {block.written_to}:\n{before}"
        text = text.replace(before, after)
    path.write_text(text)


def draw_textvqa(root: Path) -> None:
    """Four signs in TextVQA's official files."""
    (root / "train_images").mkdir(parents=True)
    for split, numbers in (("train", range(3)), ("val", range(3, 4))):
        records = []
        for number in numbers:
            Image.new("RGB", (40, 30), (60 * number, 90, 120)).save(root / "train_images" / f"sign{number}.jpg")
            answers = [WORDS[number]] * 7 + ["sign"] * 3
            asked = {"question_id": number, "image_id": f"sign{number}", "question": "what does it say?"}
            records.append({**asked, "answers": answers, "set_name": split, "image_classes": ["Sign"]})
        (root / f"TextVQA_0.5.1_{split}.json").write_text(json.dumps({"dataset_name": "textvqa", "data": records}))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all that the page adds, after the page's commands."""
    home = tmp_path_factory.mktemp("copy")
    for room in ("src", "conf", "launch", "evaluation", "tests"):
        shutil.copytree(ROOT / room, home / room, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for block in BLOCKS:
        if block.written_to:
            apply(block, home)
    draw_textvqa(home / "textvqa")
    asked = []
    for block in BLOCKS:
        for command in block.commands if block.language == "bash" and "weights" not in (block.needs or "") else ():
            _, script, *arguments = command.replace("/data/", f"{home}/").split()
            few = ["data.options={}"] if "data=textvqa" in arguments else SHAPES if "eval.py" in script else FEW
            few = [*few, *(SMALL[-5:] if "train.py" in script else ())]
            asked.append((Path(script).stem, [*arguments, *dict.fromkeys(few)]))
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(asked)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(home / room) for room in ("src", "launch", "."))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return home


def test_the_encoder_is_in_the_saved_model(home: Path) -> None:
    settings = json.loads((home / "runs" / "conv" / "model" / "config.json").read_text())
    assert "vit_conv_stem" in json.dumps(settings)
    weights = (home / "runs" / "conv" / "model" / "model.safetensors").read_bytes()
    assert b"vision.encoder.patch_embed.proj.0.weight" in weights and metrics(home / "runs" / "conv")["metrics"]


def test_the_projector_is_in_the_saved_model(home: Path) -> None:
    weights = (home / "runs" / "convolution" / "model" / "model.safetensors").read_bytes()
    assert b"projector.mix.weight" in weights and b"projector.layers.0.weight" in weights


def test_the_task_is_scored_and_submitted(home: Path) -> None:
    scored = metrics(home / "runs" / "text-val")
    assert scored["data"] == "textvqa" and scored["metrics"]["vqa_accuracy"]["overall"] is not None
    assert json.loads((home / "runs" / "text-val" / "submission.json").read_text())[0]["question_id"] == 3


def test_the_metric_is_the_runs(home: Path) -> None:
    for run in ("f1", "f1-val"):
        assert metrics(home / "runs" / run)["metric"] == "word_f1"


def test_what_the_page_writes_passes_the_linter(home: Path) -> None:
    written = [home / block.written_to for block in BLOCKS if block.written_to and block.written_to.endswith(".py")]
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check"], ["format", "--check"]):
        config = ["--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, *check, *config, *written], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
