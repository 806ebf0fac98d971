"""The measurements: every row of a table computes the same, and every script runs and writes what it printed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import clock, ladder, loss, models, overhead, scaling, shapes, tables, train
from vlmvqa.sequence.rows import Document, TokenizedQuestion

# What a measurement must do without.
HEAVY = ("hydra", "omegaconf", "datasets", "accelerate", "pandas", "deepspeed", "matplotlib", "vlmvqa.training")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is measured in a test of its own."""
    monkeypatch.setattr(clock, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(clock, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(train, "TURN", 0.0)


def job(shape: str = "vqav2", attention_pattern: str = "causal", images: int = 3) -> ladder.Job:
    model = models.build_model("tiny", shapes.SHAPES[shape], attention_pattern=attention_pattern)
    documents = shapes.random_documents(shapes.SHAPES[shape], images, models.vocabulary(model))
    return ladder.Job(model, documents, models.random_pixels(model, images), 6, False)


def run(main: Callable[[Sequence[str]], int], out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["--model", "tiny", "--repeats", "1", "--device", "cpu", "--out", str(out), *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    assert {"benchmark", "arguments", "machine", "rows"} <= set(found)
    assert {"device", "dtype", "date", "torch", "transformers", "timm", "matrix_flops_per_second"} <= set(
        found["machine"]
    )
    return found


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "questions"), [("vqav2", 5.36), ("gqa", 13.1), ("docvqa", 3.9), ("coco", 5)])
def test_a_few_images_have_the_published_mean_of_questions(name: str, questions: float) -> None:
    shape = shapes.SHAPES[name]
    for images in (8, 1000):
        drawn = shapes.random_documents(shape, images, 1000, seed=images)
        assert shapes.questions_in(drawn) == round(questions * images)
        lengths = [len(d.questions) for d in drawn]
        assert shape.questions.low <= min(lengths) and max(lengths) <= shape.questions.high


def test_drawing_is_repeatable_and_within_the_vocabulary() -> None:
    first, again, other = (shapes.random_documents(shapes.SHAPES["gqa"], 4, 100, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(q.answer[-1] == shapes.EOS for d in first for q in d.questions)
    assert max(i for d in first for q in d.questions for i in (*q.prompt, *q.answer)) < 100


def test_captions_of_an_image_answer_one_prompt() -> None:
    documents = shapes.random_documents(shapes.SHAPES["coco"], 2, 100)
    assert len({tuple(q.prompt) for d in documents for q in d.questions}) == 1


@pytest.mark.parametrize(("name", "tokens"), [("vqav2", 257), ("docvqa", 1024)])
def test_image_tokens(name: str, tokens: int) -> None:
    assert shapes.SHAPES[name].num_image_tokens == tokens


# --- every row of the ladder ---------------------------------------------------------------------------------------


def gradients(job: ladder.Job, rung: ladder.Rung) -> tuple[float, dict[str, Tensor]]:
    with rung.enabled(job.model):
        found = train.train(job, rung, [rung.collate(rows) for rows in rung.micro_batches])
    return found, {name: p.grad.clone() for name, p in job.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention_pattern", ["causal", "blockwise_prefix"])
@pytest.mark.parametrize("shape", ["vqav2", "gqa", "docvqa", "coco"])
def test_every_row_has_the_recipes_loss_and_gradients(shape: str, attention_pattern: str) -> None:
    made = job(shape, attention_pattern)
    recipe, *others = [rung for rung in ladder.rungs(made) if not rung.skipped]
    expected_loss, expected = gradients(made, recipe)
    assert set(expected) == {name for name, _ in made.model.named_parameters()}
    for rung in others:
        total, found = gradients(made, rung)
        assert total == pytest.approx(expected_loss, abs=1e-5), rung.name
        trained = {name for name in expected if rung.trains_encoder or not name.startswith("vision.")}
        assert set(found) == trained, rung.name
        for name in trained:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=f"{rung.name}: {name}")


def test_every_row_asks_every_question_once() -> None:
    made = job("gqa")
    asked = sorted((d.images[0], tuple(q.prompt)) for d in made.documents for q in d.questions)
    for rung in ladder.rungs(made):
        rows = [row for rows in rung.micro_batches for row in rows]
        found = sorted((d.images[0], tuple(q.prompt)) for row in rows for d in row for q in d.questions)
        assert found == asked, rung.name


def test_the_layouts_are_what_the_table_says() -> None:
    made = job()
    rungs = {rung.name: rung for rung in ladder.rungs(made)}
    recipe, dynamic = (rungs[name] for name in ("recipe", "dynamic padding"))
    num_image_tokens = made.model.num_image_tokens
    for rung in (recipe, dynamic):
        assert {len(rows) for rows in rung.micro_batches[:-1]} == {6}
        assert all(len(d.questions) == len(row) == 1 for rows in rung.micro_batches for row in rows for d in row)
    assert {recipe.collate(rows)["input_ids"].shape[1] for rows in recipe.micro_batches} == {num_image_tokens + 64}
    assert max(dynamic.collate(rows)["input_ids"].shape[1] for rows in dynamic.micro_batches) < num_image_tokens + 64
    assert any(len(row) > 1 for rows in rungs["+ packing"].micro_batches for row in rows)
    assert sum(len(rows) for rows in rungs["+ sharing"].micro_batches) == len(made.documents)
    # A question's image is there again for each question, until questions share it.
    encoded = {
        name: sum(len(rung.collate(rows)["pixel_values"]) for rows in rung.micro_batches)
        for name, rung in rungs.items()
        if name != "+ cached features"
    }
    assert encoded["recipe"] == encoded["+ packing"] == shapes.questions_in(made.documents)
    assert encoded["+ sharing"] == len(made.documents)


@pytest.mark.parametrize("images", [1, 6, 7, 20])
def test_micro_batches_have_no_more_rows_than_the_recipes(images: int) -> None:
    rungs = {rung.name: rung for rung in ladder.rungs(job(images=images))}
    sizes = [len(rows) for rows in rungs["+ sharing"].micro_batches]
    assert sum(sizes) == images and max(sizes) <= 6 and max(sizes) - min(sizes) <= 1
    assert all(rungs["+ packing"].micro_batches)


def test_settings_are_undone() -> None:
    model = job().model
    for setting in (ladder.eager, ladder.flex, ladder.compiled, ladder.frozen_encoder):
        with setting(model):
            pass
    assert model.language.attention == "dense"
    assert model.language.decoder.config._attn_implementation == "softcap"
    assert all(block._compiled_call_impl is None for block in model.vision.blocks)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- the floor and the clocks --------------------------------------------------------------------------------------


def test_needed_operations_of_a_batch_worked_out_by_hand() -> None:
    """An image of 17 tokens with two questions of 3 prompt and 2 answer tokens, of which the last is only a label."""
    model = models.build_model("tiny", shapes.SHAPES["vqav2"])
    question = TokenizedQuestion([shapes.BOS, 5, 6], [7, shapes.EOS])
    rows, pixels = [[Document([0], [question, question])]], models.random_pixels(model, 1)
    pairs = sum(range(1, 18)) + 2 * (18 + 19 + 20 + 21)  # each token sees the image and its own question, up to itself
    attention, ffn = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 64
    decoder = 6 * (17 + 2 * 4) * 2 * (attention + ffn) + 2 * 12 * 32 * pairs
    output = 6 * 128 * 32 * 4
    patches = 4 * 16 * (3 * 56 * 56 * 16)  # 4, not 6: pixels get no gradient
    encoder = patches + 2 * (6 * 17 * (4 * 16 * 16 + 2 * 16 * 64) + 12 * 16 * 17**2)
    projector = 17 * 16 * 32

    batch = models.make_batch(model, rows, pixels)
    assert models.needed_flops(model, batch) == encoder + 6 * projector + decoder + output
    cached = models.make_batch(model, rows, pixels, features=torch.zeros(1, 17, 16))
    with ladder.frozen_encoder(model):
        assert models.needed_flops(model, cached) == 4 * projector + decoder + output


def test_rows_that_encode_the_same_images_need_the_same_operations() -> None:
    made = job()
    needed = {rung.name: train.flops(made, rung) for rung in ladder.rungs(made)}
    assert needed["recipe"] == needed["dynamic padding"] == needed["+ supervised only"] == needed["+ packing"]
    assert needed["+ sharing"] == needed["+ FlexAttention"] == needed["+ compile"] < needed["recipe"]
    assert needed["+ cached features"] < needed["+ sharing"]


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = tables.machine("cpu", torch.float32)
    assert found["matrix_flops_per_second"] > 1e8 and found["bytes_per_second"] > 1e7
    assert found["torch"] in tables.describe(found)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_what_has_gone_again() -> None:
    found = clock.measure(lambda: torch.ones(50 * 2**20).sum().item(), torch.device("cpu"))
    assert found.peak is not None and 190 * 2**20 < found.peak < 260 * 2**20
    assert found.result == 50 * 2**20


def test_a_table_is_markdown() -> None:
    lines = tables.table(["", "seconds"], [["a", "1.0"], ["bb", "22.0"]]).splitlines()
    assert lines == ["|    | seconds |", "|----|--------:|", "| a  |     1.0 |", "| bb |    22.0 |"]


# --- the scripts ---------------------------------------------------------------------------------------------------


def test_train_prints_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(train.main, tmp_path / "train.json", "--images", "3")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "recipe",
        "dynamic padding",
        "+ supervised only",
        "+ our attention",
        "+ packing",
        "+ sharing",
        "+ FlexAttention",
        "+ compile",
        "+ cached features",
    ]
    keys = {"questions_per_second", "ratio_to_recipe", "ratio_to_supervised", "peak_bytes", "loss", "loss_difference"}
    assert keys | {"of_matrix_rate", "times_floor"} <= set(rows["+ sharing"])
    assert "no backward on CPU" in rows["+ FlexAttention"]["skipped"] and "seconds" not in rows["+ FlexAttention"]
    assert not rows["+ cached features"]["trains_encoder"]
    printed = capsys.readouterr().out
    assert all(f"| {name}" in printed for name in rows)
    assert "best row that trains everything" in printed and "cached" not in printed.split("best row")[1]


def test_another_loss_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = ladder.rungs

    def off(made: ladder.Job) -> list[ladder.Rung]:
        *others, last = rungs(made)
        return [*others, replace(last, loss=lambda batch: last.loss(batch) * 1.001)]

    monkeypatch.setattr(ladder, "rungs", off)
    arguments = ["--model", "tiny", "--repeats", "1", "--device", "cpu", "--images", "2"]
    assert train.main([*arguments, "--out", str(tmp_path / "train.json")]) == 1


def test_loss_prints_and_writes_its_table(tmp_path: Path) -> None:
    found = run(loss.main, tmp_path / "loss.json")
    full, ours = found["rows"]
    assert abs(ours["loss_difference"]) < 1e-5 and ours["gradient_difference"] < 1e-5
    assert full["times_less_memory"] in (1.0, None)
    assert {"seconds", "peak_bytes", "peak_with_matrix_gradient_bytes", "times_faster"} <= set(ours)
    if full["peak_bytes"]:
        assert ours["peak_bytes"] * 10 < full["peak_bytes"]


def test_the_vocabulary_shrinks_to_the_memory_that_is_free() -> None:
    assert loss.fitting(4_000, 10, "cpu") == 4_000
    if Path("/proc/meminfo").is_file():
        assert loss.fitting(2**40, 10, "cpu") < 2**40


@pytest.mark.slow
def test_overhead_counts_waits_operators_and_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    assert overhead.main(["--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["waits of a micro-batch"] == 1
    assert 3000 > found["operators of two block masks"] > 50 and found["operators of a decode step"] > 500
    assert all(0 < found[name] <= 6.2 for name in found if "length_window=16" in name)
    assert found["padding at 4 x 3, length_window=1, %"] <= 6.2 < 11 < found["padding at 4 x 3, length_window=0, %"]
    assert overhead.main(["--out", str(tmp_path / "again.json"), "--before", str(out)]) == 0
    assert "| waits of a micro-batch | 1 | 1 |" in capsys.readouterr().out


@pytest.mark.slow
def test_scaling_prints_and_writes_its_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(scaling.main, tmp_path / "scaling.json")
    printed = capsys.readouterr().out
    by_series = {name: [row for row in found["rows"] if row["series"] == name] for name in scaling.SERIES}
    for name, (values, _) in scaling.SERIES.items():
        rows = by_series[name]
        assert [row["value"] for row in rows] == list(values)
        growth = [row["expected_growth"] for row in rows]
        assert growth[0] == 1 and growth == sorted(growth)
        assert f"| {scaling.NAMES[name]}" in printed
    # The point of sharing: sixteen questions cost far less than sixteen times one.
    assert by_series["questions"][-1]["expected_growth"] < 8
    assert by_series["images"][-1]["expected_growth"] == pytest.approx(8)


@pytest.mark.slow
def test_measurements_need_no_other_package(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); from bench import loss, scaling, train; "
        "train.TURN = 0; "
        f"sys.exit(train.main(['--model', 'tiny', '--device', 'cpu', '--repeats', '1', '--images', '1', "
        f"'--out', {str(tmp_path / 'train.json')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
