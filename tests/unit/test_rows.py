"""Rows are laid out as the diagram in `sequence/rows.py` says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import tiny
from vlmvqa.sequence.rows import Document, TokenizedQuestion, build_row, pad_rows

EOS = 9


def test_the_diagram() -> None:
    first = Document([0], [TokenizedQuestion([11, 12, 13], [14, 15, EOS]), TokenizedQuestion([21, 22], [23, 24, EOS])])
    second = Document([1], [TokenizedQuestion([31, 32], [33, EOS])])
    row = build_row([first, second], 4, "blockwise_prefix").columns
    assert row["document"] == [0] * 13 + [1] * 7
    assert row["branch"] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1]
    assert row["role"] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 2, 2, 0, 0, 0, 0, 1, 1, 2]
    assert row["block"] == [0, 0, 0, 0, 1, 1, 1, -1, -1, 1, 1, -1, -1, 0, 0, 0, 0, 1, 1, -1]
    assert row["position"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6]
    assert row["input_ids"] == [0] * 4 + [11, 12, 13, 14, 15, 21, 22, 23, 24] + [0] * 4 + [31, 32, 33]
    assert row["image_index"] == [0, 1, 2, 3] + [-1] * 9 + [4, 5, 6, 7] + [-1] * 3


def test_images_and_tiles_are_segments_that_all_questions_share() -> None:
    """Two tiles of one image form a block, another image the next; then each question follows at the same position."""
    document = Document([0, 1, 2], [TokenizedQuestion([11, 12], [13, EOS]), TokenizedQuestion([21])], tiles=(2, 1))
    columns = build_row([document], 2, "blockwise_prefix", first_image=4).columns
    assert columns["image_index"] == [8, 9, 10, 11, 12, 13] + [-1] * 4
    assert columns["position"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 6]
    assert columns["block"] == [0, 0, 0, 0, 1, 1, 2, 2, -1, 2]
    assert columns["branch"] == [0] * 6 + [1, 1, 1, 2]
    blocks = {pattern: build_row([document], 2, pattern).columns["block"] for pattern in ("causal", "image_prefix")}
    assert blocks == {"causal": [-1] * 10, "image_prefix": [0, 0, 0, 0, 1, 1, -1, -1, -1, -1]}
    one = replace(document, questions=document.questions[:1])
    assert build_row([one], 2, "prefix_lm").columns["block"] == [0] * 8 + [-1]


def test_labels_stand_where_they_are_predicted() -> None:
    """Read what each supervised position predicts: answer and EOS of every question, nothing else."""
    row = build_row(tiny.documents([3, 2]), 4, "causal").columns
    predicted: dict[tuple[int, int], list[int]] = {}
    for document, branch, label in zip(row["document"], row["branch"], row["labels"], strict=True):
        if label != -100:
            predicted.setdefault((document, branch), []).append(label)
    expected = {(d.images[0], n): list(q.answer) for d in tiny.documents([3, 2]) for n, q in enumerate(d.questions, 1)}
    assert predicted == expected


def test_padding_is_nobodys() -> None:
    rows = [build_row(tiny.documents([count]), 4, "causal") for count in (1, 3)]
    columns = pad_rows(rows, multiple=8)
    assert columns["document"].shape[1] % 8 == 0
    tail = columns["document"][0, len(rows[0]) :]
    assert (tail == -1).all() and (columns["labels"][0, len(rows[0]) :] == -100).all()


def test_prefix_lm_refuses_to_share_an_image() -> None:
    with pytest.raises(ValueError, match="2 questions share an image under prefix_lm"):
        build_row(tiny.documents([2]), 4, "prefix_lm")


def test_questions_that_cannot_be_laid_out() -> None:
    with pytest.raises(ValueError, match="without a prompt token"):
        build_row([Document([0], [TokenizedQuestion([], [5, EOS])])], 4, "causal")
    with pytest.raises(ValueError, match="without questions"):
        build_row([Document([0], [])], 4, "causal")
