"""A small run in two stages: what each trains, killed within and between them, and on two ranks."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

import vlmvqa
from tests import forks
from tests.configs import train_config
from tests.end_to_end.scripts import LONGER, call, done, losses, metrics, predictions, sentence
from tests.unit.test_report import Page
from vlmvqa.data.tasks import read_tasks
from vlmvqa.errors import BadRecords
from vlmvqa.models.interface import PARTS
from vlmvqa.models.trained_model import build_model
from vlmvqa.training.log import read_log

ALIGN = "['trainable.vision=none', 'trainable.language=none', 'trainer.max_steps=4', 'trainer.learning_rate=3e-3']"
SETTINGS = (*LONGER, "logger=none", "log_samples=0", "attributions=0", "trainer.eval_strategy=no")
STAGES = f"stages={{align: {ALIGN}, tune: ['trainer.max_steps=5']}}"


def arguments(folder: Path, data: Path, *more: str) -> list[str]:
    return [f"run.dir={folder}", f"data.root={data}", *SETTINGS, STAGES, *more]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """The parts whose weights are equal to the bit."""
    assert one.keys() == other.keys()
    changed = {name.split(".")[0] for name, weight in one.items() if not torch.equal(weight, other[name])}
    return set(PARTS) - changed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a break; next to it the folder of its data."""
    home = tmp_path_factory.mktemp("stages")
    printed = done(call("train", *arguments(home / "run", home / "shapes"))).out
    assert "stage 1 of 2: align" in printed and "stage 2 of 2: tune" in printed
    return home / "run"


def test_the_first_stage_trains_the_projector_alone(run: Path) -> None:
    """Language model and encoder are those that the run started with, to the bit; the second stage trains all."""
    aligned = run / "stages" / "1-align"
    config = yaml.safe_load((aligned / "config.yaml").read_text())
    assert config["trainable"] == {"vision": "none", "projector": "all", "language": "none"}
    assert same(start_of(run), weights(aligned)) == {"vision", "language"}
    assert same(weights(aligned), weights(run)) == set()
    started_from = vlmvqa.load(run).started_from
    assert started_from is not None and started_from["model"] == str(aligned / "model")


def start_of(run: Path) -> dict[str, Tensor]:
    """The weights before the first step: built again with the run's seed, as `run.prepare` and `run.build` do."""
    config = train_config(*[one for one in arguments(run, run.parent / "shapes") if not one.startswith("stages=")])
    set_seed(config.seed)
    examples = [example for task in read_tasks(config.data, BadRecords("error")) for example in task.train]
    return dict(build_model(config.model, config.data, config.decoding, examples).model.named_parameters())


def test_each_stage_has_its_schedule_and_its_log(run: Path) -> None:
    for folder, steps, rate in ((run / "stages" / "1-align", 4, 3e-3), (run, 5, 1e-3)):
        log = [record for record in read_log(folder / "log.jsonl") if "loss" in record]
        assert [record["step"] for record in log] == list(range(1, steps + 1))
        assert max(record["learning_rate"] for record in log) == pytest.approx(rate)
    assert not (run / "stages" / "1-align" / "metrics.json").exists() and len(predictions(run)) == 48
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert "align" in text and "tune" in text  # where the stages begin


def test_between_the_stages_the_same_command_goes_on(run: Path, tmp_path: Path) -> None:
    """And trains no finished stage again; with other settings, it is refused."""
    folder = copied_after_first_stage(run, tmp_path)
    command = arguments(folder, run.parent / "shapes", "report=false", "resume=auto")
    other = [one.replace("rate=3e-3", "rate=1e-3") for one in command]
    assert "trainer.learning_rate was 0.003 and is now 0.001" in sentence(call("train", *other))
    renamed = [one.replace("tune:", "rest:") for one in command]
    assert "already holds a run with the stages align, tune" in sentence(call("train", *renamed))
    unstaged = [one for one in command if not one.startswith("stages=")]
    assert "already holds a run with the stages align, tune" in sentence(call("train", *unstaged))
    assert "already holds a run with the stages" in sentence(call("train", *command[:-1]))
    assert "align is finished" in done(call("train", *command)).out
    assert same(weights(folder), weights(run)) == set(PARTS) and predictions(folder) == predictions(run)


def copied_after_first_stage(run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(run / "stages", folder / "stages", symlinks=True)
    shutil.copy(run / "stages.json", folder)
    return folder


@pytest.mark.slow
def test_overwriting_starts_with_the_first_stage(run: Path, tmp_path: Path) -> None:
    folder = copied_after_first_stage(run, tmp_path)
    command = arguments(folder, run.parent / "shapes", "run.overwrite=true", "report=false")
    assert "is finished" not in done(call("train", *command)).out
    assert same(weights(folder), weights(run)) == set(PARTS)
    unstaged = [one for one in command if not one.startswith("stages=")]
    done(call("train", *unstaged, "trainer.max_steps=1"))
    assert not (folder / "stages").exists() and not (folder / "stages.json").exists()


def killed(arguments: list[str], when: Callable[[], bool]) -> None:
    process = forks.ranks(1, ["launch/train.py", *arguments])
    while process.poll() is None and not when():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0][-3000:]
    os.kill(process.pids[0], signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_killed_within_and_between_stages(run: Path, tmp_path: Path) -> None:
    """With kill -9 in the first stage, after it, and in the last one: the same weights to the bit."""
    folder, first = tmp_path / "run", tmp_path / "run" / "stages" / "1-align"
    command = arguments(folder, run.parent / "shapes", "resume=auto")
    killed(command, lambda: max(losses(first), default=0) >= 3)
    assert not (first / "model" / "config.json").exists()
    killed(command, lambda: (first / "model" / "config.json").exists())
    killed(command, lambda: max(losses(folder), default=0) >= 4)
    assert not (folder / "model").exists()
    done(call("train", *command))
    assert same(weights(first), weights(run / "stages" / "1-align")) == set(PARTS)
    assert same(weights(folder), weights(run)) == set(PARTS)
    assert losses(folder) == losses(run) and predictions(folder) == predictions(run)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_two_ranks(run: Path, tmp_path: Path, strategy: str) -> None:
    """One of them killed in the last stage; the same command ends like the run of one process."""
    folder = tmp_path / "run"
    batch = "trainer.per_device_train_batch_size=4"
    settings = (batch, f"dist={strategy}", "dist.timeout_minutes=2", "report=false", "resume=auto")
    command = arguments(folder, run.parent / "shapes", *settings)
    process = forks.ranks(2, ["launch/train.py", *command])
    while process.poll() is None and not losses(folder):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0][-3000:]
    os.kill(process.pids[1], signal.SIGKILL)
    process.communicate(timeout=120)
    again = forks.ranks(2, ["launch/train.py", *command])
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0 and printed.count("align is finished") == 1, printed[-3000:]
    first = folder / "stages" / "1-align"
    assert same(start_of(run), weights(first)) == {"vision", "language"}
    assert losses(first) == pytest.approx(losses(run / "stages" / "1-align"), abs=1e-4)
    assert losses(folder) == pytest.approx(losses(run), abs=1e-4)


@pytest.mark.slow
def test_the_recipe_of_llava_on_a_tiny_model(tmp_path: Path) -> None:
    """Captions, then questions, of synthetic data in the formats of the real ones."""
    data = [f"stages.{stage}.data.root={tmp_path / stage}" for stage in ("align", "tune")]
    few = ["data.synthetic=true", "data.options.train_images=8", "data.options.val_images=4"]
    tiny = ["model=tiny", "model.projector.kind=mlp", "trainer=tiny", "trainer.max_steps=2", *SETTINGS[-4:]]
    done(
        call(
            "train", "experiment=llava_two_stage", *data, *few, *tiny, "trainer.use_cpu=true", f"run.dir={tmp_path}/run"
        )
    )
    assert set(metrics(tmp_path / "run")["metrics"]) == {"vqa_accuracy"}
    assert set(vlmvqa.load(tmp_path / "run").prompts) == {"coco_captions", "vqav2"}
