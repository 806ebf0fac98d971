"""For the processor: images that are several inputs (`tiles.py`) or have padding (`letterbox.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmvqa.data.example import Example
from vlmvqa.data.images import ImageSettings, decode, to_tensor
from vlmvqa.extras.vision import letterbox, tiles
from vlmvqa.extras.vision.sizes import stored_size
from vlmvqa.sequence.rows import Document


def load(example: Example, settings: ImageSettings, num_image_tokens: int) -> Document:
    """Return the encoder's inputs for an example's images, each `float[3, H, H]`, as a document without questions."""
    images = [decode(*one, settings) for one in example.named_images]
    if settings.tiles is None:
        kept = [letterbox.kept_tokens(*image.size, num_image_tokens) for image in images]
        return Document([letterbox.pad(image, settings, num_image_tokens) for image in images], (), kept=kept)
    inputs = [[to_tensor(tile, settings) for tile in tiles.cut(image, settings)] for image in images]
    flat = [tile for image in inputs for tile in image]
    by_image = tiles.tile_settings(settings.tiles).tile_attention == "image"
    return Document(flat, (), [len(image) for image in inputs] if by_image else [1] * len(flat))


def count_image_tokens(example: Example, settings: ImageSettings, num_image_tokens: int) -> int:
    """Return the number of tokens of an example's images, from the headers of their files.

    Rotation by EXIF does not change it.
    """
    sizes = [stored_size(image) for image, _ in example.named_images]
    if settings.tiles is None:
        return sum(len(letterbox.kept_tokens(*size, num_image_tokens)) for size in sizes)
    return num_image_tokens * sum(tiles.count_tiles(*size, settings) for size in sizes)


def masks(documents: Sequence[Document], num_image_tokens: int) -> dict[str, Tensor]:
    """Return which tokens of letterboxed images are no padding, `image_mask bool[I, N]`; nothing for tiles."""
    kept = [tokens for document in documents for tokens in document.kept]
    mask = torch.zeros(len(kept), num_image_tokens, dtype=torch.bool)
    for row, tokens in zip(mask, kept, strict=True):
        row[list(tokens) or slice(None)] = True  # a text-only question's image is in no row, but computed
    return {"image_mask": mask} if any(map(len, kept)) else {}
