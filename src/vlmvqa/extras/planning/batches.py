"""Sizes of a planned micro-batch, and dummy batches of these sizes.

Legend: B rows, T tokens per row, H image height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from vlmvqa.errors import InputError
from vlmvqa.extras.planning import published_sizes
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM
from vlmvqa.models.interface import Model
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.sequence.rows import FILL, IGNORE, Document, TokenizedQuestion, build_row, pad_rows

Settings = ModelSettings | PretrainedSettings


@dataclass(frozen=True)
class Rows:
    """A micro-batch.

    Attributes:
        rows: Rows per GPU (`trainer.per_device_train_batch_size`).
        questions: Questions per image, on average.
        text_tokens: Tokens of a question with its answer and EOS.
        answer_tokens: Tokens of the answer and EOS.
        row_tokens: Length that rows are packed to (None: one image per row).
    """

    rows: int
    questions: float
    text_tokens: int
    answer_tokens: int = 4
    row_tokens: int | None = None

    @property
    def max_questions(self) -> int:
        """Questions per image, rounded up."""
        return max(1, ceil(self.questions))


@dataclass(frozen=True)
class RowShape:
    """Size of a row: its tokens (T), images and supervised tokens."""

    tokens: int
    images: int
    supervised: int


def row_shape(model: VLM, rows: Rows) -> RowShape:
    """Return the shape of a row with one image and its questions, laid out and padded like training data."""
    if not 0 < rows.answer_tokens < rows.text_tokens:
        raise InputError(
            f"plan.answer_tokens={rows.answer_tokens} must be fewer than the question's {rows.text_tokens} tokens"
        )
    labels = _vlm_rows(model, replace(rows, rows=1, row_tokens=None), 1)["labels"]
    return RowShape(labels.shape[1], 1, int((labels != IGNORE).sum()))


def _vlm_rows(model: VLM, rows: Rows, images_per_row: int) -> dict[str, Tensor]:
    question = TokenizedQuestion([0] * (rows.text_tokens - rows.answer_tokens), [0] * rows.answer_tokens)
    questions = rows.max_questions if rows.row_tokens is None else max(1, int(rows.questions))
    documents = [Document(image, [question] * questions) for image in range(rows.rows * images_per_row)]
    groups = [documents[row * images_per_row :][:images_per_row] for row in range(rows.rows)]
    built = [
        build_row(group, model.vision.num_image_tokens, model.attention_pattern, group[0].image) for group in groups
    ]
    return pad_rows(built, rows.row_tokens or 8)


def vlm_batch(model: VLM, rows: Rows, images_per_row: int = 1) -> dict[str, Tensor]:
    """Return a dummy batch of the planned size that a real model can train on."""
    device = next(model.parameters()).device
    size = model.vision.image_size
    pixels = torch.zeros(rows.rows * images_per_row, 3, size, size, device=device)
    columns = _vlm_rows(model, rows, images_per_row)
    return {"pixel_values": pixels, **{name: column.to(device) for name, column in columns.items()}}


def dummy_batch(model: Model, shape: RowShape, rows: int, settings: Settings | None) -> dict[str, Tensor]:
    """Return a dummy batch of `rows` rows; its values don't matter under FakeTensorMode.

    Args:
        model: The model; of a pretrained one the batch can also be trained on.
        shape: Shape of a row.
        rows: Number of rows (B).
        settings: Settings of a pretrained model.
    """
    if isinstance(model, PretrainedVLM):
        assert isinstance(settings, PretrainedSettings)
        return published_sizes.dummy_batch(model, settings, rows, shape.tokens, shape.supervised)
    dtypes = {name: torch.float32 if isinstance(fill, float) else torch.int64 for name, fill in FILL.items()}
    batch = {name: torch.zeros(rows, shape.tokens, dtype=dtype) for name, dtype in dtypes.items()}
    size = model.part("vision").module.image_size
    return {**batch, "pixel_values": torch.zeros(rows * shape.images, 3, size, size)}
