"""The input of fused encoders: an image resized and normalised for each of them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image

from vlmvqa.data.images import ImageSettings, to_tensor


def fused_pixels(image: Image.Image, settings: ImageSettings) -> torch.Tensor:
    """Return 3 channels for each encoder, padded on the right and below to the largest: `float[3 * K, side, side]`."""
    each = [to_tensor(image, replace(one, resize=settings.resize, fused=())) for one in (settings, *settings.fused)]
    return torch.cat(
        [F.pad(pixels, (0, settings.side - pixels.shape[2], 0, settings.side - pixels.shape[1])) for pixels in each]
    )
