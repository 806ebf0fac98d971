"""Answering a split: rows, their order, what is left out, and what does not change an answer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import tiny
from vlmvqa.config.early_checks import ANSWERING_DTYPES
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.inference.predictor import Answer, Predictor, load
from vlmvqa.models.attention import softcap_attention
from vlmvqa.models.interface import DTYPES, Generated, GenerationSettings
from vlmvqa.models.loading import answering_dtype
from vlmvqa.models.vlm import VLM

WORDS = ("what", "color", "is", "the", "big", "dog", "left", "of", "it")
VOCABULARY = 300


def examples(counts: Sequence[int] = (2, 1, 5, 3, 1, 4)) -> list[Example]:
    """Pictures with so many questions of different lengths."""
    found = []
    for n, count in enumerate(counts):
        texts = [" ".join(WORDS[(n + k) % 5 :][: 1 + (2 * n + k) % 4]) for k in range(count)]
        questions = (Question(f"{n}-{k}", text, f"{text}\n", "red") for k, text in enumerate(texts))
        found.append(Example(Image.new("RGB", (28, 28), (40 * n, 255 - 30 * n, 90)), n, tuple(questions)))
    return found


def predictor(attention_pattern: str = "blockwise_prefix", **decoding: Any) -> Predictor:
    vlm = tiny.model(attention_pattern, vocab_size=VOCABULARY)
    settings = tiny.settings(attention_pattern, vocab_size=VOCABULARY)
    images = ImageSettings(28, (0.5,) * 3, (0.5,) * 3)
    processor = Processor(train_tokenizer(examples(), VOCABULARY), images, vlm.num_image_tokens, attention_pattern)
    return Predictor(vlm, processor, "{question}\n", settings, GenerationSettings(**{"max_new_tokens": 4, **decoding}))


def assert_same(found: dict[int | str, Answer], expected: dict[int | str, Answer]) -> None:
    assert {name: answer.text for name, answer in found.items()} == {n: answer.text for n, answer in expected.items()}
    for name, answer in found.items():
        assert answer.log_probability == pytest.approx(expected[name].log_probability, abs=1e-3)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows, tokens and questions of every batch that is answered from here on."""
    seen: list[tuple[int, int, int]] = []
    generate = VLM.generate

    def watched(model: Any, batch: Any, *more: Any) -> Any:
        written = generate(model, batch, *more)
        seen.append((*batch["input_ids"].shape, len(written)))
        return written

    monkeypatch.setattr(VLM, "generate", watched)
    return seen


@pytest.mark.parametrize("decoding", [{}, {"temperature": 1.0}, {"num_beams": 2}], ids=str)
def test_answers_do_not_depend_on_the_company(decoding: dict[str, Any]) -> None:
    """Not on batches, on the order, or on the questions that share the image; they come in the order asked."""
    asked, model = examples(), predictor(**decoding)
    answers = model.answer_examples(asked)
    assert list(answers) == [question.id for example in asked for question in example.questions]
    assert len({answer.text for answer in answers.values()}) > 4
    assert_same(model.answer_examples(asked, batch_size=2), answers)
    backwards = model.answer_examples(asked[::-1])
    assert list(backwards) == [question.id for example in asked[::-1] for question in example.questions]
    assert_same(backwards, answers)
    alone = [model.answer_examples([replace(e, questions=(q,))]) for e in asked for q in e.questions]
    assert_same({name: answer for one in alone for name, answer in one.items()}, answers)


def test_rows_come_from_long_to_short(shapes: list[tuple[int, int, int]]) -> None:
    predictor().answer_examples(examples(), batch_size=2)
    assert [rows for rows, _, _ in shapes] == [2, 2, 2]
    assert [tokens for _, tokens, _ in shapes] == sorted((tokens for _, tokens, _ in shapes), reverse=True)
    assert shapes[0][1] > shapes[-1][1]


def test_an_image_with_very_many_questions_is_given_several_rows(shapes: list[tuple[int, int, int]]) -> None:
    asked, model = examples([200, 1]), predictor()
    answers = model.answer_examples(asked, row_text_tokens=64, batch_size=4)
    assert len(answers) == 201 and sum(questions for _, _, questions in shapes) == 201
    assert sum(rows for rows, _, _ in shapes) > 5
    images = model.model.num_image_tokens
    assert max(tokens for _, tokens, _ in shapes) <= images + 64 + 7  # rounded up to eights
    assert_same(model.answer_examples(asked, row_text_tokens=10**6), answers)
    assert_same(model.answer_examples(asked, row_text_tokens=1), answers)  # a question a row at least


def test_under_prefix_lm_a_question_is_a_row(shapes: list[tuple[int, int, int]]) -> None:
    predictor("prefix_lm").answer_examples(examples([3, 2]))
    assert [(rows, questions) for rows, _, questions in shapes] == [(5, 5)]


def test_an_id_that_is_asked_twice() -> None:
    asked = examples([2, 1])
    again = replace(asked[1], questions=asked[0].questions[1:])
    with pytest.raises(InputError, match=r"question 0-1 \(the last time of image 1\) is asked twice"):
        predictor().answer_examples([asked[0], again])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_or_question_is_left_out_or_stops(tmp_path: Path, workers: int) -> None:
    asked, model = examples(), predictor()
    whole = model.answer_examples(asked)
    asked[2] = replace(asked[2], image=tmp_path / "missing.jpg")
    bad = BadRecords("skip", tmp_path / "skipped.jsonl")
    answers = model.answer_examples(asked, batch_size=1, workers=workers, bad_records=bad)
    assert_same(answers, {name: answer for name, answer in whole.items() if not str(name).startswith("2-")})
    assert len(bad.listed()) == 1 and "missing.jpg" in bad.listed()[0]
    with pytest.raises(InputError, match=r"missing\.jpg"):
        model.answer_examples(asked)
    odd = replace(asked[0], questions=(Question("odd", "not in it", "a prompt of many tokens without it"),))
    short = replace(model, processor=replace(model.processor, max_text_tokens=8))
    assert list(short.answer_examples([odd, asked[1]], bad_records=BadRecords("skip"))) == ["1-0"]


@pytest.mark.parametrize(
    ("own", "source", "otherwise", "expected"),
    [
        ("q: {question}\n", "gqa", "answer en {question}\n", "gqa: {question}\n"),  # that of its training on the source
        ("q: {question}\n", "vqav2", "answer en {question}\n", "q: {question}\n"),  # the only other that it knows
        ("q: {question}\n", "coco_captions", "caption en\n", "caption en\n"),  # which has no place for a caption
        ("caption en\n", "vqav2", "answer en {question}\n", "answer en {question}\n"),
        ("describe\n", "coco_captions", "caption en\n", "describe\n"),
    ],
)
def test_a_source_is_asked_with_the_prompt_of_its_training(
    own: str, source: str, otherwise: str, expected: str
) -> None:
    model = replace(predictor(), prompt=own, prompts={"gqa": "gqa: {question}\n"})
    assert model.prompt_for(source, otherwise) == expected


def test_nothing_asked_is_nothing_answered() -> None:
    assert predictor().answer_examples([]) == {}
    assert predictor().answer_examples([replace(examples()[0], questions=())]) == {}


def test_progress_counts_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    predictor().answer_examples(examples(), progress=True)
    assert "0/16 [" in terminal.getvalue() and "questions/s" in terminal.getvalue()


def test_one_picture() -> None:
    model, picture = predictor(), examples()[0].image
    both = model.answer(picture, ["what color is it", "what"])
    assert isinstance(both, list)
    one = model.answer(picture, "what color is it")
    assert isinstance(one, Answer) and one.text == both[0].text
    with pytest.raises(InputError, match="no question is given, or one is empty"):
        model.answer(picture, ["what", " "])


def test_beam_candidates_are_the_best_beams() -> None:
    model, picture, asked = predictor(), examples()[0].image, ["what color is it", "what"]
    told = model.beam_candidates(picture, asked, most=4)
    best = replace(model, decoding=replace(model.decoding, num_beams=4)).answer(picture, asked)
    assert all(one in beams for one, beams in zip(best, told, strict=True))
    for question, beams in zip(asked, told, strict=True):
        assert len({one.text for one in beams}) == len(beams)
        alone = model.beam_candidates(picture, question, most=4)
        assert_same(dict(enumerate(alone)), dict(enumerate(beams)))


def test_beam_candidates_are_sorted_by_the_probability_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length penalty, which beams come sorted by, decides no more than which are kept."""
    beams = [Generated([40], -3.0), Generated([41], -1.0), Generated([40], -2.0)]
    monkeypatch.setattr(VLM, "beam_candidates", lambda *_: [beams])
    told = predictor().beam_candidates(examples()[0].image, "what", most=3)
    assert [one.log_probability for one in told] == [-1.0, -2.0]


def test_a_model_saved_before_reduced_decoding_sees_whole_pictures(tmp_path: Path) -> None:
    predictor().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["images"].pop("reduced")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path, "cpu").processor.images.reduced is False


@pytest.mark.parametrize(
    ("choice", "saved", "device", "gpu_has_bf16", "expected"),
    [
        ("auto", "float32", "cuda:1", True, "bfloat16"),
        ("auto", "float32", "cuda", False, "float32"),  # T4, V100
        ("auto", "float16", "cuda", True, "float16"),
        ("auto", "float32", "cpu", True, "float32"),
        ("saved", "float32", "cuda", True, "float32"),
        ("float16", "float32", "cpu", False, "float16"),
    ],
)
def test_the_data_type_that_a_model_answers_in(
    choice: str, saved: str, device: str, gpu_has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_bf16)
    assert answering_dtype(choice, saved, device) == expected


def test_an_unknown_data_type_is_refused() -> None:
    assert set(ANSWERING_DTYPES) == {"auto", "saved", *DTYPES}
    with pytest.raises(InputError, match="dtype=bf16 is unknown; use auto, saved, float32"):
        answering_dtype("bf16", "float32", "cpu")


def test_a_model_loaded_in_bfloat16_answers_nearly_as_in_float32(tmp_path: Path) -> None:
    predictor().save(tmp_path)
    full, half = load(tmp_path, "cpu"), load(tmp_path, "cpu", "bfloat16")
    assert (full.dtype, half.dtype) == ("float32", "bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    frequencies = {b.dtype for name, b in half.model.named_buffers() if "inv_freq" in name}
    assert frequencies == {torch.float32}
    expected, found = full.answer_examples(examples()), half.answer_examples(examples())
    close = [abs(found[name].log_probability - expected[name].log_probability) < 0.5 for name in expected]
    assert sum(close) > 0.7 * len(close)
    with pytest.raises(InputError, match=r"saved in float32 and loaded in bfloat16; load the model with dtype='saved'"):
        half.save(tmp_path / "again")


def test_answers_cap_their_scores_in_float32() -> None:
    """With gradients, bfloat16 scores are rounded before the cap; without, only the products are."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 64, 32, generator=generator) for heads in (4, 2, 2))
    mask = torch.zeros(2, 1, 64, 64)

    def attend(dtype: torch.dtype) -> Tensor:
        given = [tensor.to(dtype) for tensor in (query, key, value, mask)]
        found, _ = softcap_attention(torch.nn.Module().eval(), *given, scaling=1.0, softcap=50.0)
        return found.float()

    expected = attend(torch.float32)
    trained = (attend(torch.bfloat16) - expected).abs().mean()
    with torch.no_grad():
        answered = (attend(torch.bfloat16) - expected).abs().mean()
    assert answered < 0.8 * trained
