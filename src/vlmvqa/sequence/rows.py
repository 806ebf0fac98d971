"""Token rows: images, each followed by its questions, with every question in its own branch.

     token      i  i  i  i | q  q  q | a  a | q  q | a  a | i  i  i  i | q  q | a |  .   .
     document   0  0  0  0   0  0  0   0  0   0  0   0  0   1  1  1  1   1  1   1   -1  -1
     branch     0  0  0  0   1  1  1   1  1   2  2   2  2   0  0  0  0   1  1   1    .   .
     role       I  I  I  I   P  P  P   A  A   P  P   A  A   I  I  I  I   P  P   A    .   .
     block      0  0  0  0   1  1  1  -1 -1   1  1  -1 -1   0  0  0  0   1  1  -1   -1  -1
     position   0  1  2  3   4  5  6   7  8   4  5   6  7   0  1  2  3   4  5   6    .   .

A document is an image, or several images or tiles in order, with its questions; a row holds one or more. The positions
of every branch continue those of the images, so that a shared row computes the same as separate rows. A conversation
is one branch: its turns follow each other, each prompt a block of its own.

Labels are stored at the position that predicts them: the last prompt token has the first answer token as its label, the
last answer token has EOS, which is an input only where another turn follows.

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
NONE = -1  # the block of a token that attends causally
IGNORE = -100  # the label of an unsupervised position (torch's convention)
NO_IMAGE = -1  # the image_index of a text token

# Attention pattern -> its bidirectional blocks, whose tokens see each other both ways: each image, each question, or
# images and question together ("prefix"). `build_row` numbers them; all other tokens are causal.
ATTENTION_PATTERNS: dict[str, tuple[str, ...]] = {
    "causal": (),
    "image_prefix": ("image",),
    "blockwise_prefix": ("image", "question"),
    "prefix_lm": ("prefix",),  # PaliGemma's: the image sees the question, so no two questions may share it
}
SHAREABLE = ("causal", "image_prefix", "blockwise_prefix")

# Padding value of each column.
FILL = {
    "input_ids": 0,
    "image_index": NO_IMAGE,
    "document": PADDING,
    "branch": 0,
    "role": PROMPT,
    "block": NONE,
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
        earlier: the turns of the conversation before this one; supervised if this one has an answer.
    """

    prompt: Sequence[int]
    answer: Sequence[int] = ()
    weight: float = 1.0
    earlier: Sequence[TokenizedQuestion] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Images and the tokenized questions that share them.

    Attributes:
        images: images or tiles, as the collate function stacks them (`float[3, H, H]` pixels, cached features
            `float[N, Dv]`, a pretrained model's PIL images), or indices into tensors that already exist.
        tiles: number of consecutive `images` in each block, such as the tiles of an image; empty: 1 in each.
        kept: the tokens of each image that are in the row (none for text-only questions); empty: all N.
    """

    images: Sequence[Any]
    questions: Sequence[TokenizedQuestion]
    tiles: Sequence[int] = ()
    kept: Sequence[Sequence[int]] = ()


@dataclass(slots=True)
class Row:
    """Columns of one row, all of length T (see the diagram above)."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in FILL})

    def __len__(self) -> int:
        """Return T."""
        return len(self.columns["input_ids"])

    def extend(self, length: int, **values: float | Sequence[float]) -> None:
        """Append tokens; a number is repeated for each, and a column that is not given gets its padding value."""
        for name, fill in FILL.items():
            value = values.get(name, fill)
            self.columns[name].extend(value if isinstance(value, Sequence) else [value] * length)


def build_row(
    documents: Sequence[Document], num_image_tokens: int, attention_pattern: str, first_image: int = 0
) -> Row:
    """Build one row of documents.

    Args:
        documents: images with their questions.
        num_image_tokens: N.
        attention_pattern: a key of `ATTENTION_PATTERNS`; under "prefix_lm" a document is a single branch.
        first_image: index in the batch of the first document's first image; the other images follow it.

    Raises:
        ValueError: two questions share an image under "prefix_lm", an image has no question, or a question no prompt.
    """
    row, blocks = Row(), ATTENTION_PATTERNS[attention_pattern]
    one_branch, features = "prefix" in blocks, first_image * num_image_tokens
    for number, document in enumerate(documents):
        if one_branch and len(document.questions) > 1:
            count = len(document.questions)
            raise ValueError(f"{count} questions share an image under {attention_pattern}; give each its own row")
        if not document.questions:
            raise ValueError("an image without questions cannot be laid out in a row")
        start, tiles = 0, document.tiles or [1] * len(document.images)
        kept = iter(document.kept or [range(num_image_tokens)] * len(document.images))
        for block, count in enumerate(tiles):
            index = [features + n * num_image_tokens + token for n in range(count) for token in next(kept)]
            own, place = 0 if one_branch else block if "image" in blocks else NONE, range(start, start + len(index))
            row.extend(len(index), image_index=index, document=number, role=IMAGE, block=own, position=place)
            start += len(index)
            features += count * num_image_tokens
        for branch, question in enumerate(document.questions, start=1):
            position = start
            for turn, part in enumerate((*question.earlier, question)):
                if not part.prompt:
                    raise ValueError("a question without a prompt token has no position to answer from")
                prompt, inputs = len(part.prompt), part.answer[:-1] if part is question else part.answer
                length, labels = prompt + len(inputs), list(part.answer if question.answer else ())
                block = turn if one_branch else len(tiles) + turn if "question" in blocks else NONE
                row.extend(
                    length,
                    input_ids=[*part.prompt, *inputs],
                    document=number,
                    branch=0 if one_branch else branch,
                    role=[PROMPT] * prompt + [ANSWER] * len(inputs),
                    block=[block] * prompt + [NONE] * len(inputs),
                    position=range(position, position + length),
                    labels=([IGNORE] * (prompt - 1) + labels + [IGNORE] * length)[:length],
                    weights=([0.0] * (prompt - 1) + [question.weight] * len(labels) + [0.0] * length)[:length],
                )
                position += length
    return row


def pad_rows(rows: Sequence[Row], multiple: int = 1, left: bool = False) -> dict[str, Tensor]:
    """Stack rows into `[B, T]` columns, padded on the right or left to the longest, rounded up to a multiple."""
    length = max(len(row) for row in rows)
    length = -(-length // multiple) * multiple

    def padded(column: list[Any], fill: float) -> list[Any]:
        padding = [fill] * (length - len(column))
        return padding + column if left else column + padding

    return {name: torch.tensor([padded(row.columns[name], fill) for row in rows]) for name, fill in FILL.items()}
