"""Synthetic DocVQA: small form pages with one field per line and questions about the printed text, in DocVQA's files.

    STATE  NY
                  "what is the total?" -> 7     "what is printed at the top?" -> STATE
    TOTAL   7

Fields, values and lines are chosen at random. Letters are bold and large enough to read in an image of 48 pixels; a
small model needs much longer to learn thinner ones. With `small_print` a wider page of 96 pixels holds the form 4 x 4
times: half the size that is easy to read, and a quarter of it where the page is resized to 48 pixels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmvqa.errors import InputError
from vlmvqa.extras.synthetic.atomic_folder import generated_once
from vlmvqa.ranks import bar

Font = ImageFont.FreeTypeFont
Page = dict[int, tuple[str, str]]  # line number: (field, value)

VERSION = 1  # of the generated pages, questions and files
MINIMUMS = {"train_images": 1, "val_images": 1, "image_size": 48}

FIELDS = {
    "TOTAL": tuple("0123456789"),
    "GRADE": tuple("ABCDEF"),
    "STATE": ("CA", "FL", "IL", "NY", "TX", "VT"),
    "SIZE": ("S", "M", "L", "XL"),
}
LINES = 3  # per page: at 48 pixels, a line is as high as a patch of the tiny model's encoder
PLACES = ("at the top", "in the middle", "at the bottom")
COPIES = 4  # of a form in each row and column of a page of small print
SUPERSAMPLING = 4  # pages are rendered this many times larger, then averaged
# Probabilities of 1 to 3 lines. Pages with one line teach a small model first how fields and values relate.
LINE_COUNT_WEIGHTS = (0.5, 0.2, 0.3)
# As fractions of the page's side. A value of one letter is larger than a value of two.
FONT_SIZES: dict[str | int, float] = {"field": 0.19, 1: 0.29, 2: 0.21}
FIELD_LEFT, VALUE_LEFT = 0.01, 0.69
STROKE_WIDTH = 0.01


@generated_once("forms", MINIMUMS, version=VERSION, benchmark="docvqa")
def write(
    folder: Path,
    *,
    train_images: int = 2000,
    val_images: int = 200,
    image_size: int = 48,
    small_print: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write the splits `train`, `val` and `test`.

    `image_size` is the height of a page in pixels; pages are square, except with `small_print`. `test` has no answers
    and as many pages as `val`. Each page has a question for each of its fields, and one about the text on a random
    line.
    """
    form_size = image_size // COPIES if small_print else image_size
    fonts = {kind: _font(size * form_size * SUPERSAMPLING) for kind, size in FONT_SIZES.items()}
    (folder / "documents").mkdir()
    for first_id, split, images in ((1, "train", train_images), (2, "val", val_images), (3, "test", val_images)):
        rng = random.Random(f"{seed} forms {split}")
        records: list[dict[str, Any]] = []
        for number in bar(range(images), doing=f"generating {split}", unit="pages", shown=progress):
            page = random_page(rng)
            document = first_id * 1_000_000 + number
            name = f"documents/form{document}_1.png"
            form = render(rng, page, form_size, fonts)
            (copies_on_page(form) if small_print else form).save(folder / name)
            for place, (question, answer, kind) in enumerate(page_questions(rng, page)):
                record = {"questionId": 10 * document + place, "question": question, "question_types": [kind]}
                record |= {"image": name, "docId": document, "data_split": split}
                records.append(record if split == "test" else {**record, "answers": [answer]})
        content = {"dataset_name": "forms", "dataset_version": "1.0", "dataset_split": split, "data": records}
        file = "test_v1.0.json" if split == "test" else f"{split}_v1.0_withQT.json"
        (folder / file).write_text(json.dumps(content))


def random_page(rng: random.Random) -> Page:
    """Return a random page: field and value of each printed line, from the top."""
    count = rng.choices(range(1, LINES + 1), LINE_COUNT_WEIGHTS)[0]
    fields = rng.sample(tuple(FIELDS), count)
    places = sorted(rng.sample(range(LINES), count))
    return {place: (field, rng.choice(FIELDS[field])) for place, field in zip(places, fields, strict=True)}


def page_questions(rng: random.Random, page: Page) -> list[tuple[str, str, str]]:
    """Return (question, answer, DocVQA's question type) of each field's value and of the field on a random line."""
    questions = [(f"what is the {field.lower()}?", value, "form") for field, value in page.values()]
    place = rng.choice(tuple(page))
    return [*questions, (f"what is printed {PLACES[place]}?", page[place][0], "layout")]


def render(rng: random.Random, page: Page, image_size: int, fonts: Mapping[str | int, Font]) -> Image.Image:
    """Return the page as a greyscale image, black on nearly white."""
    side = image_size * SUPERSAMPLING
    image = Image.new("L", (side, side), rng.randint(235, 255))
    canvas = ImageDraw.Draw(image)
    for place, (field, value) in page.items():
        for text, left, font in ((field, FIELD_LEFT, fonts["field"]), (value, VALUE_LEFT, fonts[len(value)])):
            x = (left + rng.uniform(0, 0.01)) * side
            y = ((place + 0.5) / LINES + rng.uniform(-0.01, 0.01)) * side
            canvas.text((x, y), text, rng.randint(0, 30), font, anchor="lm", stroke_width=round(STROKE_WIDTH * side))
    return image.reduce(SUPERSAMPLING)


def copies_on_page(form: Image.Image) -> Image.Image:
    """Return a page of 5 : 4 full of copies of the form, stretched to its shape."""
    width, height = form.width * 5 // 4, form.height
    page = Image.new("L", (COPIES * width, COPIES * height))
    for place in range(COPIES**2):
        corner = (place % COPIES * width, place // COPIES * height)
        page.paste(form.resize((width, height), Image.Resampling.BICUBIC), corner)
    return page


def _font(size: float) -> Font:
    """Return Pillow's built-in font at a size in pixels."""
    try:
        font = ImageFont.load_default(size)
    except ImportError:
        raise InputError("this Pillow cannot render fonts (it has no FreeType); install its wheel from PyPI") from None
    assert isinstance(font, Font)  # load_default returns FreeType fonts when it is given a size
    return font
