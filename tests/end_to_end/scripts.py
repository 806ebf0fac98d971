"""The scripts of `launch/`, run as a user runs them, and how they end.

`launch` starts a process; `call` does the same job in this one, which saves seconds of imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import predict as predict_script
import pytest

from tests import forks
from tests.conftest import ROOT
from vlmvqa import cli
from vlmvqa.config.inference_schema import EvalConfig, PredictConfig
from vlmvqa.config.schema import TrainConfig
from vlmvqa.evaluation.helm import run as helm_script
from vlmvqa.evaluation.helm.plan import HelmConfig
from vlmvqa.extras.dataset_tools.run import PrepareConfig, run_job
from vlmvqa.extras.export.run import ExportConfig, export
from vlmvqa.extras.merging.run import MergeConfig, merge_models
from vlmvqa.extras.parity.verify import VerifyConfig, verify
from vlmvqa.extras.planning.run import PlanConfig, plan
from vlmvqa.extras.report.show import ShowConfig, show
from vlmvqa.extras.serving.run import ServeConfig, serve_model
from vlmvqa.extras.study.run import run_study
from vlmvqa.extras.study.settings import StudyConfig
from vlmvqa.extras.sweep.run import run_sweep
from vlmvqa.extras.sweep.settings import SweepConfig
from vlmvqa.inference.run import evaluate_run
from vlmvqa.training.log import read_log
from vlmvqa.training.run import train

JOBS: dict[str, Callable[[], None]] = {
    "train": lambda: cli.run("train", TrainConfig, train),
    "eval": lambda: cli.run("eval", EvalConfig, evaluate_run),
    "predict": lambda: cli.run("predict", PredictConfig, predict_script.predict),
    "serve": lambda: cli.run("serve", ServeConfig, serve_model),
    "show": lambda: cli.run("show", ShowConfig, show),
    "prepare": lambda: cli.run("prepare", PrepareConfig, run_job),
    "merge": lambda: cli.run("merge", MergeConfig, merge_models),
    "study": lambda: cli.run("study", StudyConfig, run_study),
    "sweep": lambda: cli.run("sweep", SweepConfig, run_sweep),
    "plan": lambda: cli.run("plan", PlanConfig, plan),
    "export": lambda: cli.run("export", ExportConfig, export),
    "verify": lambda: cli.run("verify", VerifyConfig, verify),
    "helm": lambda: cli.run("helm", HelmConfig, helm_script.main),
}
RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
MODEL = (
    "model.vision.overrides.depth=1",
    "model.vision.overrides.embed_dim=32",
    "model.vision.overrides.num_heads=2",
    "model.language.overrides.num_hidden_layers=1",
    "model.language.overrides.hidden_size=32",
    "model.language.overrides.intermediate_size=32",
)
SMALL = (
    *MODEL,
    "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=4",
    "trainer.logging_steps=1",
    "trainer.report_to=none",
    "trainer.use_cpu=true",
    "trainer.eval_strategy=no",
)
# A run long enough to be stopped, on a small set of shapes.
SHAPES = ("data.options.train_images=40", "data.options.val_images=12", "data.options.questions_per_image=4")
LONGER = (
    *SHAPES,
    "model.vision.overrides.depth=1",
    "model.language.overrides.num_hidden_layers=2",
    "trainer.per_device_train_batch_size=8",
    "trainer.logging_steps=1",
    "trainer.eval_steps=6",
    "trainer.save_steps=3",
    "trainer.use_cpu=true",
)
TRAIN_QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
TRAIN_ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
TRAIN_IMAGE = "train2014/COCO_train2014_000000000003.jpg"  # question 3000 is about it
VAL_IMAGE = "val2014/COCO_val2014_000001000002.jpg"


@dataclass(frozen=True)
class Ended:
    """How a script ended: exit status and what it printed."""

    status: int
    out: str
    err: str


def launch(script: str, *arguments: str, before: tuple[str, ...] = ()) -> Ended:
    """The script in a process of its own, with all its imports after `before`, a command that starts another."""
    if before:
        done = subprocess.run([*before, *command(script, *arguments)], capture_output=True, text=True, check=False)
        return Ended(done.returncode, done.stdout, done.stderr)
    process = start(script, *arguments)
    out, err = process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out, err)


def start(script: str, *arguments: str) -> forks.Ranks:
    return forks.script(command(script, *arguments)[1:])


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments]


def call(script: str, *arguments: str) -> Ended:
    """The script's job in this process; a SystemExit ends as it ends a script."""
    out, err, status, before = io.StringIO(), io.StringIO(), 0, os.environ.keys() & RANKS
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{script}.py", *arguments])
        try:
            JOBS[script]()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            print(stop.code, file=sys.stderr)
        finally:
            for name in os.environ.keys() & RANKS - before:  # of a group of one, which is no more
                del os.environ[name]
    return Ended(status, out.getvalue(), err.getvalue())


def sentence(ended: Ended) -> str:
    """The one sentence that a refused run ends with."""
    assert ended.status == 1, ended.err[-2000:]
    assert "Traceback" not in ended.err + ended.out, ended.err[-3000:]
    lines = ended.err.splitlines()  # also at each \r of a progress bar: the sentence must not stick to one
    assert [line for line in lines if "error: " in line] == lines[-1:], ended.err[-2000:]
    assert lines[-1].startswith("error: "), lines[-1]
    return lines[-1]


def complaints(ended: Ended) -> list[str]:
    """What it said on stderr beside its progress."""
    lines = [line for part in ended.err.split("\n") for line in part.split("\r")]
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]


def done(ended: Ended) -> Ended:
    assert ended.status == 0, ended.err[-3000:]
    return ended


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder: when it was changed, and its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Edit a JSON file's content in place."""
    parsed = json.loads(path.read_text(encoding="utf-8"))
    edit(parsed)
    path.write_text(json.dumps(parsed, ensure_ascii=False), encoding="utf-8")


def truncate(path: Path, share: float = 0.6) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def metrics(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return parsed


def losses(folder: Path) -> dict[int, float]:
    """By step."""
    return {record["step"]: record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record}


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
