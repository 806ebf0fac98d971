"""Log-likelihoods of given answers: against a forward pass per answer, in shared rows, and of generated answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import pretrained
from tests.unit.test_predictor import VOCABULARY, examples, predictor
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.inference.likelihood import Likelihood, log_likelihoods
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.sequence.rows import ATTENTION_PATTERNS

ANSWERS = ("red", "left of it", "is the big dog", "color")


def answered() -> list[Example]:
    """Return examples whose questions have answers of different lengths."""
    return [
        replace(
            example,
            questions=tuple(
                replace(question, target=ANSWERS[(number + len(question.text)) % len(ANSWERS)])
                for number, question in enumerate(example.questions)
            ),
        )
        for example in examples()
    ]


def assert_same(found: dict[int | str, Likelihood], expected: dict[int | str, Likelihood]) -> None:
    assert list(found) == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert one.tokens == other.tokens
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)


@torch.no_grad()
def summed(model: Predictor, example: Example, question: Question) -> tuple[float, list[int]]:
    """Append the answer's tokens one at a time: a forward pass per token, each in a row of the question alone."""
    ids = [*model.processor.tokenizer(question.target, add_special_tokens=False)["input_ids"]]
    ids.append(model.processor.tokenizer.eos_token_id)
    total = 0.0
    for length in range(len(ids)):
        encoded = model.processor.encode(replace(example, questions=(question,)), [None])
        asked = replace(encoded.questions[0], answer=[*ids[:length], 0])  # the last token is a label, not an input
        batch = model.batch([replace(encoded, questions=[asked])])
        hidden = model.model.decode(batch)
        last = int((batch["document"][0] >= 0).sum()) - 1
        total += float(model.model.logits(hidden[0, last][None]).log_softmax(-1)[0, ids[length]])
    return total, ids


@pytest.mark.parametrize("pattern", ATTENTION_PATTERNS)
def test_it_is_the_sum_over_the_tokens(pattern: str) -> None:
    model, given = predictor(pattern), answered()
    found = log_likelihoods(model, given, batch_size=2)
    assert list(found) == [question.id for example in given for question in example.questions]
    assert len({round(one.log_probability(), 3) for one in found.values()}) > 10
    for example in given[:3]:
        for question in example.questions:
            expected, ids = summed(model, example, question)
            assert found[question.id].tokens == tuple(ids)
            assert found[question.id].log_probability() == pytest.approx(expected, abs=1e-4)
            assert found[question.id].log_probability(end=False) == sum(found[question.id].log_probabilities[:-1])


def test_of_a_conversation_only_the_last_answer_counts() -> None:
    """The answers before it are supervised in training, and given here."""
    model, (first, *others) = predictor(), answered()
    turn = replace(first.questions[0], target="blue and green")
    talked = replace(first, questions=(replace(first.questions[0], history=(turn,)), *first.questions[1:]))
    found = log_likelihoods(model, [talked, *others], batch_size=2)
    for question in talked.questions:
        expected, ids = summed(model, talked, question)
        assert found[question.id].tokens == tuple(ids)
        assert found[question.id].log_probability() == pytest.approx(expected, abs=1e-4)


def test_shared_rows_equal_separate_rows() -> None:
    model, given = predictor(), answered()
    alone = [replace(e, questions=(question,)) for e in given for question in e.questions]
    assert_same(log_likelihoods(model, alone, batch_size=1), log_likelihoods(model, given))


def test_the_best_tokens_are_a_distribution() -> None:
    example = Example(Image.new("RGB", (28, 28)), 0, (Question(0, "what", "what\n", "red"),))
    best = log_likelihoods(predictor(), [example], num_best=VOCABULARY)[0].best[0]
    values = [value for _, value in best]
    assert sum(torch.tensor(values).exp().tolist()) == pytest.approx(1, abs=1e-4)
    assert values == sorted(values, reverse=True) and len({token for token, _ in best}) == VOCABULARY


def test_the_best_first_token_is_the_one_that_generation_chooses() -> None:
    model = predictor(max_new_tokens=1)
    generated, found = model.answer_examples(examples()), log_likelihoods(model, answered())
    for name, one in found.items():
        token, log_probability = one.best[0][0]
        assert model.processor.tokenizer.decode([token]).strip() == generated[name].text
        assert log_probability == pytest.approx(generated[name].log_probability, abs=1e-4)


def test_greedy_answers() -> None:
    """Every token is the most probable one; EOS counts only if it is included."""
    one = Likelihood((5, 6, 1), (-0.1, -0.2, -0.3), (((5, -0.1),), ((6, -0.2),), ((9, -0.1),)))
    assert one.is_greedy(end=False) and not one.is_greedy()
    assert one.log_probability() == pytest.approx(-0.6) and one.log_probability(end=False) == pytest.approx(-0.3)


@pytest.mark.parametrize("family", pretrained.FAMILIES)
def test_pretrained_models(family: str, tmp_path: Path) -> None:
    """Against the library's own loss: the mean over the supervised tokens."""
    vlm, processor = pretrained.load(pretrained.save(family, tmp_path))
    settings = PretrainedSettings(str(tmp_path))
    model = Predictor(vlm.eval(), processor, "{question}", settings, GenerationSettings())
    given = pretrained.apart(pretrained.examples())
    for example in given[:3]:
        batch = processor.collate([[processor.encode(example, [example.questions[0].target])]])
        with torch.no_grad():
            output = vlm(**batch)
        found = log_likelihoods(model, [example])[example.questions[0].id]
        assert len(found.tokens) == output["supervised_tokens"]
        assert found.log_probability() == pytest.approx(-float(output["loss"] * output["supervised_tokens"]), abs=1e-3)


def test_a_bad_image_is_left_out_or_stops(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    given = [*answered()[:2], Example(broken, 9, (Question("9-0", "what", "what\n", "red"),))]
    skip = BadRecords("skip")
    assert "9-0" not in log_likelihoods(predictor(), given, bad_records=skip) and len(skip.seen) == 1
    with pytest.raises(InputError, match=r"broken\.jpg"):
        log_likelihoods(predictor(), given)


def test_a_question_without_an_answer_is_refused() -> None:
    given = [Example(Image.new("RGB", (28, 28)), 0, (Question(7, "what", "what\n"),))]
    with pytest.raises(InputError, match="question 7 has no answer to score"):
        log_likelihoods(predictor(), given)
    with pytest.raises(InputError, match="question 7: its answer is empty"):
        log_likelihoods(predictor(), [replace(given[0], questions=(Question(7, "what", "what\n", ""),))])
