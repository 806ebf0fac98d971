"""The measurements against others, and of images: the small model, through the command line's own entry."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import data, generate, peers, shapes
from vlmvqa.sequence.rows import IGNORE


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def run(bench: Any, *options: str) -> dict[str, Any]:
        """What the measurement wrote."""
        out = tmp_path / "found.json"
        rows = bench.main(["--model", "tiny", "--device", "cpu", "--out", str(out), *options])
        written: dict[str, Any] = json.loads(out.read_text())
        assert written["rows"] == json.loads(json.dumps(rows))
        assert {"device", "torch", "date"} <= set(written["machine"])
        return written

    return run


def test_generate_gives_the_tokens_of_transformers_own(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(generate, "--images", "3", "--repeats", "1", "--batch", "4")
    assert found["questions"] == 16 and found["tokens_an_answer"] == 4
    same, other = found["rows"][:-1], found["rows"][-1]
    assert [row["name"] for row in same] == [
        "one at a time",
        "padded batches",
        "padded batches, encoded once",
        "shared rows",
    ]
    assert all(row["equal_answers"] == 16 and row["answers_per_second"] > 0 for row in same)
    assert all(row["times_floor"] > 1 for row in found["rows"])
    assert other["name"] == "shared rows, blockwise_prefix" and other["equal_answers"] is None
    assert same[0]["to_one_at_a_time"] == same[1]["to_padded_batches"] == 1
    assert "random weights never end one" in capsys.readouterr().out


def test_generate_ends_answers_alike_for_all(run: Any) -> None:
    found = run(generate, "--images", "3", "--repeats", "1", "--ends", "0.5", "--tokens", "6")
    assert all(row["equal_answers"] == 16 for row in found["rows"][:-1])
    assert 1 <= found["tokens_an_answer"] < 6


def test_peers_train_the_same_function_on_the_same_questions(run: Any) -> None:
    found = run(peers, "--images", "5", "--batch", "8", "--repeats", "2")
    assert found["questions"] == 24  # of 27: whole steps
    theirs, alone, shared = found["rows"]
    assert theirs["times_floor"] == pytest.approx(shared["times_floor"] * shared["ratio"])
    assert [len(row["losses"]) for row in found["rows"]] == [3, 3, 3]
    assert alone["largest_loss_difference"] < 1e-5  # through three steps of AdamW
    assert shared["largest_loss_difference"] is None
    assert theirs["ratio"] == 1 and all(row["questions_per_second"] > 0 for row in found["rows"])


def test_peers_batch_is_what_paligemmas_processor_makes() -> None:
    documents = shapes.random_documents(shapes.SHAPES["vqav2"], 2, 128)
    asked = [(document.images[0], question) for document in documents for question in document.questions]
    pixels = torch.arange(2.0).view(2, 1, 1, 1)
    batch = peers.peer_batch(asked, pixels, image_token=128, num_image_tokens=3)
    for row, (image, question) in enumerate(asked):
        ids = [128] * 3 + list(question.prompt) + list(question.answer)
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == ids and not real[len(ids) :].any()
        suffix = batch["token_type_ids"][row].bool()
        assert batch["input_ids"][row][suffix].tolist() == list(question.answer)
        assert batch["labels"][row][suffix].tolist() == list(question.answer)
        assert batch["labels"][row][~suffix].eq(IGNORE).all()
        assert batch["pixel_values"][row].item() == image


def test_peers_refuses_a_job_without_a_second_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--model", "tiny", "--device", "cpu", "--images", "3", "--batch", "16"])
    assert "more --images" in capsys.readouterr().err


def test_peers_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_accelerate(name: str, *arguments: Any, **options: Any) -> ModuleType:
        if name == "accelerate":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_accelerate)
    with pytest.raises(SystemExit, match="pip install accelerate"):
        peers.require_trainer()


@pytest.mark.slow
def test_data_counts_the_workers_that_never_starve_the_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WORKERS", (0, 1))
    rows = run(data, "--images", "8", "--repeats", "1", "--need", "1000")["rows"]
    assert [(row["size"], row["reduced"], row["workers"]) for row in rows] == [
        (size, reduced, workers) for size in (224, 448) for reduced in (False, True) for workers in (0, 1)
    ]
    for row in rows:
        one = next(r for r in rows if (r["size"], r["reduced"], r["workers"]) == (row["size"], row["reduced"], 1))
        assert row["workers_needed"] >= 1000 / one["images_per_second"] > row["workers_needed"] - 1
        assert row["reduced"] == ("mean_difference" in row)
    assert all(0 < row["mean_difference"] < 4 for row in rows if row["reduced"])


def test_data_takes_the_need_from_the_model(run: Any) -> None:
    shape = shapes.SHAPES["vqav2"]
    small, large = (data.flops_an_image(model, shape, 0) for model in ("tiny", "real"))
    # Gemma 2 2B: 6 x 2.0e9 x (257 + 62) tokens, and DINOv2-B's 6 x 8.6e7 x 257, output and attention on top.
    assert small < 1e10 and 4.0e12 < large < 5.5e12
