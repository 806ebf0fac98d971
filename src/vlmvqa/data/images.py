"""Decode an image file, bytes or a PIL image into the tensor that the vision encoder reads.

    decode      any image format -> RGB, upright, 8 bits      or one sentence that names the file
    to_tensor   RGB -> float[3, size, size], normalised

A truncated image is an error; Pillow could fill the missing part with grey, which a model would learn.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmvqa.data.example import ImageSource
from vlmvqa.errors import InputError, suggest

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZES = ("squash", "center_crop", "letterbox")

# Everything that Pillow's decoders raise for a damaged file.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError, struct.error, zlib.error)


@dataclass(frozen=True)
class ImageSettings:
    """Image preprocessing of the vision encoder.

    Attributes:
        size: side of the square input in pixels.
        mean, std: normalisation of red, green and blue in 0..1.
        interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        resize: `squash` keeps the full image but not its aspect ratio, `center_crop` the reverse; `letterbox` keeps
            both and pads (`extras/vision/letterbox.py`).
        reduced: decode a JPEG at 1/2, 1/4 or 1/8 scale, never below `size` on either side. Faster (`python -m
            bench.data` measures it), but the pixels differ: by about 3 of 255 for photographs of 640 x 480 resized to
            224. Off by default, for models that were trained without.
        tiles: settings of the tiles that large images are cut into (`extras/vision/tiles.py`); None: they are not.
        fused: preprocessing of further encoders, whose features are concatenated (`model.vision.fused`).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize: str = "squash"
    reduced: bool = False
    tiles: Mapping[str, Any] | None = None
    fused: tuple[ImageSettings, ...] = ()

    @property
    def side(self) -> int:
        """Side of the tensor in pixels: the largest size."""
        return max(one.size for one in (self, *self.fused))

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"the image size is {self.size} pixels; use 1 or more.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"the image normalisation needs three means and three positive stds, not {self.mean} and {self.std}."
            )
        for name, known in {"interpolation": tuple(INTERPOLATIONS), "resize": RESIZES}.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{name}={value} is unknown (use {' or '.join(known)}){suggest(value, known) or '.'}")
        if self.tiles is not None:
            from vlmvqa.extras.vision.tiles import check

            check(self)


def decode(source: ImageSource, name: str, settings: ImageSettings | None = None) -> Image.Image:
    """Return an image as RGB, upright; the first frame if there are several.

    Args:
        source: a path, the bytes of an image file, or a PIL image (which is not modified, and never reduced).
        name: the name of the image in errors.
        settings: the settings that `to_tensor` will get, which may allow decoding at a smaller scale (None: full size).

    Raises:
        InputError: the file does not exist, is not an image, is damaged, or is too large.
    """
    try:
        if isinstance(source, Image.Image):
            _check_size(source, name)
            return _upright_rgb(source, name)
        content = source if isinstance(source, bytes) else source.read_bytes()
        if not content:
            raise InputError(f"{name} is empty (0 bytes); fetch it again.")
        with Image.open(io.BytesIO(content)) as image:
            _check_size(image, name)  # before reducing it, so that the same files are errors with and without
            if settings is not None and settings.reduced:
                # Both kinds of resizing need `size` pixels on the shorter side, which rotation does not change.
                image.draft(None, (settings.side, settings.side))  # JPEG only; no effect on other formats
            return _upright_rgb(image, name)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; fetch it, or correct the path.") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image in a known format; fetch it again or convert it.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except DECODE_ERRORS as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise InputError(f"{name} cannot be read ({' '.join(reason.split())}); fetch it again.") from None


def to_tensor(image: Image.Image, settings: ImageSettings) -> torch.Tensor:
    """Return an RGB image resized and normalised: `float[3, size, size]`; `[3 * K, side, side]` for K encoders."""
    if settings.fused:
        from vlmvqa.extras.vision.fused_pixels import fused_pixels

        return fused_pixels(image, settings)
    width, height = image.size
    box = (0, 0, width, height)
    if settings.resize == "center_crop":
        # Cropping in the same call gives the pixels of "resize the shorter side, then crop" without the intermediate
        # image: a 20,000 x 1 image would first become 20,000 * size^2 pixels.
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    resized = image.resize((settings.size, settings.size), INTERPOLATIONS[settings.interpolation], box=box)
    return normalise(resized, settings)


def normalise(resized: Image.Image, settings: ImageSettings) -> torch.Tensor:
    """Return the pixels of an RGB image, normalised: `float[3, height, width]`."""
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return pixels.div_(255).sub_(mean).div_(std)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return a new RGB image, rotated by its EXIF orientation, with transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point pixels, whose range is unknown; convert it to 8 or 16 bits.")
    if image.mode.startswith("I"):
        return _from_16_bits(image, name).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _from_16_bits(image: Image.Image, name: str) -> Image.Image:
    """Return the high byte of each 16-bit grey value (Pillow's own conversion of mode I clips instead)."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{name} holds 32-bit pixels, whose range is unknown; convert it to 8 or 16 bits.")
    return Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8))


def _check_size(image: Image.Image, name: str) -> None:
    """Raise an InputError above Pillow's limit, where Pillow itself only warns up to twice the limit."""
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise _too_large(name)


def _too_large(name: str) -> InputError:
    return InputError(f"{name} has too many pixels (over {Image.MAX_IMAGE_PIXELS:,}) to be decoded; scale it down.")
