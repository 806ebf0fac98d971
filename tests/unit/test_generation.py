"""Answers against transformers' own `generate`, and the rules of stopping."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny
from vlmvqa.errors import InputError
from vlmvqa.models.generation import Decoding, generate
from vlmvqa.models.language import language_config
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import Document, TokenizedQuestion


def both(seed: int, family: str = "gemma2") -> tuple[VLM, PreTrainedModel]:
    """A VLM and the transformers model it is made of (causal, window wide enough for HF's index-based cache)."""
    vlm = tiny.model("causal", family, seed=seed, sliding_window=64)
    settings = tiny.settings("causal", family, sliding_window=64).language
    causal_lm = AutoModelForCausalLM.from_config(language_config(settings)).eval()
    causal_lm.get_decoder().load_state_dict(vlm.language.decoder.state_dict())
    if vlm.language.head is not None:
        causal_lm.lm_head.load_state_dict(vlm.language.head.state_dict())
    return vlm, causal_lm


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_transformers_writes_the_same(beams: int, seed: int) -> None:
    vlm, causal_lm = both(seed)
    rows = tiny.batch(vlm, [tiny.without_answers(tiny.documents([1], seed))], tiny.images(1, seed), multiple=1)
    (ours,) = generate(vlm, rows, {tiny.EOS}, Decoding(10, beams=beams))
    with torch.no_grad():
        expected = causal_lm.generate(
            inputs_embeds=vlm.embed(rows),
            max_new_tokens=10,
            num_beams=beams,
            do_sample=False,
            eos_token_id=tiny.EOS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    written = [token for token in expected.sequences[0].tolist() if token not in (0, tiny.EOS)]
    assert ours.tokens == written
    if beams > 1:
        length = len(ours.tokens) + (tiny.EOS in expected.sequences[0].tolist())
        assert ours.log_probability / length == pytest.approx(expected.sequences_scores.item(), abs=1e-3)


def prepared() -> tuple[VLM, dict[str, torch.Tensor]]:
    vlm = tiny.model()
    return vlm, tiny.batch(vlm, [tiny.without_answers(tiny.documents([2, 3]))], tiny.images(2))


def test_answers_end_at_eos_and_at_the_limit() -> None:
    vlm, rows = prepared()
    free = [answer.tokens for answer in generate(vlm, rows, {tiny.EOS}, Decoding(6))]
    assert all(len(tokens) <= 6 for tokens in free)
    stop = next(tokens[2] for tokens in free if len(tokens) > 2)
    stopped = [answer.tokens for answer in generate(vlm, rows, {tiny.EOS, stop}, Decoding(6))]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert stopped == expected
    assert all(len(a.tokens) == 1 or not a.tokens for a in generate(vlm, rows, {tiny.EOS}, Decoding(1)))


def test_the_log_probability_is_the_models() -> None:
    """Scored again as a training row, the answer's tokens have the loss that generation reported."""
    vlm, rows = prepared()
    documents = tiny.documents([2, 3])
    answers = iter(generate(vlm, rows, {tiny.EOS}, Decoding(30)))
    for document in documents:
        for question in document.questions:
            answer = next(answers)
            if len(answer.tokens) == 30:
                continue  # cut off: EOS was not written
            asked = TokenizedQuestion(question.prompt, [*answer.tokens, tiny.EOS])
            row = tiny.batch(vlm, [[Document(0, [asked])]], tiny.images(2)[document.image][None])
            loss = vlm(**row, num_items_in_batch=1)["loss"]
            assert answer.log_probability == pytest.approx(-loss.item(), abs=2e-3)


def test_sampling_follows_its_seed_and_its_temperature() -> None:
    vlm, rows = prepared()

    def sample(temperature: float, seed: int) -> list[list[int]]:
        return [a.tokens for a in generate(vlm, rows, {tiny.EOS}, Decoding(6, temperature=temperature, seed=seed))]

    assert sample(2.0, 0) == sample(2.0, 0) != sample(2.0, 1)
    assert sample(1e-4, 0) == [a.tokens for a in generate(vlm, rows, {tiny.EOS}, Decoding(6))]


def test_generating_leaves_the_model_as_it_was() -> None:
    vlm, rows = prepared()
    vlm.train()
    generate(vlm, rows, {tiny.EOS}, Decoding(2))
    assert vlm.training and vlm.language.attention == "dense"


def test_decodings_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="does not sample"):
        Decoding(beams=2, temperature=1.0)
    with pytest.raises(InputError, match="at least 1"):
        Decoding(max_new_tokens=0)


def test_other_families_share_in_generation() -> None:
    for family in ("llama", "qwen2"):
        vlm = tiny.model("blockwise_prefix", family)
        given = tiny.without_answers(tiny.documents([3]))
        shared = generate(vlm, tiny.batch(vlm, [given], tiny.images(1)), {tiny.EOS}, Decoding(6))
        alone = generate(vlm, tiny.batch(vlm, tiny.apart(given), tiny.images(1)), {tiny.EOS}, Decoding(6))
        assert [a.tokens for a in shared] == [a.tokens for a in alone]
