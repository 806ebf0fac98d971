"""What a run trains on: every question once an epoch, weighted as asked, whatever cannot be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.unit.test_processor import ask, example, processor
from tests.unit.test_processor import tokenizer as tokenizer  # a fixture
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.data.processor import Encoded
from vlmvqa.data.train_dataset import TrainingSet
from vlmvqa.errors import InputError

COLORS = ("red", "blue", "dark red", "very dark red", "black")


def many(images: int = 12) -> list[Example]:
    """Images with 1 to 5 questions, each with an answer of its own length; the image's color tells which it is."""
    found = []
    for n in range(images):
        asked = tuple(ask(10 * n + k, f"what color is shape {k}", COLORS[(n + k) % 5]) for k in range(1 + n % 5))
        found.append(Example(Image.new("RGB", (28, 28), (20 * n, 0, 0)), n, asked))
    return found


def training_set(tokenizer: PreTrainedTokenizerFast, examples: list[Example], **options: object) -> TrainingSet:
    return TrainingSet(examples, processor(tokenizer), "most_common", 0, BadRecords(), **options)  # type: ignore[arg-type]


def supervised(rows: list[list[Encoded]]) -> Counter[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """Every question that is trained on: its image, its prompt, its answer."""
    return Counter(
        (encoded.image.sum().item(), tuple(question.prompt), tuple(question.answer))
        for row in rows
        for encoded in row
        for question in encoded.questions
        if question.answer
    )


@pytest.mark.parametrize("options", [{}, {"row_tokens": 64}, {"row_tokens": 200}, {"questions_per_row": 2}], ids=str)
def test_an_epoch_trains_on_every_question_once(tokenizer: PreTrainedTokenizerFast, options: dict[str, int]) -> None:
    """However the rows are cut, and however many a step has: the last step is filled up with nothing to learn."""
    alone = training_set(tokenizer, many(), questions_per_row=1)
    expected = supervised([alone[n] for n in range(len(alone))])
    assert set(expected.values()) == {1} and len(expected) == sum(1 + n % 5 for n in range(12))
    rows = training_set(tokenizer, many(), **options)
    for step in (1, 5, 16):
        rows.fill_steps(step)
        assert len(rows) % step == 0
        for epoch in (0, 1):
            rows.set_epoch(epoch)
            encoded = [rows[n] for n in range(len(rows))]
            assert supervised(encoded) == expected
            assert all(encoded)  # no row without an image: under fsdp every rank needs one


def test_rows_are_filled_up_to_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    make = processor(tokenizer)
    rows = training_set(tokenizer, many(), row_tokens=200)
    batch = make.collate([rows[n] for n in range(len(rows))])
    lengths = (batch["document"] >= 0).sum(1)
    assert lengths.max() <= 200 and lengths.sum() / (200 * len(rows)) > 0.8
    assert batch["document"].max() > 1


@pytest.mark.parametrize("weighting", ["token", "question_sqrt"])
def test_a_packed_epoch_is_the_same_loss_and_gradients(tokenizer: PreTrainedTokenizerFast, weighting: str) -> None:
    """As a question a row, as an image a row, and as full rows, with rows that teach nothing at the end."""
    vlm = tiny.model(vocab_size=400)
    make = replace(processor(tokenizer), num_image_tokens=vlm.vision.num_image_tokens)
    found = []
    for options in ({"questions_per_row": 1}, {}, {"row_tokens": 150}):
        rows = TrainingSet(many(), make, "most_common", 0, BadRecords(), weighting=weighting, **options)  # type: ignore[arg-type]
        rows.fill_steps(8)
        vlm.zero_grad()
        loss = vlm(**make.collate([rows[n] for n in range(len(rows))]))["loss"]
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in found[0][1].items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2), name


def test_a_question_that_no_row_can_hold_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"question 0: .*more than data\.row_tokens=10; raise it"):
        training_set(tokenizer, many(), row_tokens=10)


@pytest.mark.parametrize("weighting", ["token", "question", "question_sqrt"])
def test_what_counts_the_same(tokenizer: PreTrainedTokenizerFast, weighting: str) -> None:
    """Tokens, questions, or questions by the root of how many share an image; wherever its questions are split."""
    make, examples = processor(tokenizer), many(5)
    for options in ({}, {"questions_per_row": 2}):
        rows = training_set(tokenizer, examples, weighting=weighting, **options)
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

    def drawn(epoch: int, row_tokens: int | None = None) -> Counter[str]:
        rows = TrainingSet(examples, processor(tokenizer), "sampled", 0, BadRecords(), row_tokens=row_tokens)
        rows.set_epoch(epoch)
        questions = [one.questions[0] for n in range(len(rows)) for one in rows[n]]
        return Counter(tokenizer.decode(question.answer[:-1]) for question in questions)

    assert drawn(0) == drawn(0) == drawn(0, row_tokens=100) != drawn(1)
    assert set(drawn(0)) <= set(answers)


def test_what_cannot_be_read_stops_or_is_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """An image, or a question; a row that has nothing left teaches nothing, and the others go on as they were."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    examples = [Example(broken, 99, (ask(1, "what"),)), *many(3), example(ask(2, "why", " "), image_id=50)]
    with pytest.raises(InputError, match=r"question 2: .*data\.on_bad_record=skip"):
        TrainingSet([example(ask(2, "why", ""))], processor(tokenizer), "most_common", 0, BadRecords())
    alone = TrainingSet(examples[:1], processor(tokenizer), "most_common", 0, BadRecords())
    with pytest.raises(InputError, match=r"broken\.jpg.*data\.on_bad_record=skip"):
        alone[0]
    for row_tokens in (None, 120):
        skip = BadRecords("skip", tmp_path / f"skipped-{row_tokens}.jsonl")
        rows = TrainingSet(examples[:4], processor(tokenizer), "most_common", 0, skip, row_tokens=row_tokens)
        encoded = [rows[n] for n in range(len(rows))]
        assert all(encoded)
        assert sum(supervised(encoded).values()) == sum(len(one.questions) for one in examples[1:4])
        assert len(skip.listed()) == 1 and "broken.jpg" in skip.listed()[0]
        weights = processor(tokenizer).collate(encoded)["weights"]
        assert torch.isfinite(weights).all()
    skip = BadRecords("skip", tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="no training example could be read"):
        TrainingSet(examples[:1], processor(tokenizer), "most_common", 0, skip)[0]
    with pytest.raises(InputError, match="no training question can be used"):
        TrainingSet([example(ask(2, "why", ""))], processor(tokenizer), "most_common", 0, skip)


def test_nothing_to_train_on_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="holds no examples"):
        training_set(tokenizer, [])
    with pytest.raises(InputError, match=r"data\.target=sampeld is unknown.*sampled"):
        TrainingSet([example(ask(1, "what"))], processor(tokenizer), "sampeld", 0, BadRecords())
    with pytest.raises(InputError, match="loss_weighting=tokens is unknown"):
        training_set(tokenizer, [example(ask(1, "what"))], weighting="tokens")
