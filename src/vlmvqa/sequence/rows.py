"""Examples to token rows: one image, then under it its questions, each a branch of its own.

     token      i  i  i  i | q  q  q | a  a | q  q | a  a | i  i  i  i | q  q | a |  .   .
     document   0  0  0  0   0  0  0   0  0   0  0   0  0   1  1  1  1   1  1   1   -1  -1
     branch     0  0  0  0   1  1  1   1  1   2  2   2  2   0  0  0  0   1  1   1    .   .
     role       I  I  I  I   P  P  P   A  A   P  P   A  A   I  I  I  I   P  P   A    .   .
     position   0  1  2  3   4  5  6   7  8   4  5   6  7   0  1  2  3   4  5   6    .   .

A document is an image with its questions; a row holds one or more. Every branch counts its positions
on from the image, as if it were alone, so a shared row computes what separate rows would.

Labels stand at the position that predicts them: the last prompt token carries the first answer token,
the last answer token carries EOS. EOS itself is never an input, since nothing is predicted from it.

Legend: B rows, T tokens a row, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IMAGE, PROMPT, ANSWER = 0, 1, 2  # roles
PADDING = -1  # the document of a padding token
IGNORE = -100  # the label of an unsupervised position (torch's convention)
NO_IMAGE = -1  # the image_index of a text token

# What stands in each column where a row has ended.
FILL = {
    "input_ids": 0,
    "image_index": NO_IMAGE,
    "document": PADDING,
    "branch": 0,
    "role": PROMPT,
    "position": 0,
    "labels": IGNORE,
    "weights": 0.0,  # of a label in the loss: the one column of float32, all others are int64
}


@dataclass(frozen=True, slots=True)
class TokenizedQuestion:
    """A question as token ids; `answer` ends with EOS, or is empty where the model is to write it.

    `weight` is what each of its supervised tokens counts in the loss (`loss.py`).
    """

    prompt: Sequence[int]
    answer: Sequence[int] = ()
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Document:
    """An image and the tokenized questions that share it.

    `image` is whatever the collate function stacks: `float[3, H, H]` pixels, cached features `float[N, Dv]`, a decoded
    PIL image for a pretrained model, or an index into tensors that already exist.
    """

    image: Any
    questions: Sequence[TokenizedQuestion]


@dataclass(slots=True)
class Row:
    """Columns of one row, all of the same length T (the diagram above)."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in FILL})

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def extend(self, **values: Sequence[float]) -> None:
        for name in FILL:
            self.columns[name].extend(values[name])


def build_row(documents: Sequence[Document], image_tokens: int, mode: str, first_image: int = 0) -> Row:
    """Lay documents out in one row.

    Args:
        documents: images with their questions, in order.
        image_tokens: N, tokens an image.
        mode: the attention mode (`masks.MODES`); under "prefix_lm" a document is one single branch.
        first_image: index in the batch of the first document's image; the other images follow it.

    Raises:
        ValueError: two questions share an image under "prefix_lm", whose image tokens see the question; an
            image has no question; or a question has no token to read.
    """
    row = Row()
    for number, document in enumerate(documents):
        if mode == "prefix_lm" and len(document.questions) > 1:
            raise ValueError(
                f"{len(document.questions)} questions share an image under prefix_lm, where the image sees its "
                "question; give each question its own row (data.questions_per_row=1) or use another attention mode"
            )
        if not document.questions:
            raise ValueError("an image without questions cannot be laid out in a row")
        row.extend(
            input_ids=[FILL["input_ids"]] * image_tokens,
            image_index=range((first_image + number) * image_tokens, (first_image + number + 1) * image_tokens),
            document=[number] * image_tokens,
            branch=[0] * image_tokens,
            role=[IMAGE] * image_tokens,
            position=range(image_tokens),
            labels=[IGNORE] * image_tokens,
            weights=[0.0] * image_tokens,
        )
        for branch, question in enumerate(document.questions, start=1):
            if not question.prompt:
                raise ValueError("a question without a prompt token has no position to answer from")
            prompt, answer = len(question.prompt), max(len(question.answer) - 1, 0)
            row.extend(
                input_ids=[*question.prompt, *question.answer[:-1]],
                image_index=[NO_IMAGE] * (prompt + answer),
                document=[number] * (prompt + answer),
                branch=[0 if mode == "prefix_lm" else branch] * (prompt + answer),
                role=[PROMPT] * prompt + [ANSWER] * answer,
                position=range(image_tokens, image_tokens + prompt + answer),
                labels=[IGNORE] * (prompt - 1) + list(question.answer or [IGNORE]),
                weights=[0.0] * (prompt - 1) + [question.weight] * len(question.answer or [IGNORE]),
            )
    return row


def pad_rows(rows: Sequence[Row], multiple: int = 1, left: bool = False) -> dict[str, Tensor]:
    """Stack rows into `[B, T]` columns, padded to the longest (rounded up to a multiple), on the right or the left."""
    length = max(len(row) for row in rows)
    length = -(-length // multiple) * multiple

    def padded(column: list[Any], fill: float) -> list[Any]:
        padding = [fill] * (length - len(column))
        return padding + column if left else column + padding

    return {name: torch.tensor([padded(row.columns[name], fill) for row in rows]) for name, fill in FILL.items()}
