"""The training dataset: every question once per epoch, loss weights, unreadable images, padding rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.unit.test_processor import ask, example, processor
from tests.unit.test_processor import tokenizer as tokenizer  # a fixture
from vlmvqa.data.example import Example
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.sequence.rows import Document, build_row

COLORS = ("red", "blue", "dark red", "very dark red", "black")


def many(images: int = 12) -> list[Example]:
    """Images with 1 to 5 questions and answers of different lengths; the color identifies the image."""
    found = []
    for n in range(images):
        asked = tuple(ask(10 * n + k, f"what color is shape {k}", COLORS[(n + k) % 5]) for k in range(1 + n % 5))
        found.append(Example(Image.new("RGB", (28, 28), (20 * n, 0, 0)), n, asked))
    return found


def dataset(tokenizer: PreTrainedTokenizerFast, examples: list[Example], **options: Any) -> TrainDataset:
    return TrainDataset(examples, processor(tokenizer), RowSettings(**options), BadRecords())


def supervised(rows: list[list[Document]]) -> Counter[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """Count the supervised questions by image, prompt and answer."""
    return Counter(
        (encoded.images[0].sum().item(), tuple(question.prompt), tuple(question.answer))
        for row in rows
        for encoded in row
        for question in encoded.questions
        if question.answer
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"row_tokens": 64}, {"row_tokens": 200}, {"questions_per_row": 2}, {"row_tokens": 200, "copy_images": True}],
    ids=str,
)
def test_an_epoch_trains_on_every_question_once(tokenizer: PreTrainedTokenizerFast, options: dict[str, int]) -> None:
    """For every way of packing and every step size; the last step is padded with unsupervised rows."""
    alone = dataset(tokenizer, many(), questions_per_row=1)
    expected = supervised([alone[n] for n in range(len(alone))])
    assert set(expected.values()) == {1} and len(expected) == sum(1 + n % 5 for n in range(12))
    rows = dataset(tokenizer, many(), **options)
    for step in (1, 5, 16):
        rows.set_step_rows(step)
        assert len(rows) % step == 0
        for epoch in (0, 1):
            rows.set_epoch(epoch)
            encoded = [rows[n] for n in range(len(rows))]
            assert supervised(encoded) == expected
            assert all(encoded)  # under FSDP every rank needs an image in every row


def test_copies_of_images_are_in_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each question has its own image, and the rows of every epoch are those without copies."""
    shared, copied = (dataset(tokenizer, many(), row_tokens=120, copy_images=copy) for copy in (False, True))
    for rows in (shared, copied):
        rows.set_step_rows(3)
        rows.set_epoch(1)
    assert all(len(document.questions) == 1 for n in range(len(copied)) for document in copied[n])
    assert max(len(document.questions) for n in range(len(shared)) for document in shared[n]) > 1
    assert [supervised([shared[n]]) for n in range(len(shared))] == [
        supervised([copied[n]]) for n in range(len(copied))
    ]


def test_rows_are_filled_up_to_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    make = processor(tokenizer)
    rows = dataset(tokenizer, many(), row_tokens=200)
    batch = make.collate([rows[n] for n in range(len(rows))])
    lengths = (batch["document"] >= 0).sum(1)
    assert lengths.max() <= 200 and lengths.sum() / (200 * len(rows)) > 0.8
    assert batch["document"].max() > 1


@pytest.mark.parametrize("weighting", ["token", "question_sqrt"])
def test_a_packed_epoch_is_the_same_loss_and_gradients(tokenizer: PreTrainedTokenizerFast, weighting: str) -> None:
    """With one question per row, one image per row, packed rows, copies of images; unsupervised rows at the end."""
    vlm = tiny.model(vocab_size=400)
    make = replace(processor(tokenizer), num_image_tokens=vlm.num_image_tokens)
    found = []
    for options in ({"questions_per_row": 1}, {}, {"row_tokens": 150}, {"row_tokens": 150, "copy_images": True}):
        rows = TrainDataset(many(), make, RowSettings(loss_weighting=weighting, **options), BadRecords())
        rows.set_step_rows(8)
        vlm.zero_grad()
        loss = vlm(**make.collate([rows[n] for n in range(len(rows))]))["loss"]
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in found[0][1].items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2), name


def test_several_images_count_in_the_length_of_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every planned length is that of the built row."""
    examples = [replace(one, more_images=(one.image,) * (number % 3)) for number, one in enumerate(many())]
    built, make = dataset(tokenizer, examples, row_tokens=120), processor(tokenizer)
    plan = built.packing.plan(0)
    planned = [int(built.packing.lengths[plan[row]].sum()) for row in range(len(plan))]
    rows = [build_row(built[row], make.num_image_tokens, make.attention_pattern) for row in range(len(plan))]
    assert list(map(len, rows)) == planned and max(planned) <= 120


def test_a_question_that_no_row_can_hold_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"question 0: .*more than data\.row_tokens=10; raise it"):
        dataset(tokenizer, many(), row_tokens=10)


@pytest.mark.parametrize("weighting", ["token", "question", "question_sqrt"])
def test_loss_weights_sum_to_what_the_weighting_counts(tokenizer: PreTrainedTokenizerFast, weighting: str) -> None:
    """Each weighting sums to tokens, questions, or questions by the root of their number per image, also if split."""
    make, examples = processor(tokenizer), many(5)
    for options in ({}, {"questions_per_row": 2}):
        rows = dataset(tokenizer, examples, loss_weighting=weighting, **options)
        batch = make.collate([rows[n] for n in range(len(rows))])
        assert bool((batch["weights"] != 0).eq(batch["labels"] != -100).all())
        total = batch["weights"].sum().item()
        expected = {
            "token": float((batch["labels"] != -100).sum()),
            "question": float(sum(len(one.questions) for one in examples)),
            "question_sqrt": sum(len(one.questions) ** 0.5 for one in examples),
        }
        assert total == pytest.approx(expected[weighting])


def test_sampled_targets_change_by_epoch_and_come_back(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = ("red", "blue", "green", "black", "white", "pink", "brown", "grey", "gold", "teal")
    examples = [example(ask(n, "what color is the shape", "red", answers), image_id=n) for n in range(8)]

    def sampled(epoch: int, row_tokens: int | None = None) -> Counter[str]:
        rows = dataset(tokenizer, examples, target="sampled", row_tokens=row_tokens)
        rows.set_epoch(epoch)
        questions = [one.questions[0] for n in range(len(rows)) for one in rows[n]]
        return Counter(tokenizer.decode(question.answer[:-1]) for question in questions)

    assert sampled(0) == sampled(0) == sampled(0, row_tokens=100) != sampled(1)
    assert set(sampled(0)) <= set(answers)


def test_bad_images_and_questions_are_errors_or_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Bad images and questions; a row that loses all its documents is unsupervised, and the others do not change."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    examples = [Example(broken, 99, (ask(1, "what"),)), *many(3), example(ask(2, "why", " "), image_id=50)]
    with pytest.raises(InputError, match=r"question 2: .*data\.on_bad_record=skip"):
        dataset(tokenizer, [example(ask(2, "why", ""))])
    alone = dataset(tokenizer, examples[:1])
    with pytest.raises(InputError, match=r"broken\.jpg.*data\.on_bad_record=skip"):
        alone[0]
    for row_tokens in (None, 120):
        skip = BadRecords("skip", tmp_path / f"skipped-{row_tokens}.jsonl")
        rows = TrainDataset(examples[:4], processor(tokenizer), RowSettings(row_tokens=row_tokens), skip)
        encoded = [rows[n] for n in range(len(rows))]
        assert all(encoded)
        assert sum(supervised(encoded).values()) == sum(len(one.questions) for one in examples[1:4])
        assert len(skip.listed()) == 1 and "broken.jpg" in skip.listed()[0]
        weights = processor(tokenizer).collate(encoded)["weights"]
        assert torch.isfinite(weights).all()
    skip = BadRecords("skip", tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="no training example could be read"):
        TrainDataset(examples[:1], processor(tokenizer), RowSettings(), skip)[0]
    with pytest.raises(InputError, match="no training question can be used"):
        TrainDataset([example(ask(2, "why", ""))], processor(tokenizer), RowSettings(), skip)


def test_nothing_to_train_on_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="holds no examples"):
        dataset(tokenizer, [])
    with pytest.raises(InputError, match=r"data\.target=sampeld is unknown.*sampled"):
        RowSettings(target="sampeld")
    with pytest.raises(InputError, match=r"data.length_window=-1 must be at least 0"):
        RowSettings(length_window=-1)
    with pytest.raises(InputError, match="loss_weighting=tokens is unknown"):
        dataset(tokenizer, [example(ask(1, "what"))], loss_weighting="tokens")
