"""Token rows: images, each followed by its questions, with every question in its own branch.

     token      i  i  i  i | q  q  q | a  a | q  q | a  a | i  i  i  i | q  q | a |  .   .
     document   0  0  0  0   0  0  0   0  0   0  0   0  0   1  1  1  1   1  1   1   -1  -1
     branch     0  0  0  0   1  1  1   1  1   2  2   2  2   0  0  0  0   1  1   1    .   .
     role       I  I  I  I   P  P  P   A  A   P  P   A  A   I  I  I  I   P  P   A    .   .
     position   0  1  2  3   4  5  6   7  8   4  5   6  7   0  1  2  3   4  5   6    .   .

A document is an image with its questions; a row holds one or more. The positions of every branch
continue those of the image, so that a shared row computes the same as separate rows.

Labels are stored at the position that predicts them: the last prompt token has the first answer token
as its label, the last answer token has EOS. EOS is never an input, because nothing is predicted from it.

Legend: B rows, T tokens per row, N tokens per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]  # columns `[B, T]` by name, and the images

IMAGE, PROMPT, ANSWER = 0, 1, 2  # roles
PADDING = -1  # the document of a padding token
IGNORE = -100  # the label of an unsupervised position (torch's convention)
NO_IMAGE = -1  # the image_index of a text token

# Padding value of each column.
FILL = {
    "input_ids": 0,
    "image_index": NO_IMAGE,
    "document": PADDING,
    "branch": 0,
    "role": PROMPT,
    "position": 0,
    "labels": IGNORE,
    "weights": 0.0,  # weight of a label in the loss: float32, all other columns are int64
}


@dataclass(frozen=True, slots=True)
class TokenizedQuestion:
    """A question as token ids.

    Attributes:
        prompt: BOS and the question in the prompt template.
        answer: the answer with EOS; empty if the model is to generate it.
        weight: weight of each supervised token in the loss.
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
    """Columns of one row, all of length T (see the diagram above)."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in FILL})

    def __len__(self) -> int:
        """Return T."""
        return len(self.columns["input_ids"])

    def extend(self, **values: Sequence[float]) -> None:
        """Append values to every column."""
        for name in FILL:
            self.columns[name].extend(values[name])


def build_row(
    documents: Sequence[Document], num_image_tokens: int, attention_pattern: str, first_image: int = 0
) -> Row:
    """Build one row of documents.

    Args:
        documents: images with their questions.
        num_image_tokens: N.
        attention_pattern: a key of `masks.ATTENTION_PATTERNS`; under "prefix_lm" a document is a single branch.
        first_image: index in the batch of the first document's image; the other images follow it.

    Raises:
        ValueError: two questions share an image under "prefix_lm", where image tokens see the question; an image has
            no question; or a question has no prompt token.
    """
    row = Row()
    for number, document in enumerate(documents):
        if attention_pattern == "prefix_lm" and len(document.questions) > 1:
            raise ValueError(
                f"{len(document.questions)} questions share an image under prefix_lm, where the image sees its "
                "question; give each question its own row (data.questions_per_row=1) or use another attention pattern"
            )
        image = first_image + number
        if not document.questions:
            raise ValueError("an image without questions cannot be laid out in a row")
        row.extend(
            input_ids=[FILL["input_ids"]] * num_image_tokens,
            image_index=range(image * num_image_tokens, (image + 1) * num_image_tokens),
            document=[number] * num_image_tokens,
            branch=[0] * num_image_tokens,
            role=[IMAGE] * num_image_tokens,
            position=range(num_image_tokens),
            labels=[IGNORE] * num_image_tokens,
            weights=[0.0] * num_image_tokens,
        )
        for branch, question in enumerate(document.questions, start=1):
            if not question.prompt:
                raise ValueError("a question without a prompt token has no position to answer from")
            prompt, answer = len(question.prompt), max(len(question.answer) - 1, 0)
            row.extend(
                input_ids=[*question.prompt, *question.answer[:-1]],
                image_index=[NO_IMAGE] * (prompt + answer),
                document=[number] * (prompt + answer),
                branch=[0 if attention_pattern == "prefix_lm" else branch] * (prompt + answer),
                role=[PROMPT] * prompt + [ANSWER] * answer,
                position=range(num_image_tokens, num_image_tokens + prompt + answer),
                labels=[IGNORE] * (prompt - 1) + list(question.answer or [IGNORE]),
                weights=[0.0] * (prompt - 1) + [question.weight] * len(question.answer or [IGNORE]),
            )
    return row


def pad_rows(rows: Sequence[Row], multiple: int = 1, left: bool = False) -> dict[str, Tensor]:
    """Stack rows into `[B, T]` columns, padded on the right or left to the longest, rounded up to a multiple."""
    length = max(len(row) for row in rows)
    length = -(-length // multiple) * multiple

    def padded(column: list[Any], fill: float) -> list[Any]:
        padding = [fill] * (length - len(column))
        return padding + column if left else column + padding

    return {name: torch.tensor([padded(row.columns[name], fill) for row in rows]) for name, fill in FILL.items()}
