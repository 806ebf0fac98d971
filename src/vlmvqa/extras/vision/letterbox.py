"""Letterboxing: an image keeps its aspect ratio, and the patches that it doesn't cover are masked (`data.resize`).

    #  #  #  #       the image covers 4 x 2 of 4 x 4 patches, from the top left; the others have the mean colour, are
    #  #  #  #       masked in the encoder, and have no tokens in the row
    .  .  .  .
    .  .  .  .

The image is resized to complete patches, as in NaViT (Dehghani et al. 2023), so that no patch shows image and padding:
with 16 x 16 patches its aspect ratio changes by a few percent at most.
"""

from __future__ import annotations

import inspect
from math import isqrt
from typing import TYPE_CHECKING

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmvqa.data.images import INTERPOLATIONS, ImageSettings, normalise
from vlmvqa.errors import InputError

if TYPE_CHECKING:
    from vlmvqa.models.vlm import VLM


def check(model: VLM) -> None:
    """Raise an InputError if a model cannot read letterboxed images."""
    vision, (rows, columns) = model.vision, model.vision.patch_grid
    if "attn_mask" not in inspect.signature(vision.encoder.forward).parameters:
        raise InputError("data.resize=letterbox: timm cannot mask patches in this encoder; use a vision transformer")
    if model.num_image_tokens != vision.features.tokens or rows != columns or vision.image_size % rows:
        raise InputError(
            "data.resize=letterbox leaves patches out of the row, which needs a token for each of a square of patches; "
            "use another model.projector.kind or data.resize=squash"
        )


def covered(width: int, height: int, side: int) -> tuple[int, int]:
    """Return the columns and rows of patches that an image covers, of `side` x `side`; its longer side covers all."""
    longest = max(width, height)
    columns, rows = (max(1, round(side * length / longest)) for length in (width, height))
    return columns, rows


def pad(image: Image.Image, settings: ImageSettings, num_image_tokens: int) -> Tensor:
    """Return an RGB image resized to complete patches and padded with the mean colour: `float[3, H, H]`."""
    side = isqrt(num_image_tokens)  # of the square of patches: a class token changes nothing
    columns, rows = covered(*image.size, side)
    patch = settings.size // side
    resized = image.resize((columns * patch, rows * patch), INTERPOLATIONS[settings.interpolation])
    pixels = normalise(resized, settings)
    return F.pad(pixels, (0, settings.size - columns * patch, 0, settings.size - rows * patch))  # 0: the mean colour


def kept_tokens(width: int, height: int, num_image_tokens: int) -> list[int]:
    """Return which of an image's N tokens are no padding: the class token, if there is one, and the covered patches."""
    side = isqrt(num_image_tokens)
    columns, rows = covered(width, height, side)
    before = num_image_tokens - side * side
    return [*range(before), *(before + row * side + column for row in range(rows) for column in range(columns))]
