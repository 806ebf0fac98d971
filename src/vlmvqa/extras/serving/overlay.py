"""An attention map, drawn over the picture: a small PNG, whatever the picture's size."""

from __future__ import annotations

import io
from dataclasses import replace

from PIL import Image

from vlmvqa.extras.report.attribution import Attribution, draw

SIDE = 512  # pixels of the longer side: a picture of 48 is enlarged, so that the heat over it is smooth


def png(picture: Image.Image, attribution: Attribution) -> bytes:
    """The picture with the heat over it.

    Args:
        picture: RGB, upright, as the model was shown it.
    """
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    left, top, right, bottom = attribution.box
    across, down = width / picture.width, height / picture.height
    left, top = min(round(left * across), width - 1), min(round(top * down), height - 1)
    box = (left, top, max(round(right * across), left + 1), max(round(bottom * down), top + 1))
    smaller = picture.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    draw(smaller, replace(attribution, box=box)).save(buffer, "PNG")
    return buffer.getvalue()
