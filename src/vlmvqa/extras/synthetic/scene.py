"""A scene of coloured shapes: what it holds, its picture, and the questions asked of it.

A question alone must not give its answer away (the flaw of VQAv1 that VQAv2 was made to fix), so the
answers to each question text are handed out evenly:

    draw    1 to 5 shapes, few more often than many, never overlapping
    ask     every unambiguous question about them
    keep    those whose answer was given least so far to that question text

Scenes of one or two shapes and questions like "Is there a red shape?" are there as stepping stones: without
them a small model is slower to find out that words point at places.

What is drawn or asked never changes without the VERSION of those who draw: `shapes.py`, `shapes_gqa.py` and
`shapes_captions.py`.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Generic, TypeVar

from PIL import Image, ImageDraw

COLORS = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (240, 205, 10),
    "purple": (150, 40, 185),
    "black": (15, 15, 15),
}
FORMS = ("circle", "square", "triangle", "star")
GRID = 3  # cells a side
SIZES = {"small": 0.21, "large": 0.31}  # of the image's side: 10 and 15 pixels of 48
ATTRIBUTES = {"form": FORMS, "color": tuple(COLORS), "size": tuple(SIZES)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("0", "1", "2", "3", "4")
YES_NO = ("yes", "no")

CLEAR = 0.18  # two positions nearer than this are never compared
OFF_CENTER = 0.08  # a shape nearer to a centre line than this is never asked for its place
SUPERSAMPLING = 4  # edges are drawn this much larger, then averaged
SMALLEST_IMAGE = 32  # pixels a side

# Chances of 1 to 4 shapes; in crowded scenes 3 or 4 of one kind, for by chance they are too rare to count.
FEW = (0.45, 0.3, 0.2, 0.05)
CROWDED = 0.3

# kind of question: (share, VQAv2's question_type: the opening words, VQAv2's answer_type)
KINDS = {
    "count": (0.15, "how many", "number"),
    "exists": (0.16, "is there a", "yes/no"),
    "more": (0.08, "are there", "yes/no"),
    "relation": (0.03, "is the", "yes/no"),
    "color": (0.20, "what color is the", "other"),
    "form": (0.14, "what", "other"),
    "size": (0.10, "what", "other"),
    "where": (0.14, "where is the", "other"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape of a scene; `x`, `y` (centre) and `side` are fractions of the image's side."""

    form: str
    color: str
    size: str
    side: float
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its answer, and all the answers it could have had."""

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]


Q = TypeVar("Q", bound=Asked)


# --- a scene and its picture --------------------------------------------------------------------------


def draw_scene(rng: random.Random) -> list[Shape]:
    """A random scene without overlaps, of few shapes or of many of a kind."""
    if rng.random() < CROWDED:
        attribute = rng.choice(tuple(ATTRIBUTES))
        alike = {attribute: rng.choice(ATTRIBUTES[attribute])}
        looks = [alike] * rng.choice((3, 4, 4)) + [{}] * rng.choice((0, 1))
    else:
        looks = [{}] * rng.choices((1, 2, 3, 4), FEW)[0]
    return _place(rng, [_draw_shape(rng, **look) for look in looks])


def _draw_shape(rng: random.Random, **look: str) -> Shape:
    """A shape, not yet placed, that looks as asked and otherwise at random."""
    look = {name: rng.choice(known) for name, known in ATTRIBUTES.items()} | look
    return Shape(look["form"], look["color"], look["size"], SIZES[look["size"]] * rng.uniform(0.97, 1.03))


def _place(rng: random.Random, shapes: list[Shape]) -> list[Shape]:
    """Each shape somewhere inside its own cell of the grid.

    A cell is a patch of the tiny model's encoder: where shapes lie across patches, and most patches are empty, a
    model this small does not find out in minutes which patch a word is about.
    """
    cells = rng.sample([(column, row) for column in range(GRID) for row in range(GRID)], len(shapes))
    placed = []
    for shape, (column, row) in zip(shapes, cells, strict=True):
        room = 0.5 / GRID - shape.side / 2
        x = (column + 0.5) / GRID + rng.uniform(-room, room)
        y = (row + 0.5) / GRID + rng.uniform(-room, room)
        placed.append(Shape(shape.form, shape.color, shape.size, shape.side, x, y))
    return placed


def paint(rng: random.Random, shapes: list[Shape], image_size: int) -> Image.Image:
    """The scene as an RGB image on a plain light background."""
    large = image_size * SUPERSAMPLING
    level = rng.randint(215, 250)
    background = tuple(level + rng.randint(-5, 5) for _ in range(3))
    image = Image.new("RGB", (large, large), background)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        x, y, half = shape.x * large, shape.y * large, shape.side * large / 2
        if shape.form == "circle":
            canvas.ellipse((x - half, y - half, x + half, y + half), fill=COLORS[shape.color])
        else:
            corners = [(x + half * dx, y + half * dy) for dx, dy in OUTLINES[shape.form]]
            canvas.polygon(corners, fill=COLORS[shape.color])
    return image.reduce(SUPERSAMPLING)


def _star() -> list[tuple[float, float]]:
    """Ten corners of a five-pointed star inside the square of half side 1."""
    radii = (1.05, 0.45) * 5
    angles = [math.pi * (index / 5 - 0.5) for index in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


OUTLINES = {
    "square": [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "triangle": [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "star": _star(),
}


# --- questions ----------------------------------------------------------------------------------------


def _plural(attribute: str, value: str) -> str:
    return f"{value}s" if attribute == "form" else f"{value} shapes"


def askable(scene: list[Shape]) -> Iterator[Asked]:
    """Every unambiguous question about the scene."""
    yield from _about_presence(scene)
    colors, sizes = ATTRIBUTES["color"], ATTRIBUTES["size"]
    for shape in scene:
        of_color = sum(other.color == shape.color for other in scene) == 1
        of_form = sum(other.form == shape.form for other in scene) == 1
        of_size = sum(other.size == shape.size for other in scene) == 1
        if of_form:
            yield Asked("color", f"What color is the {shape.form}?", shape.color, colors)
            yield Asked("size", f"What size is the {shape.form}?", shape.size, sizes)
        elif sum((other.form, other.size) == (shape.form, shape.size) for other in scene) == 1:
            yield Asked("color", f"What color is the {shape.size} {shape.form}?", shape.color, colors)
        if of_color:
            yield Asked("form", f"What shape is the {shape.color} object?", shape.form, FORMS)
            yield Asked("size", f"What size is the {shape.color} object?", shape.size, sizes)
        if of_size:
            yield Asked("color", f"What color is the {shape.size} shape?", shape.color, colors)
            yield Asked("form", f"What shape is the {shape.size} object?", shape.form, FORMS)
        if min(abs(shape.x - 0.5), abs(shape.y - 0.5)) >= OFF_CENTER:
            place = f"{'top' if shape.y < 0.5 else 'bottom'} {'left' if shape.x < 0.5 else 'right'}"
            names = {f"{shape.color} shape": of_color, shape.form: of_form, f"{shape.size} shape": of_size}
            for name, unique in names.items():
                if unique:
                    yield Asked("where", f"Where is the {name}?", place, PLACES)
    yield from _about_order(scene)


def _about_presence(scene: list[Shape]) -> Iterator[Asked]:
    """`How many circles are there?`, `Is there a red circle?`, `Are there more circles than squares?`"""
    for attribute, values in ATTRIBUTES.items():
        for value in values:
            count = sum(getattr(shape, attribute) == value for shape in scene)
            if str(count) in COUNTS:
                yield Asked("count", f"How many {_plural(attribute, value)} are there?", str(count), COUNTS)
            if attribute != "size":
                name = value if attribute == "form" else f"{value} shape"
                yield Asked("exists", f"Is there a {name}?", "yes" if count else "no", YES_NO)
    present = {(shape.color, shape.form) for shape in scene}
    for color in COLORS:
        for form in FORMS:
            # A "no" is only asked where the colour or the form is there: else looking for one of them would do.
            if any(color == shape.color or form == shape.form for shape in scene):
                answer = "yes" if (color, form) in present else "no"
                yield Asked("exists", f"Is there a {color} {form}?", answer, YES_NO)
    counts = {form: sum(shape.form == form for shape in scene) for form in FORMS}
    for more, fewer in permutations(FORMS, 2):
        if counts[more] or counts[fewer]:
            answer = "yes" if counts[more] > counts[fewer] else "no"
            yield Asked("more", f"Are there more {more}s than {fewer}s?", answer, YES_NO)


def _about_order(scene: list[Shape]) -> Iterator[Asked]:
    """`Is the red shape left of the blue shape?` and `What color is the leftmost shape?`"""
    unique = [shape for shape in scene if sum(other.color == shape.color for other in scene) == 1]
    for one, other in permutations(unique, 2):
        for axis, relation in (("x", "left of"), ("y", "above")):
            difference = getattr(other, axis) - getattr(one, axis)
            if abs(difference) >= CLEAR:
                text = f"Is the {one.color} shape {relation} the {other.color} shape?"
                yield Asked("relation", text, "yes" if difference > 0 else "no", YES_NO)
    if len(scene) == 1:
        return
    for axis, first, last in (("x", "leftmost", "rightmost"), ("y", "highest", "lowest")):
        ordered = sorted(scene, key=lambda shape: float(getattr(shape, axis)))
        for word, end, next_to_it in ((first, ordered[0], ordered[1]), (last, ordered[-1], ordered[-2])):
            if abs(getattr(end, axis) - getattr(next_to_it, axis)) >= CLEAR:
                yield Asked("color", f"What color is the {word} shape?", end.color, ATTRIBUTES["color"])


class Asker(Generic[Q]):
    """Chooses the questions of a split's scenes so that no question text has a favourite answer.

    Args:
        ask: every question that can be asked of a scene.
        shares: of the kinds of questions.
    """

    def __init__(
        self, rng: random.Random, ask: Callable[[list[Shape]], Iterable[Q]], shares: Mapping[str, float]
    ) -> None:
        self.rng, self.ask, self.shares = rng, ask, shares
        self.given: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))

    def excess(self, text: str, answer: str, choices: Sequence[str]) -> int:
        """How much more often `answer` was given to `text` than the rarest of its `choices`."""
        given = self.given[text]
        return given[answer] - min(given[choice] for choice in choices)

    def choose(self, questions: Sequence[Q]) -> Q | None:
        """The question whose answer is most due, at random among equals; None if each has had its share."""
        ranked = [(self.excess(q.text, q.answer, q.choices), self.rng.random(), q) for q in questions]
        excess, _, question = min(ranked, key=lambda entry: entry[:2], default=(0, 0.0, None))
        return question if excess <= 1 else None

    def scene(self, questions_per_image: int) -> tuple[list[Shape], list[Q]]:
        """A new scene and the questions asked about it."""
        scene = draw_scene(self.rng)
        open_questions: dict[str, list[Q]] = {kind: [] for kind in self.shares}
        for question in self.ask(scene):
            open_questions[question.kind].append(question)
        wanted = max(1, questions_per_image + self.rng.randint(-1, 1))
        asked: list[Q] = []
        for kind in self.rng.choices(tuple(self.shares), tuple(self.shares.values()), k=5 * wanted):
            chosen = self.choose(open_questions[kind])
            if chosen:
                self.given[chosen.text][chosen.answer] += 1
                open_questions[kind] = [q for q in open_questions[kind] if q.text != chosen.text]
                asked.append(chosen)
            if len(asked) == wanted:
                break
        return scene, asked
