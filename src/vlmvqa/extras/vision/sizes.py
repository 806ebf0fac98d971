"""Sizes of images that are not decoded."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from vlmvqa.data.example import ImageSource
from vlmvqa.data.images import DECODE_ERRORS


def stored_size(source: ImageSource) -> tuple[int, int]:
    """Return the width and height in an image's header, before rotation by EXIF.

    1, 1 for an unreadable image, which is an error when it is loaded.
    """
    if isinstance(source, Image.Image):
        return source.size
    try:
        # Of a path, Pillow reads the header only.
        content = source if isinstance(source, bytes | Path) else source.read_bytes()
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return image.size
    except (*DECODE_ERRORS, Image.DecompressionBombError):
        return 1, 1
