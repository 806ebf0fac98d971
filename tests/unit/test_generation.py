"""Answers against transformers' own `generate`, and the rules of stopping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.overhead import Counted
from tests import tiny
from vlmvqa.errors import InputError
from vlmvqa.models import static_cache
from vlmvqa.models.build import language_config
from vlmvqa.models.generation import beam_candidates, generate
from vlmvqa.models.interface import Generated, GenerationSettings
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import ATTENTION_PATTERNS, Document, TokenizedQuestion


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
    (ours,) = generate(vlm, rows, {tiny.EOS}, GenerationSettings(10, num_beams=beams))
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


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 3.0])
def test_the_length_penalty_is_transformers_own(length_penalty: float) -> None:
    vlm, causal_lm = both(0)
    ends = list(range(1, tiny.VOCABULARY, 6))  # beams of many lengths
    rows = tiny.batch(vlm, [tiny.without_answers(tiny.documents([1]))], tiny.images(1), multiple=1)
    (ours,) = beam_candidates(vlm, rows, ends, GenerationSettings(8, num_beams=4, length_penalty=length_penalty))
    with torch.no_grad():
        expected = causal_lm.generate(
            inputs_embeds=vlm.embed(rows),
            max_new_tokens=8,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=length_penalty,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
    ended = {0, *ends}
    assert [beam.tokens for beam in ours] == [[t for t in beam if t not in ended] for beam in expected.tolist()]


def prepared() -> tuple[VLM, dict[str, torch.Tensor]]:
    vlm = tiny.model()
    return vlm, tiny.batch(vlm, [tiny.without_answers(tiny.documents([2, 3]))], tiny.images(2))


def test_answers_end_at_eos_and_at_the_limit() -> None:
    vlm, rows = prepared()
    free = [answer.tokens for answer in generate(vlm, rows, {tiny.EOS}, GenerationSettings(6))]
    assert all(len(tokens) <= 6 for tokens in free)
    stop = next(tokens[2] for tokens in free if len(tokens) > 2)
    stopped = [answer.tokens for answer in generate(vlm, rows, {tiny.EOS, stop}, GenerationSettings(6))]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert stopped == expected
    assert all(len(a.tokens) == 1 or not a.tokens for a in generate(vlm, rows, {tiny.EOS}, GenerationSettings(1)))


def test_the_log_probability_is_the_models() -> None:
    """Scored again as a training row, the answer's tokens have the loss that generation reported."""
    vlm, rows = prepared()
    documents = tiny.documents([2, 3])
    stop = generate(vlm, rows, set(), GenerationSettings(4))[0].tokens[3]  # the first answer ends there
    found = generate(vlm, rows, {stop}, GenerationSettings(30))
    assert len(found[0].tokens) <= 3
    answers = iter(found)
    for document in documents:
        for question in document.questions:
            answer = next(answers)
            ending = [stop] if len(answer.tokens) < 30 else []  # none where the limit came first
            asked = TokenizedQuestion(question.prompt, [*answer.tokens, *ending])
            row = tiny.batch(vlm, [[Document([0], [asked])]], tiny.images(2)[document.images])
            loss = vlm(**row, num_items_in_batch=1)["loss"]
            assert answer.log_probability == pytest.approx(-loss.item(), abs=2e-3)


def test_sampling_follows_its_seed_and_its_temperature() -> None:
    vlm, rows = prepared()

    def sample(temperature: float, seed: int) -> list[list[int]]:
        return [
            a.tokens for a in generate(vlm, rows, {tiny.EOS}, GenerationSettings(6, temperature=temperature, seed=seed))
        ]

    assert sample(2.0, 0) == sample(2.0, 0) != sample(2.0, 1)
    assert sample(1e-4, 0) == [a.tokens for a in generate(vlm, rows, {tiny.EOS}, GenerationSettings(6))]


def test_generating_leaves_the_model_as_it_was() -> None:
    vlm, rows = prepared()
    for training in (True, False):
        vlm.train(training)
        generate(vlm, rows, {tiny.EOS}, GenerationSettings(2))
        assert vlm.training == training and vlm.language.attention == "dense"


def test_decodings_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="does not sample"):
        GenerationSettings(num_beams=2, temperature=1.0)
    with pytest.raises(InputError, match="at least 1"):
        GenerationSettings(max_new_tokens=0)
    with pytest.raises(InputError, match="static cache"):
        GenerationSettings(num_beams=2, static_cache=True)


def test_a_static_cache_serves_later_batches() -> None:
    """Their answers don't depend on what an earlier batch left in it; shapes and addresses stay the same."""
    vlm = tiny.model()
    decoding = GenerationSettings(6, static_cache=True)
    batches = [
        tiny.batch(vlm, [[d] for d in tiny.without_answers(tiny.documents(counts, seed))], tiny.images(3, seed))
        for seed, counts in enumerate([[2, 4, 1], [1, 1, 3], [3, 1, 1]])
    ]
    addresses = set()
    for rows in [*batches, batches[0]]:
        expected = generate(vlm, rows, {tiny.EOS}, GenerationSettings(6))
        assert [a.tokens for a in generate(vlm, rows, {tiny.EOS}, decoding)] == [a.tokens for a in expected]
        (step,) = static_cache._steps[vlm.language].values()
        addresses.add((step.cache.layers[0].keys.data_ptr(), step.ids.data_ptr()))
    assert len(addresses) == 1


def test_a_static_decode_step_needs_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph records neither values that the host reads nor copies from it."""
    monkeypatch.setattr("vlmvqa.models.language._is_readable", lambda column: False)  # as on a GPU
    vlm, rows = prepared()
    questions = static_cache.StaticQuestions(vlm, rows, 4)
    with torch.no_grad(), Counted() as counted:
        questions.decode_step._run(vlm.language)
    assert counted.operators.total() > 100 and not counted.waits


def test_replaced_weights_get_a_decode_step_of_their_own() -> None:
    """A CUDA graph reads the weights where they were when it was recorded."""
    vlm, rows = prepared()
    decoding = GenerationSettings(6, static_cache=True)
    generate(vlm, rows, {tiny.EOS}, decoding)
    weight = vlm.language.decoder.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)
    generate(vlm, rows, {tiny.EOS}, decoding)
    assert len(static_cache._steps[vlm.language]) == 2


def test_few_decode_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache, "COLUMNS", 1)
    vlm, _ = prepared()
    for length in range(2, 8):
        document = tiny.without_answers(tiny.documents([1]))
        generate(vlm, tiny.batch(vlm, [document], tiny.images(1)), [], GenerationSettings(length, static_cache=True))
    assert len(static_cache._steps[vlm.language]) == static_cache.STEPS


def test_other_families_share_in_generation() -> None:
    for family in ("llama", "qwen2"):
        vlm = tiny.model("blockwise_prefix", family)
        given = tiny.without_answers(tiny.documents([3]))
        shared = generate(vlm, tiny.batch(vlm, [given], tiny.images(1)), {tiny.EOS}, GenerationSettings(6))
        alone = generate(vlm, tiny.batch(vlm, tiny.apart(given), tiny.images(1)), {tiny.EOS}, GenerationSettings(6))
        assert [a.tokens for a in shared] == [a.tokens for a in alone]


# Which tokens end an answer, and so when: hardly ever, every fifth (rows lose questions and leave at different
# steps), nearly always (most leave after the first token, a few go on), and all at once.
ENDS = {
    "late": range(1, 2),
    "mixed": range(1, tiny.VOCABULARY, 5),
    "early": range(1, tiny.VOCABULARY - 8),
    "at once": range(tiny.VOCABULARY),
}


def asked_alone(
    vlm: VLM, flat: Sequence[Document], ends: Collection[int], decoding: GenerationSettings, keys: Sequence[int | str]
) -> list[Generated]:
    pixels = tiny.images(len(flat))
    questions = [(pixels[d.images], q) for d in flat for q in d.questions]
    return [
        generate(vlm, tiny.batch(vlm, [[Document([0], [q])]], image), ends, decoding, [key])[0]
        for (image, q), key in zip(questions, keys, strict=True)
    ]


DECODINGS = {
    "greedy": GenerationSettings(7),
    "beams": GenerationSettings(7, num_beams=3),
    "sampled": GenerationSettings(7, temperature=1.5),
    "static cache": GenerationSettings(7, static_cache=True),
}
LAYOUTS = {"one row": [[3]], "five rows": [[1], [5], [2, 4], [2], [1]]}


def cases() -> Iterator[Any]:
    """All combinations; not `long` are those with five rows in which each pair occurs once, and four with one row."""
    for (a, pattern), (b, decoding), (c, ends), layout in product(
        enumerate(ATTENTION_PATTERNS), enumerate(DECODINGS), enumerate(ENDS), LAYOUTS
    ):
        chosen = c == (a ^ b ^ (b >> 1)) and (layout == "five rows" or a == b)
        yield pytest.param(pattern, layout, ends, decoding, marks=() if chosen else pytest.mark.long)


@pytest.mark.parametrize(("attention_pattern", "layout", "ends", "decoding"), cases())
def test_a_batch_that_loses_questions_is_its_questions_alone(
    attention_pattern: str, layout: str, ends: str, decoding: str
) -> None:
    vlm, how, counts = tiny.model(attention_pattern, seed=1), DECODINGS[decoding], LAYOUTS[layout]
    if attention_pattern == "prefix_lm":
        counts = [[1] * len(row) for row in counts]
    flat = tiny.without_answers(tiny.documents([count for row in counts for count in row]))
    taken = iter(flat)
    rows = [[next(taken) for _ in row] for row in counts]
    keys = [f"question {n}" for n in range(sum(len(d.questions) for d in flat))]
    together = generate(vlm, tiny.batch(vlm, rows, tiny.images(len(flat))), ENDS[ends], how, keys)
    alone = asked_alone(vlm, flat, ENDS[ends], how, keys)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    for answer, expected in zip(together, alone, strict=True):
        assert answer.log_probability == pytest.approx(expected.log_probability, abs=1e-3)
    if ends == "mixed" and len(rows) > 1 and how.num_beams == 1:
        assert len({len(answer.tokens) for answer in together}) > 2  # they do end at different steps


@pytest.mark.parametrize("beams", [1, 2])  # with two, beams still change places after rows have left
def test_a_step_costs_what_is_still_open(beams: int) -> None:
    """As many slots as the row with most open questions has; no row once it has none and a quarter are like it."""
    vlm = tiny.model()
    counts, ends, decoding = [1, 5, 2, 4, 2, 1], range(1, 96, 2), GenerationSettings(7, num_beams=beams)
    flat = tiny.without_answers(tiny.documents(counts))
    steps: list[tuple[int, int]] = []
    hook = vlm.language.register_forward_pre_hook(lambda module, given: steps.append(tuple(given[0].shape[:2])))
    answers = generate(vlm, tiny.batch(vlm, [[d] for d in flat], tiny.images(6)), ends, decoding)
    hook.remove()
    alone = asked_alone(vlm, flat, ends, decoding, range(sum(counts)))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    if beams == 1:
        lengths = iter([len(answer.tokens) for answer in answers])
        by_row = [[next(lengths) for _ in range(count)] for count in counts]
        expected, held = [], list(range(6))
        for step in range(1, 1 + max(map(max, by_row))):
            open = [sum(length >= step for length in row) for row in by_row]
            left = [row for row in held if open[row]]
            held = left if 4 * len(left) <= 3 * len(held) else held
            expected.append((len(held), max(open)))
        assert steps[1:] == expected[:6]  # the seventh token needs no step after it
    assert steps[1:] == sorted(steps[1:], reverse=True)
    assert steps[-1][0] < steps[1][0] and steps[-1][1] < max(counts)


@pytest.mark.parametrize("attention_pattern", ["blockwise_prefix", "prefix_lm"])
def test_beam_candidates_cost_what_the_model_says(attention_pattern: str) -> None:
    """Each beam's log-probability is that of its tokens read as an answer, EOS included; the best come first."""
    vlm = tiny.model(attention_pattern)
    (document,) = tiny.without_answers(tiny.documents([1]))
    batch = tiny.batch(vlm, [[document]], tiny.images(1))
    decoding = GenerationSettings(5, num_beams=4)
    (beams,) = beam_candidates(vlm, batch, {tiny.EOS}, decoding)
    assert len({tuple(beam.tokens) for beam in beams}) == len(beams) == 4
    rates = [beam.log_probability / min(len(beam.tokens) + 1, 5) for beam in beams]
    assert rates == sorted(rates, reverse=True)
    assert beams[0] == generate(vlm, batch, {tiny.EOS}, decoding)[0]
    for beam in beams:
        answer = [*beam.tokens, tiny.EOS][:5]
        (question,) = document.questions
        read = tiny.batch(vlm, [[Document([0], [TokenizedQuestion(question.prompt, answer)])]], tiny.images(1))
        with torch.no_grad():
            loss = float(vlm(**read)["loss"])
        assert beam.log_probability == pytest.approx(-loss * len(answer), abs=1e-3)


def test_beams_that_are_done_early_cost_no_more() -> None:
    vlm, rows = prepared()
    steps: list[int] = []
    hook = vlm.language.register_forward_pre_hook(lambda module, given: steps.append(len(given[0])))
    generate(vlm, rows, range(tiny.VOCABULARY), GenerationSettings(7, num_beams=3))
    hook.remove()
    assert len(steps) == 1  # every beam ended with its first token


def test_what_is_sampled_does_not_depend_on_the_company() -> None:
    vlm = tiny.model()
    flat = tiny.without_answers(tiny.documents([2, 3, 1]))
    pixels, decoding = tiny.images(3), GenerationSettings(6, temperature=2.0)
    keys = [["a", "b"], ["c", 4, 5], ["f"]]

    def sample(order: Sequence[int]) -> dict[str | int, list[int]]:
        rows = [[Document([place], flat[n].questions)] for place, n in enumerate(order)]
        named = [key for n in order for key in keys[n]]
        batch = tiny.batch(vlm, rows, pixels[list(order)])
        return dict(zip(named, (a.tokens for a in generate(vlm, batch, {tiny.EOS}, decoding, named)), strict=True))

    assert sample([0, 1, 2]) == sample([2, 0, 1]) == sample([0]) | sample([2, 1])


def test_equal_questions_are_sampled_apart_and_as_the_model_says() -> None:
    """The same question 600 times in a row: each draws its own token, as often as it is probable."""
    vlm = tiny.model(initializer_range=0.05)
    (document,) = tiny.without_answers(tiny.documents([1]))
    rows = tiny.batch(vlm, [[Document([0], [*document.questions] * 600)]], tiny.images(1))
    drawn = Counter(a.tokens[0] for a in generate(vlm, rows, set(), GenerationSettings(1, temperature=0.5)))
    one = tiny.batch(vlm, [[document]], tiny.images(1), multiple=1)
    with torch.no_grad():
        probable = (vlm.language.logits(vlm.decode(one)[0, -1:])[0] / 0.5).softmax(-1)
    assert (probable > 0.01).sum() > 5
    for token, share in enumerate(probable.tolist()):
        assert abs(drawn[token] - 600 * share) <= 4 * (600 * share * (1 - share)) ** 0.5 + 2


def test_the_output_head_is_met_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers do not depend on how many questions are read at once."""
    vlm, rows = prepared()
    for decoding in (GenerationSettings(5), GenerationSettings(5, num_beams=2)):
        whole = generate(vlm, rows, {tiny.EOS}, decoding)
        monkeypatch.setattr("vlmvqa.models.generation.CHUNK", 2)
        pieces = generate(vlm, rows, {tiny.EOS}, decoding)
        monkeypatch.undo()
        assert [a.tokens for a in pieces] == [a.tokens for a in whole]
