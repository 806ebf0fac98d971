"""Processor: supervised tokens, truncation, bad images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vlmvqa.data.eval_dataset import EvalDataset
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import BadRecords, InputError

IMAGES = ImageSettings(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TEMPLATE = "answer en {question}\n"


def ask(number: int, text: str, target: str | None = "red", answers: tuple[str, ...] = ()) -> Question:
    return Question(number, text, TEMPLATE.format(question=text), target, answers or (target or "",) * 10)


def example(*questions: Question, image_id: int = 1) -> Example:
    return Example(Image.new("RGB", (40, 30), "red"), image_id, questions)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = ["what color is the shape", "how many shapes are there", "what color is this very long question about"]
    return train_tokenizer([example(*(ask(n, text) for n, text in enumerate(texts)))], 400)


def processor(tokenizer: PreTrainedTokenizerFast, limit: int | None = None) -> Processor:
    return Processor(tokenizer, IMAGES, num_image_tokens=4, attention_pattern="blockwise_prefix", max_text_tokens=limit)


def test_only_answers_and_eos_are_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    """Decode the supervised tokens and the first prompt."""
    make = processor(tokenizer)
    questions = (ask(1, "what color is the shape", "dark red"), ask(2, "how many shapes are there", "3"))
    batch = make.collate([[make.encode(example(*questions), ["dark red", "3"])]])
    supervised = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(supervised) == "dark red<eos>3<eos>"
    first = batch["input_ids"][0][(batch["branch"][0] == 1) & (batch["role"][0] == 1)]
    assert tokenizer.decode(first) == "<bos>answer en what color is the shape\n"


def test_a_long_question_loses_its_own_tokens_only(tokenizer: PreTrainedTokenizerFast) -> None:
    """A question of 5,000 words keeps BOS, the template's end, the whole answer and all image tokens."""
    make = processor(tokenizer, limit=24)
    long = ask(1, "what color is " + "very " * 5000 + "long", "dark red")
    batch = make.collate([[make.encode(example(long), ["dark red"])]])
    assert (batch["role"][0][batch["document"][0] >= 0] == 0).sum() == 4
    prompt = tokenizer.decode(
        batch["input_ids"][0][batch["role"][0] == 1][: int((batch["document"][0] >= 0).sum()) - 4]
    )
    assert prompt.startswith("<bos>answer en what color is very very") and "\n" in prompt
    supervised = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(supervised) == "dark red<eos>"
    tokens = make.tokenize(long, "dark red")
    assert len(tokens.prompt) + len(tokens.answer) == 24


def test_an_answer_that_leaves_no_room_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"question 7: its answer has \d+ tokens"):
        processor(tokenizer, limit=8).tokenize(ask(7, "why"), "because " * 20)


def test_an_empty_answer_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="question 7: its answer is empty"):
        processor(tokenizer).tokenize(ask(7, "why"), "")


def test_any_text_survives_the_trained_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("où est-il ?", "这是什么", "🙂 emoji", "tab\there"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_bad_image_has_no_questions_to_answer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    skip = BadRecords("skip", tmp_path / "skipped.jsonl")
    examples = [Example(broken, 1, (ask(1, "what"),)), example(ask(2, "how many"), image_id=2)]
    questions = EvalDataset(examples, processor(tokenizer), skip)
    assert questions[0] is None and questions[1] is not None
    assert len(skip.listed()) == 1 and "broken.jpg" in skip.listed()[0]


def test_a_caption_that_is_too_long_is_a_bad_record_because_there_is_no_question_to_shorten(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    caption = Question("7-0", "", "caption en\n", "what color is the shape")
    with pytest.raises(InputError, match=r"question 7-0: its answer has .* tokens, which leaves none"):
        processor(tokenizer, limit=8).tokenize(caption, caption.target)
