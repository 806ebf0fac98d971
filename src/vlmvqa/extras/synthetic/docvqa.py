"""Small pages of a form, a line for each field, with questions about what is printed there, in DocVQA's own files.

    STATE  NY
                  "what is the total?" -> 7     "what is printed at the top?" -> STATE
    TOTAL   7

Which fields a page has, on which of three lines and with which values is drawn. The letters are bold and large enough
for a picture of 48 pixels; thinner ones are learned much later.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlmvqa.errors import InputError
from vlmvqa.extras.synthetic.folder import refuse_small, write_once
from vlmvqa.progress import bar

Font = ImageFont.FreeTypeFont
Page = dict[int, tuple[str, str]]  # field and value by the number of the line

VERSION = 1  # of what is drawn, asked and written
SMALLEST_IMAGE = 48
LEAST = {"train_images": 1, "val_images": 1, "image_size": SMALLEST_IMAGE}

FIELDS = {
    "TOTAL": tuple("0123456789"),
    "GRADE": tuple("ABCDEF"),
    "STATE": ("CA", "FL", "IL", "NY", "TX", "VT"),
    "SIZE": ("S", "M", "L", "XL"),
}
LINES = 3  # of a page: each as high as a patch of the tiny model's encoder, at 48 pixels
PLACES = ("at the top", "in the middle", "at the bottom")
SUPERSAMPLING = 4  # letters are drawn this much larger, then averaged
FEWER = (0.5, 0.2, 0.3)  # chances of 1 to 3 lines: of a page with one a small model learns first what a field is
# Fractions of the page's side. A value of one letter is larger than one of two.
FONT_SIZES: dict[str | int, float] = {"field": 0.19, 1: 0.29, 2: 0.21}
LEFT, RIGHT = 0.01, 0.69  # where fields and values begin
BOLD = 0.01


def write(
    root: Path,
    *,
    train_images: int = 2000,
    val_images: int = 200,
    image_size: int = 48,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the data set under `root` unless it is there already, and return `root`.

    There are `train`, `val` and `test`, the last without answers and as large as `val`. A page is asked for each of its
    fields, and for what stands at one place.

    Args:
        image_size: side of the square pages in pixels.

    Raises:
        InputError: a setting is out of range, or `root` holds something else.
    """
    settings: dict[str, int | str] = {
        "version": VERSION,
        "benchmark": "docvqa",
        "train_images": train_images,
        "val_images": val_images,
        "image_size": image_size,
        "seed": seed,
    }
    refuse_small("forms", settings, LEAST)
    fonts: dict[str | int, Font] = {kind: _font(size * image_size * SUPERSAMPLING) for kind, size in FONT_SIZES.items()}

    def draw(folder: Path) -> None:
        (folder / "documents").mkdir()
        for first_id, split, images in ((1, "train", train_images), (2, "val", val_images), (3, "test", val_images)):
            rng = random.Random(f"{seed} forms {split}")
            records: list[dict[str, Any]] = []
            for number in bar(range(images), doing=f"generating {split}", unit="pages", shown=progress):
                page = draw_page(rng)
                document = first_id * 1_000_000 + number
                name = f"documents/form{document}_1.png"
                paint(rng, page, image_size, fonts).save(folder / name)
                for place, (question, answer, kind) in enumerate(ask(rng, page)):
                    record = {"questionId": 10 * document + place, "question": question, "question_types": [kind]}
                    record |= {"image": name, "docId": document, "data_split": split}
                    records.append(record if split == "test" else {**record, "answers": [answer]})
            content = {"dataset_name": "forms", "dataset_version": "1.0", "dataset_split": split, "data": records}
            file = "test_v1.0.json" if split == "test" else f"{split}_v1.0_withQT.json"
            (folder / file).write_text(json.dumps(content))

    return write_once(root, "forms", settings, draw)


def draw_page(rng: random.Random) -> Page:
    """What is printed on each line that is not empty, from the top."""
    count = rng.choices(range(1, LINES + 1), FEWER)[0]
    fields = rng.sample(tuple(FIELDS), count)
    places = sorted(rng.sample(range(LINES), count))
    return {place: (field, rng.choice(FIELDS[field])) for place, field in zip(places, fields, strict=True)}


def ask(rng: random.Random, page: Page) -> list[tuple[str, str, str]]:
    """Question, answer and DocVQA's question type: each field's value, and the field at one place."""
    asked = [(f"what is the {field.lower()}?", value, "form") for field, value in page.values()]
    place = rng.choice(tuple(page))
    return [*asked, (f"what is printed {PLACES[place]}?", page[place][0], "layout")]


def paint(rng: random.Random, page: Page, image_size: int, fonts: Mapping[str | int, Font]) -> Image.Image:
    """The page as a grey image, black on nearly white."""
    large = image_size * SUPERSAMPLING
    image = Image.new("L", (large, large), rng.randint(235, 255))
    canvas = ImageDraw.Draw(image)
    for place, (field, value) in page.items():
        for text, left, font in ((field, LEFT, fonts["field"]), (value, RIGHT, fonts[len(value)])):
            x = (left + rng.uniform(0, 0.01)) * large
            y = ((place + 0.5) / LINES + rng.uniform(-0.01, 0.01)) * large
            canvas.text((x, y), text, rng.randint(0, 30), font, anchor="lm", stroke_width=round(BOLD * large))
    return image.reduce(SUPERSAMPLING)


def _font(size: float) -> Font:
    """The font that Pillow brings, of so many pixels."""
    try:
        font = ImageFont.load_default(size)
    except ImportError:
        raise InputError("this Pillow has no FreeType to draw the forms' letters with; install a wheel of it") from None
    assert isinstance(font, Font)  # what a given size gets
    return font
