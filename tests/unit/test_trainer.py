"""VqaTrainer: parameter groups, accumulation, logs, checkpoints and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests import tiny
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.models.interface import Model
from vlmvqa.models.vlm import VLM
from vlmvqa.training import checkpoints, quantized_moments
from vlmvqa.training.block_compilation import compile_blocks
from vlmvqa.training.log import parts_table, read_log
from vlmvqa.training.optimizer import GradientClipping, set_trainable
from vlmvqa.training.trainer import TrainerOptions, VqaTrainer

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
    processor = Processor(
        tokenizer, ImageSettings(28, (0.5,) * 3, (0.5,) * 3), vlm.num_image_tokens, vlm.attention_pattern
    )
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**settings, "learning_rate": 1e-3, "logging_steps": 1, **arguments},
    )
    training_set = TrainDataset(given, processor, RowSettings(), BadRecords())
    return VqaTrainer(vlm, args, training_set, processor, TrainerOptions(learning_rates=rates or {}))


def model() -> VLM:
    return tiny.model(vocab_size=300, initializer_range=0.02)


def test_parts_have_their_own_learning_rates_and_norms_do_not_decay(tmp_path: Path) -> None:
    vlm = model()
    set_trainable(vlm.part("vision"), 1, "vision")
    groups = trainer(tmp_path, vlm, {"vision": 1e-5, "projector": None}, weight_decay=0.1).parameter_groups()
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"vision": 1e-5, "projector": 1e-3, "language": 1e-3}
    names = {id(p): name for name, p in vlm.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    still = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | still == {name for name, p in vlm.named_parameters() if p.requires_grad}
    assert all(name.endswith("weight") and "norm" not in name for name in decayed if "gamma" not in name)
    assert {"projector.layers.0.bias", "language.decoder.norm.weight", "vision.encoder.norm.weight"} <= still


def test_training_no_parameter_is_an_error(tmp_path: Path) -> None:
    vlm = model().requires_grad_(False)
    with pytest.raises(InputError, match="nothing trains"):
        trainer(tmp_path, vlm).parameter_groups()


def test_the_parts_table_shows_what_is_frozen(tmp_path: Path) -> None:
    vlm = model()
    set_trainable(vlm.part("language"), "none", "language")
    lines = parts_table(vlm, trainer(tmp_path, vlm, {"vision": 3e-6}).parameter_groups()).splitlines()
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


def test_accumulated_steps_equal_one_large_batch(tmp_path: Path) -> None:
    """The loss is divided by the supervised tokens of the global batch, however it is accumulated."""
    whole = weights_after(tmp_path / "whole", 8, 1)
    pieces = weights_after(tmp_path / "pieces", 2, 4)
    start = dict(model().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-2
    for name, weight in whole.items():
        torch.testing.assert_close(pieces[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_the_fused_optimizer_takes_the_same_steps(tmp_path: Path) -> None:
    """`adamw_torch_fused`, the tiny model's optimizer, updates all tensors of a group in one operation."""
    losses, weights = [], []
    for optim in ("adamw_torch", "adamw_torch_fused"):
        vlm = model()
        run = trainer(tmp_path / optim, vlm, optim=optim, weight_decay=0.1)
        run.train()
        assert bool(run.plain_optimizer().defaults["fused"]) == optim.endswith("fused")
        losses.append([record["loss"] for record in read_log(run.folder / "log.jsonl")])
        weights.append({name: p.detach() for name, p in vlm.named_parameters()})
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("rows", "before", "now", "step", "place"),
    [
        (100, 64, 10, 4, (2, 0)),  # two full epochs of 64 + 36 rows
        (48, 48, 16, 3, (3, 0)),
        (100, 10, 20, 3, (0, 2)),  # after 30 rows, rounded up to 40: no row is repeated
        (100, 60, 10, 3, (1, 6)),
    ],
)
def test_another_global_batch_resumes_at_the_same_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, before: int, now: int, step: int, place: tuple[int, int]
) -> None:
    """Rows that fill the last step of an epoch don't count as trained on."""
    given = trainer(tmp_path, model(), per_device_train_batch_size=now)
    monkeypatch.setattr(given.training_set, "packing", range(rows))
    monkeypatch.setattr(Trainer, "_init_training_state", lambda *_: (0, 0))
    monkeypatch.setattr("vlmvqa.training.checkpoint_loading.progress", lambda _: {"global_batch": before})
    given.state.global_step = step
    assert given._init_training_state(1000, -(-rows // now), 10, str(tmp_path), None) == place


def test_rows_exchanged_among_steps_are_not_resumed_with_another_global_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = trainer(tmp_path, model(), per_device_train_batch_size=4)
    given.training_set.settings = RowSettings(length_window=16)
    monkeypatch.setattr(Trainer, "_init_training_state", lambda *_: (0, 0))
    monkeypatch.setattr("vlmvqa.training.checkpoint_loading.progress", lambda _: {"global_batch": 8})
    with pytest.raises(InputError, match=r"data.length_window=16: .* 8 before and 4 now; keep their number"):
        given._init_training_state(1000, 10, 10, str(tmp_path), None)


def test_the_log_has_one_line_per_step(tmp_path: Path) -> None:
    trainer(tmp_path, model()).train()
    records = [record for record in read_log(tmp_path / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all({"loss", "learning_rate", "grad_norm", "questions_per_second"} <= record.keys() for record in records)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 4


def test_an_extended_run_follows_the_schedule_of_its_new_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints how the learning rate changes; without an extension nothing changes."""
    cosine = {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, model(), **cosine).train()
    before = read_log(tmp_path / "log.jsonl")
    for steps, checkpoint in ((4, "checkpoint-2"), (8, "checkpoint-4")):
        capsys.readouterr()
        given = trainer(tmp_path, model(), max_steps=steps, **cosine)
        given.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        said = "learning rate after step 4: 0 before, 0.0005 now (the cosine schedule spans 8 steps)"
        printed = capsys.readouterr().out
        assert (said in printed) == (steps == 8) and ("learning rate after" in printed) == (steps == 8)
    rates = {record["step"]: record["learning_rate"] for record in read_log(tmp_path / "log.jsonl")}
    assert [rates[record["step"]] for record in before] == [record["learning_rate"] for record in before]
    assert rates[5] == pytest.approx(0.0005) and rates[8] < rates[7] < rates[6] < rates[5]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_updated(tmp_path: Path) -> None:
    vlm = model()
    with torch.no_grad():
        vlm.projector.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the loss is nan at step 1.*no checkpoint was written"):
        trainer(tmp_path, vlm).train()
    assert all(torch.isfinite(p).all() for name, p in vlm.named_parameters() if not name.startswith("projector"))


def write_checkpoint(folder: Path, step: int, **files: str) -> Path:
    with checkpoints.writing(folder, step) as partial:
        for name, text in files.items():
            (partial / name).write_text(text)
    return folder / f"checkpoint-{step}"


def test_incomplete_checkpoints_are_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10, weights="a")
    write_checkpoint(tmp_path, 2, weights="b")
    assert (tmp_path / "latest").resolve().name == "checkpoint-2"
    with pytest.raises(RuntimeError), checkpoints.writing(tmp_path, 12) as partial:
        (partial / "weights").write_text("c")
        raise RuntimeError  # a kill, a full disk
    assert (tmp_path / "latest").resolve().name == "checkpoint-2"
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert [path.name for path in checkpoints.remove_incomplete(tmp_path)] == ["checkpoint-12.partial"]
    assert checkpoints.remove_incomplete(tmp_path) == [] and (tmp_path / "checkpoint-best").exists()


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "unreadable"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, harm: str) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, step, weights="0123456789")
    assert checkpoints.newest_intact(tmp_path) == (tmp_path / "checkpoint-4", [])
    weights = tmp_path / "checkpoint-4" / "weights"
    if harm == "cut":
        weights.write_text("01234")
    elif harm == "flipped":
        weights.write_text("0123456798")
    elif harm == "missing":
        weights.unlink()
    else:
        (tmp_path / "checkpoint-4" / checkpoints.FILES).write_text("{")
    newest, complaints = checkpoints.newest_intact(tmp_path)
    assert newest == tmp_path / "checkpoint-2"
    assert len(complaints) == 1 and "checkpoint-4 is damaged" in complaints[0] and "checkpoint before" in complaints[0]


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    made = [write_checkpoint(tmp_path, step, weights="x") for step in (1, 2, 3, 4)]
    checkpoints.rotate(tmp_path, None, None)
    assert checkpoints.complete_checkpoints(tmp_path) == made
    checkpoints.rotate(tmp_path, 2, str(made[0]))
    assert checkpoints.complete_checkpoints(tmp_path) == [made[0], made[3]]
    checkpoints.rotate(tmp_path, 1, str(made[0]))  # the newest is always kept: a run resumes from it
    assert checkpoints.complete_checkpoints(tmp_path) == [made[0], made[3]]
    checkpoints.rotate(tmp_path, 1, str(made[3]))
    assert checkpoints.complete_checkpoints(tmp_path) == [made[3]]


def test_the_percentile_of_the_last_hundred_norms() -> None:
    """Like bitsandbytes' `percentile_clipping`: index 95 of 100 sorted norms, the current one included."""
    clipping = GradientClipping(max_norm=0.0, percentile=95)
    assert clipping.limit(3.0) == 3.0 and clipping.limit(7.0) == 7.0 and clipping.limit(5.0) == 7.0  # a short history
    norms = torch.rand(250, generator=torch.Generator().manual_seed(0)).tolist()
    for number, norm in enumerate(norms):
        limit = clipping.limit(norm)
        if number >= 100:
            assert limit == sorted(norms[number - 99 : number + 1])[95]
    assert clipping.norms == norms[-100:]
    both = GradientClipping(max_norm=0.5, percentile=95)
    assert both.limit(2.0) == 0.5 and both.limit(0.2) == 0.5
    assert GradientClipping().limit(4.0) == float("inf")
    both.limit(float("inf"))  # under fp16: the scaler skips that step
    assert both.norms == [2.0, 0.2]
    with pytest.raises(InputError, match="clip_percentile=0 must lie between 1 and 100"):
        GradientClipping(percentile=0)


def test_the_gradient_is_clipped_to_the_percentile(tmp_path: Path) -> None:
    vlm = model()
    start = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    constant: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_steps": 1}
    run = trainer(tmp_path, vlm, **constant, max_grad_norm=1.0)
    run.clipping.percentile, run.clipping.norms = 50, [0.125] * 100
    run.train()
    moved = torch.cat([(p.detach() - start[name]).flatten() for name, p in vlm.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.125, rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit", "sgd"])
def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(tmp_path: Path, optim: str) -> None:
    """Into the next epoch, with dropout and percentile clipping: everything that a step depends on is restored."""

    def losses(name: str, resume: str | None = None) -> dict[int, float]:
        vlm = model()
        vlm.projector.dropout.p = 0.5
        rate = 0.3 if optim == "sgd" else 3e-3
        run = trainer(
            tmp_path / name, vlm, optim=optim, learning_rate=rate, max_steps=6, save_strategy="steps", save_steps=2
        )
        run.clipping.percentile = 50
        run.train(resume_from_checkpoint=resume)
        log = read_log(tmp_path / name / "log.jsonl")
        return {record["step"]: record["loss"] for record in log if "loss" in record}

    expected = losses("whole")
    found = losses("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert found == pytest.approx({step: loss for step, loss in expected.items() if step > 2}, abs=1e-5)
    assert len(found) == 4


@pytest.mark.parametrize("numbers", [2, 256, 1000])
def test_8_bit_moments_survive_reading_and_writing(numbers: int) -> None:
    """Codes and scales of bitsandbytes, read as fp32 and quantized again."""
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    for signed in (True, False):
        qmap = create_dynamic_map(signed=signed)
        values = torch.randn(numbers, generator=torch.Generator().manual_seed(numbers)) ** 3
        values = values if signed else values.abs()
        values[0] = -9.0 if signed else 9.0  # the extreme is negative: its code stands for -0.993
        codes, state = quantize_blockwise(values, code=qmap.clone(), blocksize=256)
        dense = quantized_moments.dequantize(codes.flatten(), qmap, state.absmax, 256)
        again, absmax = quantized_moments.quantize(dense, qmap, 256)
        torch.testing.assert_close(absmax, state.absmax.flatten(), rtol=1e-6, atol=0)
        assert torch.equal(again, codes.flatten())


def test_evaluation_answers_in_the_data_type_of_the_saved_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: bfloat16. The trained model stays as it is."""
    monkeypatch.setattr("vlmvqa.training.answering_model.answering_dtype", lambda *_: "bfloat16")
    training, seen = trainer(tmp_path, model()), []

    def score(answering: Model) -> dict[str, float]:
        seen.extend({parameter.dtype for parameter in answering.parameters()})
        vision = answering.part("vision").parameters[0]
        assert torch.equal(vision.float(), training.vlm.part("vision").parameters[0].bfloat16().float())
        return {"score": 1.0}

    options = replace(training.options, score=score, settings=tiny.settings(vocab_size=300))
    training.options = options
    training._prepare_for_training(4, training.get_train_dataloader(), None)
    assert training.evaluate()["eval_score"] == 1.0
    assert seen == [torch.bfloat16] and {p.dtype for p in training.vlm.parameters()} == {torch.float32}


@pytest.mark.slow
def test_compiled_blocks_share_a_graph_and_keep_the_gradients(tmp_path: Path) -> None:
    """More layers than `torch.compile` would compile separately before it gives up and runs them uncompiled."""
    batch = next(iter(trainer(tmp_path, model()).get_train_dataloader()))

    def gradients(compiled: bool) -> list[Tensor]:
        vlm = tiny.model(vocab_size=300, initializer_range=0.02, num_hidden_layers=10).train()
        if compiled:
            compile_blocks(vlm, "aot_eager", None)
        vlm(**batch)["loss"].backward()
        return [parameter.grad for parameter in vlm.parameters() if parameter.grad is not None]

    expected = gradients(compiled=False)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(gradients(compiled=True), expected, atol=1e-6, rtol=1e-5)
    # One graph of the encoder's blocks, one of the decoder's layers.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_answers_during_training_are_not_compiled(tmp_path: Path) -> None:
    def score(answering: Model) -> dict[str, float]:
        answering(**batch)
        return {"score": 1.0}

    vlm = model()
    training = trainer(tmp_path, vlm)
    batch = next(iter(training.get_train_dataloader()))
    training.options = replace(training.options, score=score, compiled=compile_blocks(vlm, None, None))
    training._prepare_for_training(4, training.get_train_dataloader(), None)
    torch._dynamo.utils.counters.clear()
    training.evaluate()
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_torch_8bit"])
def test_8_bit_optimizers_keep_the_moments_of_embeddings_in_fp32(tmp_path: Path, optim: str) -> None:
    """Of the same parameters as transformers' Trainer, which has this rule for bitsandbytes only."""

    def eight_bit(vlm: VLM, optimizer: Any) -> set[str]:
        for parameter in vlm.parameters():
            parameter.grad = torch.ones_like(parameter)
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
            optimizer.step()
        moments = {name: optimizer.state[parameter] for name, parameter in vlm.named_parameters()}
        first = {name: state.get("state1", state.get("exp_avg")) for name, state in moments.items()}
        return {name for name, one in first.items() if hasattr(one, "codes") or one.dtype == torch.uint8}

    ours, theirs = (tiny.model(vocab_size=300, hidden_size=128, intermediate_size=256) for _ in range(2))
    run = trainer(tmp_path, ours, optim=optim)
    found = eight_bit(ours, run.create_optimizer())
    assert any("mlp" in name for name in found) and not any("embed_tokens" in name for name in found)
    if optim == "adamw_bnb_8bit":
        assert found == eight_bit(theirs, Trainer(theirs, run.args).create_optimizer())
