"""Promise 2: a shared row is its questions asked alone: loss, every gradient, every generated token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from tests import tiny
from vlmvqa.models.generation import generate
from vlmvqa.models.interface import GenerationSettings
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence import masks
from vlmvqa.sequence.rows import ATTENTION_PATTERNS, SHAREABLE, Document

LAYOUTS = {
    "one question": [[1]],
    "seven questions": [[7]],
    "several images a row": [[3, 1, 2]],
    "rows of different length, padded": [[1], [7], [2, 4]],
    "tiles, and several images a question": [[3, 2], [2]],
}
TILES = {"tiles, and several images a question": [(3,), (2, 1), (1, 1)]}  # of the images of each document


def lay_out(layout: str) -> list[list[Document]]:
    rows = LAYOUTS[layout]
    flat = tiny.documents([count for row in rows for count in row], tiles=TILES.get(layout))
    taken = iter(flat)
    return [[next(taken) for _ in row] for row in rows]


def pixels_of(documents: Sequence[Document]) -> torch.Tensor:
    return tiny.images(sum(len(document.images) for document in documents))


def loss_and_gradients(vlm: VLM, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    vlm.zero_grad()
    loss = vlm(**batch)["loss"]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}


def shared_is_apart(vlm: VLM, rows: Sequence[Sequence[Document]]) -> None:
    """The same loss and gradients, to the rounding of fp32, from shared rows and from a row a question."""
    flat = [document for row in rows for document in row]
    pixels = pixels_of(flat)
    loss, gradients = loss_and_gradients(vlm, tiny.batch(vlm, rows, pixels))
    alone, expected = loss_and_gradients(vlm, tiny.batch(vlm, tiny.apart(flat), pixels))
    assert loss == pytest.approx(alone, rel=1e-6)
    assert gradients.keys() == expected.keys() == {name for name, _ in vlm.named_parameters()}
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention_pattern", SHAREABLE)
def test_loss_and_every_gradient(attention_pattern: str, layout: str) -> None:
    shared_is_apart(tiny.model(attention_pattern), lay_out(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_scores_that_nobody_may_see_are_left_out_of_nothing_else(
    attention_pattern: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients with the queries in spans are those of one span that sees all keys."""
    vlm = tiny.model(attention_pattern)
    rows = lay_out(layout)
    flat = [document for row in rows for document in row]
    rows = tiny.apart(flat) if attention_pattern == "prefix_lm" else rows
    batch = tiny.batch(vlm, rows, pixels_of(flat))
    monkeypatch.setattr(masks, "SPAN", 4)
    hidden = [keys.stop - keys.start < batch["labels"].shape[1] for _, keys in masks.key_spans(vlm.tokens(batch))]
    assert len(hidden) > 2 and any(hidden)
    loss, gradients = loss_and_gradients(vlm, batch)
    monkeypatch.setattr(type(vlm.language), "_spans", lambda *_: {})
    expected_loss, expected = loss_and_gradients(vlm, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("beams", "attention_pattern", "layout"),
    [
        *((1, pattern, layout) for pattern in SHAREABLE for layout in LAYOUTS),
        *((3, pattern, layout) for pattern, layout in zip(cycle(SHAREABLE), LAYOUTS, strict=False)),
    ],
)
def test_every_generated_token(attention_pattern: str, layout: str, beams: int) -> None:
    vlm, decoding = tiny.model(attention_pattern), GenerationSettings(12 if beams == 1 else 8, num_beams=beams)
    rows = [tiny.without_answers(row) for row in lay_out(layout)]
    flat = [document for row in rows for document in row]
    pixels = pixels_of(flat)
    shared = generate(vlm, tiny.batch(vlm, rows, pixels), {tiny.EOS}, decoding)
    one_by_one = [
        generate(
            vlm, tiny.batch(vlm, [[replace(q, images=range(len(q.images)))]], pixels[q.images]), {tiny.EOS}, decoding
        )
        for row in tiny.apart(flat)
        for q in row
    ]
    assert [answer.tokens for answer in shared] == [answers[0].tokens for answers in one_by_one]
    for answer, (alone,) in zip(shared, one_by_one, strict=True):
        assert answer.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
    assert len({tuple(answer.tokens) for answer in shared}) > len(shared) // 2  # they are not all the same


def test_the_loss_of_prefix_lm_would_differ() -> None:
    """Why prefix_lm may not share: its image tokens see the question."""
    vlm = tiny.model("prefix_lm")
    rows = tiny.apart(tiny.documents([2]))
    pixels = tiny.images(1)
    with torch.no_grad():
        first, second = (vlm.decode(tiny.batch(vlm, [row], pixels))[0, : vlm.num_image_tokens] for row in rows)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "mistral"])
def test_other_families_share_too(family: str) -> None:
    shared_is_apart(tiny.model("blockwise_prefix", family), lay_out("several images a row"))
