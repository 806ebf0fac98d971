"""The Trainer's subclass: groups of parameters, accumulation, logs, and which checkpoints are whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from tests import tiny
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.batch import Processor, TrainingSet
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.tokenizer import train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.models.vlm import VLM, set_trainable
from vlmvqa.training.banner import banner
from vlmvqa.training.checkpoints import remove_unfinished, whole_checkpoints
from vlmvqa.training.trainer import VqaTrainer, read_log

COLORS = ("red", "green", "blue", "black")


def examples(count: int = 8) -> list[Example]:
    found = []
    for n in range(count):
        # Answers of different lengths, so that micro-batches hold different numbers of supervised tokens.
        color = COLORS[n % 4]
        questions = tuple(
            Question(10 * n + k, "what color", "what color\n", color + " and dark" * k, (color,) * 10)
            for k in range(1 + n % 3)
        )
        found.append(Example(Image.new("RGB", (28, 28), color), n, questions))
    return found


def trainer(folder: Path, vlm: VLM, rates: Mapping[str, float | None] | None = None, **arguments: Any) -> VqaTrainer:
    given = examples()
    tokenizer = train_tokenizer(given, 300)
    processor = Processor(tokenizer, ImageSettings(28, (0.5,) * 3, (0.5,) * 3), vlm.vision.tokens, vlm.mode)
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**settings, "learning_rate": 1e-3, "logging_steps": 1, **arguments},
    )
    training_set = TrainingSet(given, processor, "most_common", 0, BadRecords())
    return VqaTrainer(vlm, args, training_set, processor, learning_rates=rates)


def model() -> VLM:
    return tiny.model(vocab_size=300, initializer_range=0.02)


def test_parts_have_their_own_learning_rates_and_norms_do_not_decay(tmp_path: Path) -> None:
    vlm = model()
    set_trainable(vlm.vision, 1, "vision")
    groups = trainer(tmp_path, vlm, {"vision": 1e-5, "projector": None}, weight_decay=0.1).parameter_groups()
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"vision": 1e-5, "projector": 1e-3, "language": 1e-3}
    names = {id(p): name for name, p in vlm.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    still = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | still == {name for name, p in vlm.named_parameters() if p.requires_grad}
    assert all(name.endswith("weight") and "norm" not in name for name in decayed if "gamma" not in name)
    assert {"projector.layers.0.bias", "language.decoder.norm.weight", "vision.encoder.norm.weight"} <= still


def test_nothing_that_trains_is_an_error(tmp_path: Path) -> None:
    vlm = model().requires_grad_(False)
    with pytest.raises(InputError, match="nothing trains"):
        trainer(tmp_path, vlm).parameter_groups()


def test_the_banner_says_what_is_frozen(tmp_path: Path) -> None:
    vlm = model()
    set_trainable(vlm.language, "none", "language")
    lines = banner(vlm, trainer(tmp_path, vlm, {"vision": 3e-6}).parameter_groups()).splitlines()
    assert [line.split()[0] for line in lines] == ["module", "vision", "projector", "language", "total"]
    assert "3e-06" in lines[1] and "0.001" in lines[2] and "frozen" in lines[3]
    assert f"{sum(p.numel() for p in vlm.parameters()):,}" in lines[4]


def weights_after(folder: Path, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    vlm = model()
    run = trainer(
        folder,
        vlm,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        learning_rate=0.5,
    )
    run.train()
    return {name: p.detach() for name, p in vlm.named_parameters()}


def test_accumulated_steps_are_one_big_batch(tmp_path: Path) -> None:
    """Loss is divided by the supervised tokens of the whole batch, however it is cut (promise 4, one process)."""
    whole = weights_after(tmp_path / "whole", 8, 1)
    pieces = weights_after(tmp_path / "pieces", 2, 4)
    start = dict(model().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-2
    for name, weight in whole.items():
        torch.testing.assert_close(pieces[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_the_log_holds_a_line_a_step(tmp_path: Path) -> None:
    trainer(tmp_path, model()).train()
    records = [record for record in read_log(tmp_path / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all({"loss", "learning_rate", "grad_norm", "questions_per_second"} <= record.keys() for record in records)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 4


def test_a_loss_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    vlm = model()
    with torch.no_grad():
        vlm.projector.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the loss is nan at step 1.*no checkpoint was written"):
        trainer(tmp_path, vlm).train()
    assert all(torch.isfinite(p).all() for name, p in vlm.named_parameters() if not name.startswith("projector"))


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for step, state in ((2, {"global_step": 2}), (10, {"global_step": 10}), (4, None), (6, "cut")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        if state is not None:
            (folder / "trainer_state.json").write_text(json.dumps(state) if state != "cut" else '{"global_st')
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert [path.name for path in remove_unfinished(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert (tmp_path / "checkpoint-best").exists() and not (tmp_path / "checkpoint-4").exists()
