"""Sizes of a planned micro-batch, and dummy batches of these sizes.

Legend: B rows, T tokens per row, I images, P crops per image (the encoder's inputs), H image height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from vlmvqa.extras.planning.published_sizes import Settings, known_config
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.models.build import fused_settings
from vlmvqa.sequence.masks import BLOCK, Tokens, block_mask
from vlmvqa.sequence.rows import FILL, IGNORE, Document, TokenizedQuestion, build_row, pad_rows

SPLIT_CROPS = 5  # crops of a split image: four quarters and the full image


@dataclass(frozen=True)
class Rows:
    """A micro-batch.

    Attributes:
        questions: Questions per image, on average.
        text_tokens: Tokens of a question with its answer and EOS.
        answer_tokens: Tokens of the answer and EOS.
        row_tokens: Length that rows are packed to (None: one image per row).
        mean_text_tokens: Mean of `text_tokens`, which is then a maximum (None: all texts have it). Memory is planned
            for the maximum, time for the mean and its padding.
        tiles: Inputs of the encoder per image: with `data.tiles` the most tiles and the thumbnail.
    """

    rows: int
    questions: float
    text_tokens: int
    answer_tokens: int = 4
    row_tokens: int | None = None
    mean_text_tokens: float | None = None
    tiles: int = 1

    @property
    def max_questions(self) -> int:
        """Questions per image, rounded up."""
        return ceil(self.questions)


@dataclass(frozen=True)
class RowShape:
    """Size of a row: its tokens (T), images (all tiles) and supervised tokens."""

    tokens: int
    images: int
    supervised: int


def crops_per_image(settings: Settings) -> int:
    """Return the number of crops per image (P); Idefics2 was published with splitting on."""
    if not isinstance(settings, PretrainedSettings) or known_config(settings).model_type != "idefics2":
        return 1
    split = settings.weights == "hub" if settings.image_splitting is None else settings.image_splitting
    return SPLIT_CROPS if split else 1


def num_image_tokens(settings: PretrainedSettings) -> int:
    """Return the number of tokens of an image in the decoder's row."""
    config = known_config(settings)
    if config.model_type == "idefics2":
        latents: int = config.perceiver_config.resampler_n_latents
        return crops_per_image(settings) * latents
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def computed_blocks(rows: Rows, images: int, image_tokens: int, attention_pattern: str) -> float:
    """Return the share of a row's blocks of `masks.BLOCK` tokens squared that FlexAttention computes."""
    question = TokenizedQuestion([0] * (rows.text_tokens - rows.answer_tokens), [0] * rows.answer_tokens)
    documents = [Document([number], [question] * round(rows.questions)) for number in range(images)]
    batch = pad_rows([build_row(documents, image_tokens, attention_pattern, 0)], BLOCK)
    blocks = block_mask(Tokens.of(batch))
    assert blocks.full_kv_num_blocks is not None
    seen = int((blocks.kv_num_blocks + blocks.full_kv_num_blocks).sum())
    return min(1.0, seen / ceil((rows.row_tokens or batch["document"].shape[1]) / BLOCK) ** 2)


def dummy_batch(settings: Settings, shape: RowShape, rows: int) -> dict[str, Tensor]:
    """Return a batch that a model can train on, with the columns of its processor's `collate`.

    Images have the maximal size: `[I, 3, H, H]`, for Idefics2 `[B, P, 3, H, H]` with a mask.
    """
    ids = torch.zeros(rows, shape.tokens, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -shape.supervised :] = 0
    if not isinstance(settings, PretrainedSettings):
        columns = {name: torch.zeros_like(ids) for name in FILL}
        encoders = fused_settings(settings.vision)
        side = max(one.image_size for one in encoders)
        images = torch.ones(rows * shape.images, 3 * len(encoders), side, side)
        return {**columns, "labels": labels, "weights": torch.ones(rows, shape.tokens), "pixel_values": images}
    config = known_config(settings)
    ids[:, : num_image_tokens(settings)] = config.image_token_id
    not_padding = torch.ones_like(ids)
    not_padding[:, 0] = 0
    columns = {"input_ids": ids, "labels": labels, "attention_mask": not_padding}
    side, crops = config.vision_config.image_size, crops_per_image(settings)
    if config.model_type == "paligemma":
        answers = (labels != IGNORE).long()
        return {**columns, "pixel_values": torch.ones(rows, 3, side, side), "token_type_ids": answers}
    mask = torch.ones(rows, crops, side, side, dtype=torch.int64)
    mask[..., -1] = 0  # most images aren't square, and without padding the attention mask would be skipped
    return {**columns, "pixel_values": torch.ones(rows, crops, 3, side, side), "pixel_attention_mask": mask}
