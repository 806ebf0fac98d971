"""Packing: little padding, the same number of rows every epoch, documents shuffled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from numpy.typing import NDArray

from vlmvqa.data.packing import Packing, split_questions


def vqav2(images: int) -> NDArray[np.int64]:
    """Tokens of an image with its questions: 257, and 5.4 questions of about 13 tokens (VQAv2's published mean)."""
    draw = np.random.default_rng(0)
    questions = 3 + draw.negative_binomial(1.2, 0.337, images)
    return np.array([257 + int(draw.normal(13, 2.5, asked).clip(8).astype(int).sum()) for asked in questions])


def row_lengths(packing: Packing, epoch: int) -> list[int]:
    plan = packing.plan(epoch)
    return [int(packing.lengths[plan[row]].sum()) for row in range(len(plan))]


@pytest.mark.parametrize(
    ("budget", "batch", "multiple"), [(1024, 4, 8), (2048, 1, 8), (2048, 8, 8), (4096, 4, 8), (4096, 4, 128)]
)
def test_padding_at_vqav2s_lengths_is_at_most_3_percent(budget: int, batch: int, multiple: int) -> None:
    """Padded to the longest row of the batch, rounded up as by the trainer (for FlexAttention to 128)."""
    lengths = row_lengths(Packing(vqav2(8000).tolist(), budget, seed=0), epoch=0)
    assert max(lengths) <= budget
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    laid_out = sum(len(rows) * -(-max(rows) // multiple) * multiple for rows in batches)
    assert 1 - sum(lengths) / laid_out <= 0.03


@given(
    lengths=some.lists(some.integers(1, 100), min_size=1, max_size=60),
    budget=some.one_of(some.none(), some.integers(100, 400)),
    seed=some.integers(0, 5),
)
def test_every_document_is_in_one_row_of_every_epoch(lengths: list[int], budget: int | None, seed: int) -> None:
    packing = Packing(lengths, budget, seed)
    for epoch in (0, 1, 7):
        plan = packing.plan(epoch)
        rows = [plan[row] for row in range(len(plan))]
        assert len(rows) == len(packing)
        assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
        assert all(rows)
        assert budget is None or max(row_lengths(packing, epoch)) <= budget


def test_a_plan_depends_on_seed_and_epoch_alone() -> None:
    lengths = vqav2(500).tolist()

    def order(seed: int, epoch: int) -> list[int]:
        return Packing(lengths, 2048, seed).plan(epoch).order.tolist()

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) and order(0, 3) != order(1, 3)


def test_documents_of_a_row_are_far_apart_in_the_next_epoch() -> None:
    """Documents that share a row in one epoch are as far apart in the next as two random rows (a third of all)."""
    packing = Packing(vqav2(4000).tolist(), 2048, seed=0)
    rows = np.zeros((2, 4000), dtype=int)
    for epoch in (0, 1):
        plan = packing.plan(epoch)
        rows[epoch, plan.order] = np.repeat(np.arange(len(plan)), np.diff(plan.starts))
    plan = packing.plan(0)
    pairs = np.array([(a, b) for row in range(len(plan)) for a in plan[row] for b in plan[row] if a < b])
    apart = np.abs(rows[1, pairs[:, 0]] - rows[1, pairs[:, 1]]) / len(plan)
    assert (apart == 0).mean() < 0.02
    assert apart.mean() == pytest.approx(1 / 3, abs=0.02)
    assert abs(np.corrcoef(rows[0], rows[1])[0, 1]) < 0.05


def test_questions_that_do_not_fit_continue_in_another_row() -> None:
    assert list(split_questions([5, 5, 5, 5], room=10, most=None)) == [(0, 2), (2, 4)]
    assert list(split_questions([5, 5, 5, 5, 5], room=None, most=2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(split_questions([5, 5, 5], room=None, most=None)) == [(0, 3)]
    assert list(split_questions([20, 5, 5], room=10, most=None)) == [(0, 1), (1, 3)]
    assert list(split_questions([], room=10, most=3)) == []


def test_a_document_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="101 tokens does not fit a row of 100"):
        Packing([50, 101], 100, seed=0)


@given(
    lengths=some.lists(some.integers(1, 12), min_size=1, max_size=60),
    often=some.lists(some.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), min_size=60, max_size=60),
    budget=some.one_of(some.none(), some.integers(12, 50)),
)
def test_repeats_are_how_often_an_epoch_has_a_document(
    lengths: list[int], often: list[float], budget: int | None
) -> None:
    repeats = often[: len(lengths)]
    packing = Packing(lengths, budget, 0, repeats)
    rows = len(packing)
    for epoch in range(3):
        counts = np.bincount(packing.plan(epoch).order, minlength=len(lengths))
        assert len(packing.plan(epoch)) == rows
        assert (counts >= np.floor(repeats)).all() and (counts <= np.ceil(repeats)).all()
        for one in set(repeats):  # of each part, to the rounding of one document
            mine = np.array(repeats) == one
            assert abs(counts[mine].sum() - one * mine.sum()) <= 0.5
        assert budget is None or max(row_lengths(packing, epoch), default=0) <= budget


def test_a_fraction_is_of_other_documents_each_epoch() -> None:
    packing = Packing([10] * 1000, 100, 0, [0.5] * 1000)
    seen = [set(packing.plan(epoch).order.tolist()) for epoch in range(20)]
    assert all(len(one) == 500 for one in seen)
    assert len(set.union(*seen)) > 990
    assert (
        Packing([10, 20, 30], None, 0, [1, 1, 1]).plan(3).order.tolist()
        == Packing([10, 20, 30], None, 0).plan(3).order.tolist()
    )


def padding(lengths: list[int], batch: int) -> float:
    batches = [lengths[start : start + batch] for start in range(0, len(lengths) - batch + 1, batch)]
    padded = sum(len(rows) * -(-max(rows) // 8) * 8 for rows in batches)
    return 1 - sum(map(sum, batches)) / padded


@pytest.mark.parametrize(
    ("batch", "step", "window", "most"), [(6, 240, 1, 0.04), (4, 12, 2, 0.06), (12, 12, 16, 0.06), (48, 48, 16, 0.06)]
)
def test_rows_of_similar_length_share_a_micro_batch(batch: int, step: int, window: int, most: float) -> None:
    """One image per row, at VQAv2's lengths: without grouping, 12 to 30 % of the positions are padding."""
    packing = Packing(vqav2(8000).tolist(), None, seed=0)
    plans = [packing.plan(0, step, given) for given in (0, window)]
    before, after = ([int(packing.lengths[plan[row]].sum()) for row in range(len(plan))] for plan in plans)
    assert padding(before, batch) > 0.11 and padding(after, batch) <= most


@given(
    lengths=some.lists(some.integers(1, 100), min_size=1, max_size=60),
    step=some.integers(1, 9),
    window=some.integers(1, 4),
)
def test_grouping_keeps_each_window_and_the_last_step(lengths: list[int], step: int, window: int) -> None:
    """Each document stays within its window of steps, so a window of 1 changes no step; longest rows come first."""
    packing = Packing(lengths, None, seed=0)
    plain, grouped = packing.plan(3, step, 0), packing.plan(3, step, window)
    size, rows = step * window, len(plain)
    for start in range(0, rows, size):
        inside = range(start, min(start + size, rows))
        assert sorted(plain[row][0] for row in inside) == sorted(grouped[row][0] for row in inside)
    for start in range(0, rows, step):
        tokens = [lengths[grouped[row][0]] for row in range(start, min(start + step, rows))]
        assert tokens == sorted(tokens, reverse=True)
