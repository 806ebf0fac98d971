"""Client input: image bytes to an image, and texts to questions.

No path is opened and file names are not read. Only five formats are decoded: Pillow's EPS decoder starts another
program, and decoders of rare formats are less tested.
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
import warnings
from collections.abc import Collection, Sequence

from PIL import Image, UnidentifiedImageError

from vlmvqa.data import images
from vlmvqa.data.images import DECODE_ERRORS, ImageSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.serving.limits import MILLION, Limits, RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# A progressive JPEG is decoded once per scan, and a scan may have a few bytes: 10 MB of them take hours.
MAX_JPEG_SCANS = 200
NAME = "the image"
DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64", re.IGNORECASE)

# `Limits.megapixels` is below Pillow's limit for this warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(content: bytes, limits: Limits, settings: ImageSettings | None = None) -> Image.Image:
    """Return an image as RGB, upright; the first frame of an animation.

    Args:
        settings: image settings of the model; with `reduced`, large JPEGs are decoded at a smaller size.

    Raises:
        RequestError: the format is unknown, or the image is damaged or too large.
    """
    if not content:
        raise RequestError(400, "the image is empty (0 bytes); send an image file")
    if len(content) > limits.megabytes * MILLION:
        raise RequestError(413, f"the image has over {limits.megabytes:g} MB; scale it down, or save it as a JPEG")
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise RequestError(400, f"the image is a JPEG with over {MAX_JPEG_SCANS} scans; save it as a baseline JPEG")
    too_many_pixels = f"over {limits.megapixels:g} megapixels; scale it down"
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > limits.megapixels * MILLION:
                size = f"{image.width:,} x {image.height:,} pixels"
                raise RequestError(413, f"the image has {size}, {too_many_pixels}")
            if image.format == "BMP" and image.tile and image.tile[0][0] == "bmp_rle":
                # Pillow fills the pixels that such a file skips: 1 kB may need 500 bytes per pixel.
                raise RequestError(415, "the image is a run-length encoded BMP, which is not supported; save it as PNG")
            if settings is not None and settings.reduced:
                image.draft(None, (settings.size, settings.size))
            return images.decode(image, NAME)
    except UnidentifiedImageError:
        raise RequestError(415, f"this is not an image in a supported format; send {', '.join(FORMATS)}") from None
    except InputError as error:
        raise RequestError(400, str(error).rstrip(".").replace("fetch it again", "replace the file")) from None
    except Image.DecompressionBombError:
        raise RequestError(413, f"the image has {too_many_pixels}") from None
    except (*DECODE_ERRORS, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(400, f"the image is damaged ({reason}); save it again") from None


def from_data_url(url: str) -> bytes:
    """Return the image file of a data URL.

    Raises:
        RequestError: it is not a data URL of an image in base64. Other URLs are not opened.
    """
    kind, comma, content = url.partition(",")
    if not DATA_URL.fullmatch(kind) or not comma:
        message = "the image's URL is not data:image/...;base64,...; the server opens no other URL, so send the image"
        raise RequestError(400, message, param="messages[0].content")
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        message = f"the image's data URL is not valid base64 ({error}); encode it again"
        raise RequestError(400, message, param="messages[0].content") from None


def clean_questions(texts: Sequence[str], limits: Limits, special_tokens: Collection[str] = ()) -> list[str]:
    """Return the questions with white space collapsed.

    Args:
        special_tokens: texts that a question may not contain.

    Raises:
        RequestError: there are no questions or too many, or a question is empty, too long or not plain text.
    """
    if not texts:
        raise RequestError(422, "there is no question; send at least one")
    if len(texts) > limits.questions:
        raise RequestError(422, f"there are {len(texts)} questions; send at most {limits.questions} per image")
    questions = [" ".join(text[: limits.characters + 1].split()) for text in texts]
    for number, (text, question) in enumerate(zip(texts, questions, strict=True), start=1):
        if len(text) > limits.characters:
            raise RequestError(422, f"question {number} has {len(text):,} characters; use at most {limits.characters}")
        if not question:
            raise RequestError(422, f"question {number} is empty; write a question")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in question):
            raise RequestError(422, f"question {number} contains control characters; send plain text")
        for token in special_tokens:
            if token in question:
                raise RequestError(422, f"question {number} contains {token}, a special token of the model; remove it")
    return questions
