"""Throughput in every log record: exact counts, time shares that add up, FLOPs as PyTorch counts them."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from tests import tiny
from tests.unit.test_trainer import model, trainer
from vlmvqa.models.flops import COUNTED, count, matrix_rate
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.masks import Tokens, visible
from vlmvqa.sequence.rows import ATTENTION_PATTERNS, Document, TokenizedQuestion
from vlmvqa.training.log import (
    LinePrinter,
    ProgressBar,
    log_line,
    read_log,
    replace_progress_callbacks,
    rounded,
    short,
)
from vlmvqa.training.optimizer import set_trainable
from vlmvqa.training.throughput import PHASES, PhaseClock, ThroughputMeter

KEYS = {"questions_per_second", "supervised_tokens_per_second", "padding", "peak_memory_gib", "mfu"}


@pytest.fixture(autouse=True)
def small_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measurement of peak FLOPs, which has a test of its own."""
    monkeypatch.setattr("vlmvqa.training.throughput.matrix_rate", lambda device, dtype: 1e12)


def started(vlm: VLM, folder: Path, **arguments: Any) -> ThroughputMeter:
    meter = ThroughputMeter(vlm)
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **arguments)
    meter.on_train_begin(args, TrainerState(), TrainerControl())
    return meter


def step(meter: ThroughputMeter, vlm: VLM, batch: dict[str, Tensor]) -> None:
    """Run a micro-batch and an optimizer step like the trainer."""
    meter.begin(batch)
    loss = vlm(**batch)["loss"]
    meter.backward(loss)
    loss.backward()
    meter.on_step_end(TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())


def shared(vlm: VLM) -> dict[str, Tensor]:
    return tiny.batch(vlm, [tiny.documents([3, 1]), tiny.documents([2])], tiny.images(3))


# ---- what is counted


def test_counts_of_a_batch_by_hand(tmp_path: Path) -> None:
    """Two rows: 17 image tokens with questions of 3 + 2 and 4 + 1 tokens, and 17 with one of 2 + 1."""
    vlm = model()
    rows = [
        [Document([0], [TokenizedQuestion([5, 6, 7], [8, 9, 1]), TokenizedQuestion([5, 6, 7, 8], [9, 1])])],
        [Document([1], [TokenizedQuestion([5, 6], [7, 1])])],
    ]
    batch = tiny.batch(vlm, rows, tiny.images(2), multiple=8)
    found = dict(zip(COUNTED, count(batch).tolist(), strict=True))
    assert batch["labels"].shape == (2, 32)
    assert found["questions"] == 3 and found["supervised_tokens"] == 3 + 2 + 2
    assert found["tokens"] == (17 + 5 + 5) + (17 + 3)
    images, prompts = 2 * 17**2, 3 * (17 + 3) + 4 * (17 + 4) + 2 * (17 + 2)
    answers = (17 + 4) + (17 + 5) + (17 + 5) + (17 + 3)
    assert found["pairs"] == images + prompts + answers

    meter = started(vlm, tmp_path)
    for _ in range(2):
        step(meter, vlm, batch)
    report = meter.report()
    assert report["padding"] == rounded(100 * (1 - 47 / 64))
    assert report["supervised_tokens_per_second"] / report["questions_per_second"] == pytest.approx(7 / 3, rel=1e-2)


@pytest.mark.parametrize("window", [None, 6, 19])
@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_pairs_are_those_that_the_mask_lets_through(attention_pattern: str, window: int | None) -> None:
    vlm = tiny.model(attention_pattern)
    each = [1, 1] if attention_pattern == "prefix_lm" else [3, 2]
    documents = tiny.documents(each, tiles=[(2, 1), (1,)])
    batch = tiny.batch(vlm, [documents, [documents[1]]], tiny.images(4))
    tokens = Tokens.of(batch)
    for name, width in (("pairs", None), ("local_pairs", window)):
        seen = visible(tokens.map(lambda t: t[:, :, None]), tokens.map(lambda t: t[:, None, :]), width)
        found = dict(zip(COUNTED, count(batch, window).tolist(), strict=True))
        assert found[name] == int(seen.sum())


# ---- operations


def wide(**language: Any) -> VLM:
    """Return a model without sliding window whose vocabulary is large enough to matter in the sum."""
    return tiny.model(family="llama", hidden_size=64, intermediate_size=160, **language)


def as_pytorch_counts(vlm: VLM, batch: dict[str, Tensor]) -> int:
    for block in vlm.vision.blocks:
        block.attn.fused_attn = False  # the fused backward pass recomputes the scores, which is counted
    vlm.language.decoder.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        vlm(**batch)["loss"].backward()
    return counter.get_total_flops()


def ours(vlm: VLM, batch: dict[str, Tensor], meter: ThroughputMeter, dense: bool) -> int:
    counts = dict(zip(COUNTED, count(batch).tolist(), strict=True))
    if dense:  # eager attention multiplies all pairs of tokens, then masks
        rows, length = batch["document"].shape
        counts["pairs"] = counts["local_pairs"] = rows * length**2
    counted = vlm.flops()
    assert counted is not None and meter.shapes["images"] == len(batch["labels"])
    return counted.of({**meter.shapes, **counts})


FROZEN: dict[str, dict[str, str | int]] = {
    "nothing": {},
    "encoder": {"vision": "none"},
    "language": {"language": "none"},
    "all but the projector": {"vision": "none", "language": "none"},
    "all but the last language layer": {"vision": "none", "projector": "none", "language": 1},
    "all but the last encoder block": {"vision": 1, "projector": "none", "language": "none"},
}


# A trained encoder cannot use cached features.
CASES = [(frozen, cached) for frozen, parts in FROZEN.items() for cached in {False, parts.get("vision") == "none"}]


@pytest.mark.parametrize(("frozen", "cached"), CASES)
def test_operations_are_those_that_pytorch_counts(tmp_path: Path, frozen: str, cached: bool) -> None:
    """Without padding, and with attention counted as dense, which is what eager attention computes.

    The numbers are equal except for rotary angles that transformers computes by a matrix product.
    """
    vlm = wide(tie_word_embeddings=True)
    for part, choice in FROZEN[frozen].items():
        set_trainable(vlm.part(part), choice, part)
    document = [Document([0], [tiny.question(6, 3), tiny.question(5, 2)])]
    other = [Document([1], document[0].questions)]
    batch = tiny.batch(vlm, [document, other], tiny.images(2), multiple=1)
    assert (batch["document"] >= 0).all()
    if cached:
        batch["image_features"] = vlm.vision(batch.pop("pixel_values"))
    meter = started(vlm, tmp_path)
    meter.begin(batch)
    expected = as_pytorch_counts(vlm, batch)
    assert ours(vlm, batch, meter, dense=True) == pytest.approx(expected, rel=0.01)
    assert ours(vlm, batch, meter, dense=False) < expected


def test_an_output_head_of_its_own_counts_at_supervised_tokens_only() -> None:
    tied, untied = wide(tie_word_embeddings=True).flops(), wide(tie_word_embeddings=False).flops()
    assert tied is not None and tied == untied
    assert tied.supervised == 3 * 2 * 64 * tiny.VOCABULARY


def test_local_layers_are_counted_apart() -> None:
    alternating, local = tiny.model(family="gemma2").flops(), tiny.model(family="mistral").flops()
    assert alternating is not None and alternating.pair == alternating.local_pair == 2 * 3 * 4 * 32
    assert local is not None and local.pair == 0 and local.local_pair == 4 * 3 * 4 * 32


def test_the_devices_rate_is_measured_once() -> None:
    state = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15 and matrix_rate(torch.device("cpu"), torch.float32) == rate
    assert torch.equal(torch.get_rng_state(), state)  # measuring doesn't change the run's random numbers


# ---- time


def test_a_clock_is_in_one_phase_or_stopped() -> None:
    clock = PhaseClock(torch.device("cpu"))
    times = iter([0.0, 1.0, 3.0, 10.0, 11.0, 15.0])
    clock._now = lambda: next(times)  # type: ignore[method-assign]
    for phase in ("a", "b", None, "a", "b", "a"):
        clock.switch(phase)
    assert clock.read() == {"a": 1.0 + 1.0, "b": 2.0 + 4.0}
    assert clock.read() == {} and len(clock.marks) == 1


def phases(vlm: VLM, batch: dict[str, Tensor], folder: Path) -> list[str | None]:
    """Return the phases of a step, without repetitions."""
    meter = started(vlm, folder)
    passed: list[str | None] = []
    switch = meter.clock.switch

    def record(phase: str | None) -> None:
        passed.extend([phase] if passed[-1:] != [phase] else [])
        switch(phase)

    meter.clock.switch = record  # type: ignore[method-assign]
    step(meter, vlm, batch)
    meter.detach()
    return passed


FORWARD, BACKWARD = ["language_model", "encoder", "language_model", "loss"], ["language_model", "encoder"]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_a_step_goes_through_the_model_and_back(tmp_path: Path, cached: bool, recomputed: bool) -> None:
    """Recomputing activations in the backward pass counts as time of their part."""
    vlm = model().train()
    batch = shared(vlm)
    if cached:
        set_trainable(vlm.part("vision"), "none", "vision")
        batch["image_features"] = vlm.vision(batch.pop("pixel_values"))
    if recomputed:
        vlm.checkpoint_activations()
    assert phases(vlm, batch, tmp_path) == [*FORWARD, *BACKWARD, "optimizer", "data"]


@pytest.mark.parametrize(
    ("frozen", "backward"),
    [
        (["vision"], ["language_model", "encoder"]),  # the projector trains
        (["language"], ["language_model", "encoder"]),
        (["vision", "language"], ["language_model", "encoder"]),
        (["vision", "projector"], ["language_model"]),
    ],
)
def test_frozen_parts_have_the_time_that_they_take(tmp_path: Path, frozen: list[str], backward: list[str]) -> None:
    vlm = model()
    for part in frozen:
        set_trainable(vlm.part(part), "none", part)
    assert phases(vlm, shared(vlm), tmp_path) == [*FORWARD, *backward, "optimizer", "data"]


def test_the_time_of_each_part_is_its_own(tmp_path: Path) -> None:
    """With a fake clock that advances in the decoder's forward and the encoder's backward pass."""
    vlm = model()
    meter = started(vlm, tmp_path)
    now = [0.0]

    def takes(seconds: float) -> None:
        now[0] += seconds

    meter.clock.marks.clear()
    meter.clock._now = lambda: now[0]  # type: ignore[method-assign]
    meter.clock.switch("data")
    vlm.language.decoder.register_forward_hook(lambda *_: takes(2.0))
    vlm.vision.encoder.register_forward_hook(
        lambda _, __, features: features.register_hook(lambda _: takes(6.0)) and None
    )
    step(meter, vlm, shared(vlm))
    report = meter.report()
    assert {phase: report[f"time_{phase}"] for phase in PHASES} == {
        **dict.fromkeys(PHASES, 0.0),
        "encoder": 75.0,
        "language_model": 25.0,
    }
    assert report["questions_per_second"] == 6 / 8


def test_pauses_are_not_counted(tmp_path: Path) -> None:
    vlm = model()
    meter = started(vlm, tmp_path)
    step(meter, vlm, shared(vlm))
    before = dict(meter.clock.seconds)
    with meter.paused(), torch.no_grad():
        paused = dict(meter.clock.seconds)
        vlm(**shared(vlm))
        assert meter.clock.seconds == paused
    assert set(paused) == set(before) | {"data"} and meter.clock.phase == "data"
    meter.on_train_end(TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())
    with meter.paused():
        pass
    assert meter.clock.phase is None


def test_hooks_are_added_once_and_removed(tmp_path: Path) -> None:
    vlm = model()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.modules())

    meter = started(vlm, tmp_path)
    assert hooks() == 4
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    meter.on_train_begin(args, TrainerState(), TrainerControl())  # a second training after one that failed
    assert hooks() == 4
    meter.on_train_end(args, TrainerState(), TrainerControl())
    assert hooks() == 0


def test_no_tensor_outlives_its_step(tmp_path: Path) -> None:
    """Without the garbage collector, which would be too late on a GPU."""
    vlm = model()
    meter = started(vlm, tmp_path)
    alive: list[weakref.ref[Tensor]] = []
    vlm.language.register_forward_hook(lambda _, __, hidden: alive.append(weakref.ref(hidden)))
    vlm.projector.register_forward_hook(lambda _, __, images: alive.append(weakref.ref(images)))
    gc.disable()
    try:
        for _ in range(3):
            step(meter, vlm, shared(vlm))
        assert len(alive) == 6 and all(tensor() is None for tensor in alive)
    finally:
        gc.enable()
    assert len(meter.clock.marks) == 1


# ---- a run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(folder / "log.jsonl") if "loss" in record]


def test_every_log_line_has_the_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, model(), gradient_accumulation_steps=2, max_steps=3, save_strategy="steps")
    run.train()
    assert len(lines(tmp_path)) == 3
    for line in lines(tmp_path):
        assert KEYS | {f"time_{phase}" for phase in PHASES} <= line.keys()
        assert {key for key in line if key.startswith("time_")} == {f"time_{phase}" for phase in PHASES}
        assert sum(line[f"time_{phase}"] for phase in PHASES) == pytest.approx(100, abs=0.1)
        assert line["questions_per_second"] > 0 and 0 <= line["padding"] < 100
        assert line["peak_memory_gib"] > 0.05 and line["mfu"] > 0
        assert all(line[f"time_{phase}"] > 0 for phase in PHASES if phase != "other")
    assert run.throughput.clock.phase is None and run.throughput.hooks == []
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(printed) == 3 and all(len(line) < 100 for line in printed)
    assert re.fullmatch(r"step 2/3, [\d:]+ left: loss \S+, lr \S+, grad norm \S+, \S+ questions/s", printed[1])


@pytest.mark.parametrize("columns", [100, 80])
def test_the_bar_fits_the_terminal(
    tmp_path: Path, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))  # what tqdm reads without a terminal
    monkeypatch.setenv("LINES", "40")
    run = trainer(tmp_path, model())
    assert isinstance(run.pop_callback(PrinterCallback), LinePrinter)  # used without a bar
    run.add_callback(ProgressCallback)
    replace_progress_callbacks(run)
    assert [type(callback) for callback in run.callback_handler.callbacks].count(ProgressBar) == 1
    run.train()
    out, err = capsys.readouterr()
    bars = [piece for piece in re.split(r"[\r\n]", err) if "%|" in piece]
    assert bars and all(len(piece) < columns for piece in bars)
    assert all(len(piece.split("|")[1]) >= 8 for piece in bars)
    assert re.search(r"\| 4/4, [\d:]+ left, loss \S+, lr \S+, \S+ questions/s$", bars[-1])
    assert re.search(r"^step 4/4: loss \S+, lr \S+, grad norm \S+, \S+ questions/s$", out, re.MULTILINE)


def test_the_bar_of_a_resumed_run_starts_where_it_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the steps before would count as done in no time, and the time left would be far too short."""
    bar, state = ProgressBar(), TrainerState(global_step=900, max_steps=1000)
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerControl()
    bar.on_train_begin(args, state, control)
    state.global_step = 901
    bar.on_step_end(args, state, control)
    assert bar.training_bar is not None
    assert (bar.training_bar.initial, bar.training_bar.n) == (900, 901)
    bar.on_train_end(args, state, control)
    assert " 900/1000, " in capsys.readouterr().err


def test_a_line_stays_below_a_hundred_columns() -> None:
    state = TrainerState(global_step=123_456, max_steps=250_000)
    step = {"loss": 12.3456, "grad_norm": 123.456, "learning_rate": 9.87654e-4, "questions_per_second": 12_345}
    line = log_line({**step, "padding": 12.5, "time_data": 3.2, "mfu": 41.2, "epoch": 3.21}, state, "12:34:56")
    assert line == ("step 123,456/250,000, 12:34:56 left: loss 12.35, lr 0.000988, grad norm 123, 12,345 questions/s")
    assert len(line) < 100
    scores = {f"eval_{task}_vqa_accuracy": 61.5 for task in ("vqav2", "gqa", "docvqa", "coco_captions")}
    wrapped = log_line({**scores, "eval_mean": 61.5, "epoch": 1.0}, state).splitlines()
    assert len(wrapped) == 2 and all(len(line) < 100 for line in wrapped) and "epoch" not in wrapped[1]
    assert wrapped[0].startswith("step 123,456/250,000: eval_vqav2_vqa_accuracy 61.5, eval_gqa_vqa_accuracy 61.5")


def test_numbers_are_short() -> None:
    assert [rounded(value) for value in (0.0123456, 12.3456, 812.34, 12345.6)] == [0.01235, 12.35, 812.3, 12346]
    assert [short(value, 3) for value in (1e-5, 0.0123456, 999.4, 999.6, 12345.6, 1e20)] == [
        *("1e-05", "0.0123", "999", "1,000", "12,346", "1e+20")
    ]
    assert short(float("inf")) == "inf" and short("text") == "text"


def test_flops_of_experts_are_not_reported(tmp_path: Path) -> None:
    """It is unknown which experts a token uses."""
    vlm = model()
    vlm.language.decoder.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    assert vlm.flops() is None
    meter = started(vlm, tmp_path)
    step(meter, vlm, shared(vlm))
    assert "mfu" not in meter.report()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_clock_times_its_stream(tmp_path: Path) -> None:
    vlm = model().cuda()
    batch = {name: column.cuda() for name, column in shared(vlm).items()}
    meter = ThroughputMeter(vlm)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    meter.on_train_begin(args, TrainerState(), TrainerControl())
    for _ in range(5):
        step(meter, vlm, batch)
    report = meter.report()
    assert sum(report[f"time_{phase}"] for phase in PHASES) == pytest.approx(100, abs=0.1)
    assert all(report[f"time_{phase}"] > 0 for phase in ("encoder", "language_model", "loss"))
    events = len(meter.clock.free_events)
    for _ in range(50):
        step(meter, vlm, batch)
        meter.report()
    assert len(meter.clock.free_events) <= events + 20  # used again and again
    assert matrix_rate(torch.device("cuda"), torch.bfloat16) > 1e12
