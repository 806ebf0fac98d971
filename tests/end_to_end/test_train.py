"""The main job from the command line: train, score, resume after a kill, evaluate, ask, show."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import vlmvqa
from tests.end_to_end.scripts import LONGER, SHAPES, call, complaints, done, launch, losses, start
from vlmvqa.data.datasets import vqav2
from vlmvqa.metrics.registry import score
from vlmvqa.training.checkpoints import complete_checkpoints
from vlmvqa.training.log import read_log


def run(script: str, *arguments: str) -> str:
    """The script's job in this process: what it prints."""
    return done(call(script, *arguments)).out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.root={tmp_path_factory.mktemp('data') / 'shapes'}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> tuple[Path, str]:
    """A run of 12 steps, never interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    ended = done(launch("train", f"run.dir={folder}", data, *LONGER, "trainer.max_steps=12"))
    assert complaints(ended) == []  # no warning, of any package
    return folder, ended.out


def test_a_run_leaves_what_the_design_lists(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    n = sum(1 for _ in (folder / "predictions.jsonl").open())
    assert metrics["n"] == n > 0
    assert 0 <= metrics["metrics"]["vqa_accuracy"]["overall"] <= 100
    assert 0 < metrics["controls"]["prior"]["overall"] <= 100
    assert 0 <= metrics["controls"]["shuffled_images"]["overall"] <= 100
    assert metrics["prompt"] == "{question}\n" and metrics["split"] == "val"
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 12
    assert sorted(losses(folder)) == list(range(1, 13))
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-9", "checkpoint-12"]
    assert "vision" in printed and "frozen" not in printed and "VQA accuracy" in printed
    assert list((folder / "runs").rglob("events.out.tfevents*"))
    HTMLParser().feed((folder / "report.html").read_text())


def test_the_scores_are_the_metrics_of_the_predictions(trained: tuple[Path, str], data: str) -> None:
    """Read the official files and the submission file back, score them: the number of `metrics.json`."""
    folder, _ = trained
    answers = {
        record["question_id"]: record["answer"] for record in json.loads((folder / "submission.json").read_text())
    }
    examples = vqav2.read(Path(data.removeprefix("data.root=")), "val")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert score(examples, answers).overall == metrics["metrics"]["vqa_accuracy"]["overall"]


def test_killed_and_resumed_is_never_stopped(tmp_path: Path, trained: tuple[Path, str], data: str) -> None:
    """Promise 5 by kill -9: the same losses at every step, the same predictions, and the log without a gap."""
    folder = tmp_path / "killed"
    process = start("train", f"run.dir={folder}", data, *LONGER, "trainer.max_steps=12")
    while process.poll() is None and max(losses(folder), default=0) < 7:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    # What the kill may leave: a checkpoint that was being written.
    half = folder / "checkpoint-9.partial"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")
    done(launch("train", f"run.dir={folder}", data, *LONGER, "trainer.max_steps=12", "resume=auto"))
    expected, _ = trained
    assert losses(folder) == losses(expected)
    assert (folder / "predictions.jsonl").read_text() == (expected / "predictions.jsonl").read_text()


def test_a_finished_run_trains_no_further(tmp_path: Path, trained: tuple[Path, str], data: str) -> None:
    """One that died while it was scored: its steps are done, the model and the scores are written again."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder, symlinks=True)
    (folder / "metrics.json").unlink()
    run("train", f"run.dir={folder}", data, *LONGER, "trainer.max_steps=12", "resume=auto")
    assert losses(folder) == losses(trained[0]) and (folder / "latest").resolve().name == "checkpoint-12"
    assert (folder / "predictions.jsonl").read_text() == (trained[0] / "predictions.jsonl").read_text()


@pytest.mark.slow
def test_sampled_targets_go_on_after_a_resume(tmp_path: Path, data: str) -> None:
    """Targets drawn anew each epoch are the same whether an epoch was begun before or after the resume."""
    small = (*LONGER, data, "data.target=sampled", "trainer.lr_scheduler_type=constant", "trainer.eval_strategy=no")
    run("train", f"run.dir={tmp_path / 'whole'}", *small, "trainer.max_steps=8")
    run("train", f"run.dir={tmp_path / 'parts'}", *small, "trainer.max_steps=6")
    run("train", f"run.dir={tmp_path / 'parts'}", *small, "trainer.max_steps=8", "resume=auto")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_the_best_checkpoint_is_known_and_may_be_the_model(tmp_path: Path, data: str) -> None:
    """The highest VQA accuracy of the run's evaluations: `best` points to it, and it is the model on request."""
    folder = tmp_path / "run"
    often = ("trainer.eval_steps=3", "trainer.save_total_limit=1", "trainer.learning_rate=3e-3")
    run(
        "train",
        f"run.dir={folder}",
        data,
        *LONGER,
        *often,
        "trainer.max_steps=12",
        "trainer.load_best_model_at_end=true",
    )
    scores = {r["step"]: r["eval_vqa_accuracy"] for r in read_log(folder / "log.jsonl") if "eval_vqa_accuracy" in r}
    best = max(scores, key=lambda step: (scores[step], -step))  # of equal ones the first
    assert (folder / "best").resolve().name == f"checkpoint-{best}"
    assert (folder / "latest").resolve().name == "checkpoint-12"
    assert {path.name for path in complete_checkpoints(folder)} == {f"checkpoint-{best}", "checkpoint-12"}
    weights = load_file(folder / "best" / "model.safetensors")
    model = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in model.items())
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["vqa_accuracy"]["overall"] == scores[best]
    card = (folder / "model" / "README.md").read_text()
    assert "| model | majority baseline | shuffled images |" in card and f'vlmvqa.load("{folder}")' in card


@pytest.mark.slow
def test_training_ends_where_the_score_stops_improving(tmp_path: Path, data: str) -> None:
    """After the third evaluation: two are no better than the first. A resumed run ends there too."""
    folder = tmp_path / "run"
    stopping = ("trainer.early_stopping_patience=2", "trainer.eval_steps=3", "trainer.save_total_limit=null")
    given = (f"run.dir={folder}", data, *LONGER, *stopping, "trainer.learning_rate=1e-9", "trainer.max_steps=30")
    printed = run("train", *given)
    assert "stopped early at step 9: no improvement by more than 0 in 2 evaluations" in printed
    whole = losses(folder)
    assert max(whole) == 9 and (folder / "model").is_dir()
    assert "stopped early at step 9" in run("train", *given, "resume=auto") and losses(folder) == whole
    shutil.rmtree(folder / "checkpoint-9")
    printed = run("train", *given, "resume=auto")
    assert f"resuming from {folder / 'checkpoint-6'}" in printed and "stopped early at step 9" in printed
    assert losses(folder) == whole
    printed = run("train", *given, "resume=auto", "trainer.early_stopping_patience=3")
    assert "stopped early at step 12" in printed and max(losses(folder)) == 12


def test_eval_gives_what_training_gave(tmp_path: Path, trained: tuple[Path, str], data: str) -> None:
    folder, _ = trained
    launch("eval", f"checkpoint={folder}", "data=shapes", data, *SHAPES, "split=val", f"run.dir={tmp_path}/e")
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "e", folder))
    assert ours["metrics"] == theirs["metrics"] and ours["controls"] == theirs["controls"]
    sliced = ["split=val[:50%]", "decoding.num_beams=2", f"run.dir={tmp_path}/half"]
    run("eval", f"checkpoint={folder}/model", "data=shapes", data, *SHAPES, *sliced)
    half = json.loads((tmp_path / "half" / "metrics.json").read_text())
    assert half["n"] == round(theirs["n"] / 2) and half["decoding"]["num_beams"] == 2


def test_predict_asks_every_question_about_every_picture(tmp_path: Path, trained: tuple[Path, str]) -> None:
    folder, _ = trained
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (50, 40), color).save(pictures / f"{color}.png")
    (tmp_path / "questions.txt").write_text("How many shapes?\n\nWhat's the star's color, if any?\n")
    asked = ["question=What color is it?", "question=Is it 'red', or not?", f"questions={tmp_path}/questions.txt"]
    printed = run("predict", f"checkpoint={folder}", f"image={pictures}", *asked, f"run.dir={tmp_path}/p")
    records = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").open()]
    assert len(records) == 8
    assert {record["question"] for record in records} == {
        "What color is it?",
        "Is it 'red', or not?",
        "How many shapes?",
        "What's the star's color, if any?",
    }
    assert all(record["log_probability"] <= 0 for record in records)
    assert "red.png" in printed and "blue.png" in printed


@pytest.mark.parametrize("attention_pattern", ["blockwise_prefix", "prefix_lm"])
def test_show_draws_a_row(tmp_path: Path, data: str, attention_pattern: str) -> None:
    printed = run(
        "show", data, *SHAPES, "sample=1", f"model.attention_pattern={attention_pattern}", f"run.dir={tmp_path}"
    )
    assert "image x 10" in printed and "<eos>" in printed and "10 image tokens, then '<bos>" in printed
    with Image.open(tmp_path / "row.png") as picture:
        assert min(picture.size) > 300


def test_load_answers_and_saves(tmp_path: Path, trained: tuple[Path, str]) -> None:
    """`vlmvqa.load(folder).answer(...)`, and the saved folder is enough: the same answers from a copy of it."""
    folder, _ = trained
    model = vlmvqa.load(folder)
    picture = Image.new("RGB", (50, 40), "red")
    one = model.answer(picture, "What color is it?")
    both = model.answer(picture, ["What color is it?", "How many shapes are there?"])
    assert both[0].text == one.text and both[0].log_probability == pytest.approx(one.log_probability, abs=1e-4)
    model.save(tmp_path / "copy")
    copied = vlmvqa.load(tmp_path / "copy")
    assert copied.answer(picture, "What color is it?") == one
    assert copied.settings == model.settings and copied.decoding == model.decoding
    weights: dict[str, Any] = model.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in copied.model.state_dict().items())


@pytest.mark.parametrize(
    "changed",
    [
        ("model.attention_pattern=prefix_lm",),
        *(
            pytest.param(changed, marks=pytest.mark.slow)
            for changed in (
                ("model.attention_pattern=causal", "data.row_tokens=160", "data.questions_per_row=2"),
                ("model.attention_pattern=image_prefix", "model.projector.kind=mlp", "model.projector.dropout=0.1"),
                ("trainer.activation_checkpointing=true", "trainer.bf16=true", "trainer.gradient_accumulation_steps=2"),
            )
        ),
        ("trainable.vision=1", "trainable.language=none", "learning_rates.vision=1e-5"),
    ],
    ids=lambda changed: changed[0],
)
def test_what_can_be_turned(tmp_path: Path, data: str, changed: tuple[str, ...]) -> None:
    run("train", f"run.dir={tmp_path / 'run'}", data, *LONGER, "trainer.max_steps=2", *changed)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["vqa_accuracy"]["overall"] is not None


ASKED = {"prompt": "Q: {question} A:", "resize": "center_crop", "max_text_tokens": 40}


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A run of 2 steps whose prompt, image settings and decoding are not the default ones."""
    folder = tmp_path_factory.mktemp("runs") / "unusual"
    asked = [f"data.{key}={value}" for key, value in ASKED.items()]
    more = ("data.target=sampled", "trainer.adam_beta2=0.95", "decoding.num_beams=2", "decoding.max_new_tokens=6")
    run("train", f"run.dir={folder}", data, *LONGER, "trainer.max_steps=2", *asked, *more)
    return folder


def test_eval_changes_only_the_decoding_it_is_given_and_records_the_models_own(
    tmp_path: Path, unusual: Path, data: str
) -> None:
    asked = ("split=val[:3]", "decoding.max_new_tokens=4", f"run.dir={tmp_path}/e")
    run("eval", f"checkpoint={unusual}", "data=shapes", data, *SHAPES, *asked)
    trained = vlmvqa.load(unusual).decoding
    assert (trained.num_beams, trained.max_new_tokens) == (2, 6)
    config = yaml.safe_load((tmp_path / "e" / "config.yaml").read_text())
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert config["decoding"] == metrics["decoding"] == asdict(replace(trained, max_new_tokens=4))
    assert {key: config["data"][key] for key in ASKED} == ASKED and metrics["prompt"] == ASKED["prompt"]


def test_predict_changes_only_the_decoding_it_is_given(tmp_path: Path, unusual: Path) -> None:
    picture, question = tmp_path / "red.png", "What color is it?"
    Image.new("RGB", (50, 40), "red").save(picture)
    asked = (f"image={picture}", f"question={question}", "decoding.num_beams=1", "decoding.temperature=1")
    run("predict", f"checkpoint={unusual}", *asked, f"run.dir={tmp_path}/p")
    written = json.loads((tmp_path / "p" / "predictions.jsonl").read_text())["log_probability"]
    model = vlmvqa.load(unusual)

    def log_probability(**changed: int) -> float:
        return replace(model, decoding=replace(model.decoding, **changed)).answer(picture, question).log_probability

    assert written == pytest.approx(log_probability(num_beams=1, temperature=1), abs=1e-4)
    # The comparison has teeth: without what was given, or without what the model keeps, it is another number.
    for other in ({}, {"num_beams": 1, "temperature": 1, "max_new_tokens": 20}):
        assert written != pytest.approx(log_probability(**other), abs=1e-2)


@pytest.mark.slow
def test_the_model_compiles(tmp_path: Path, data: str) -> None:
    """Traced and differentiated by torch.compile; the C++ code that inductor makes of it takes minutes to build."""
    compiled = ("trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager")
    for name, more in (("compiled", compiled), ("plain", ())):
        run("train", f"run.dir={tmp_path / name}", data, *LONGER, "trainer.max_steps=2", *more)
    assert losses(tmp_path / "compiled")[2] == pytest.approx(losses(tmp_path / "plain")[2], abs=1e-3)
