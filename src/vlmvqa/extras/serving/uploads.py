"""What a client sent, as a picture and questions, or one sentence why not.

Nothing here opens a path: a file's name is not even read. Only decoders that compute pixels are asked, and no others of
Pillow's: that of EPS would start another program, and those of rare formats are seldom looked at by anyone.
"""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Collection, Sequence

from PIL import Image, UnidentifiedImageError

from vlmvqa.data import images
from vlmvqa.data.images import DAMAGED, ImageSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.serving.limits import Limits, Refused

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# A progressive JPEG is computed anew for each of its scans, and a scan may be a few bytes: 10 MB of them take hours.
MOST_SCANS = 200
NAME = "the picture"

# Ours is below the limit from which Pillow warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(content: bytes, limits: Limits, settings: ImageSettings | None = None) -> Image.Image:
    """The picture as RGB, upright, its first frame if there are several.

    Args:
        settings: of the model that is asked: one that was trained on JPEGs decoded smaller is shown them so.

    Raises:
        Refused: it is no picture in a known format, it is damaged, or it is too large.
    """
    if not content:
        raise Refused(400, "the picture is empty (0 bytes); send a picture's file")
    if len(content) > limits.bytes:
        raise too_many_bytes(limits)
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MOST_SCANS:
        raise Refused(400, f"the picture is a JPEG of more than {MOST_SCANS} scans; save it again as a plain one")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > limits.pixels:
                raise _too_many_pixels(image, limits)
            if image.format == "BMP" and image.tile and image.tile[0][0] == "bmp_rle":
                # Pillow fills what such a file leaves out: 1 kB of it may ask for 500 bytes a pixel.
                raise Refused(415, "the picture is a run-length coded BMP, which is not read; save it as a PNG")
            if settings is not None and settings.reduced:
                image.draft(None, (settings.size, settings.size))
            return images.decode(image, NAME)
    except UnidentifiedImageError:
        raise Refused(415, f"this is no picture that can be read; send {', '.join(FORMATS[:-1])} or BMP") from None
    except InputError as error:
        raise Refused(400, str(error).rstrip(".").replace("fetch it again", "replace the file")) from None
    except Image.DecompressionBombError:
        raise Refused(413, f"the picture has over {limits.megapixels:g} megapixels; scale it down") from None
    except (*DAMAGED, MemoryError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise Refused(400, f"the picture is damaged ({said}); save it again") from None


def questions(texts: Sequence[str], limits: Limits, marks: Collection[str] = ()) -> tuple[str, ...]:
    """The questions on one line each.

    Args:
        marks: texts that a model's tokenizer takes for more than words, as `<image>`.

    Raises:
        Refused: there is none, there are too many, or one is empty, too long, or holds what is no text.
    """
    if not texts:
        raise Refused(422, "no question is asked; send at least one")
    if len(texts) > limits.questions:
        raise Refused(422, f"{len(texts)} questions are asked; send at most {limits.questions} about a picture")
    return tuple(_question(number, text, limits, marks) for number, text in enumerate(texts, start=1))


def _question(number: int, text: str, limits: Limits, marks: Collection[str]) -> str:
    if len(text) > limits.characters:  # first: what follows looks at each of them
        raise Refused(422, f"question {number} has {len(text):,} characters; ask it in {limits.characters}")
    line = " ".join(text.split())
    if not line:
        raise Refused(422, f"question {number} is empty; ask something")
    if any(unicodedata.category(one) in ("Cc", "Cs") for one in line):
        raise Refused(422, f"question {number} holds control characters; send plain text")
    held = [mark for mark in marks if mark in line]
    if held:
        raise Refused(422, f"question {number} holds {held[0]}, which is a mark of the model's own; leave it out")
    return line


def too_many_bytes(limits: Limits) -> Refused:
    return Refused(413, f"the picture has over {limits.megabytes:g} MB; scale it down, or save it as a JPEG")


def _too_many_pixels(image: Image.Image, limits: Limits) -> Refused:
    size = f"{image.width:,} x {image.height:,} pixels"
    return Refused(413, f"the picture has {size}, over {limits.megapixels:g} megapixels; scale it down")
