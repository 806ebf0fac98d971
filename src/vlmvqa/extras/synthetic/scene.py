"""Scenes of coloured shapes: random generation, rendering, questions, and balanced sampling of the questions.

The text of a question must not reveal its answer (the flaw of VQAv1 that VQAv2 fixed), so the answers to each question
text are balanced:

    1. generate a scene of 1 to 5 shapes that never overlap; small scenes are more frequent
    2. list every unambiguous question about it
    3. keep the questions whose answer was used least so far for their text

Scenes of one or two shapes and questions such as "Is there a red shape?" make learning easier: without them a small
model needs longer to associate words with image regions.

Any change of the generated scenes or questions requires a new VERSION in `vqav2.py`, `gqa.py` and `coco_captions.py`.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path

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
GRID = 3  # cells per side
SIZES = {"small": 0.21, "large": 0.31}  # fractions of the image's side: 10 and 15 pixels of 48
ATTRIBUTES = {"form": FORMS, "color": tuple(COLORS), "size": tuple(SIZES)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("0", "1", "2", "3", "4")
YES_NO = ("yes", "no")
Program = tuple[tuple[str, str], ...]

# Minimum distances, as fractions of the image's side.
MIN_DIFFERENCE = 0.18  # between two positions that a question compares
OFF_CENTER = 0.08  # from the centre lines to a shape whose position is the answer
SUPERSAMPLING = 4  # scenes are rendered this many times larger, then averaged
MIN_IMAGE_SIZE = 32  # pixels

SHAPE_COUNT_WEIGHTS = (0.45, 0.3, 0.2, 0.05)  # probabilities of 1 to 4 shapes
# Probability of a scene with 3 or 4 shapes that share an attribute: too rare otherwise to learn the answers 3 and 4.
CROWDED = 0.3

# kind of question: (weight, VQAv2's question_type: its first words, VQAv2's answer_type)
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

    @property
    def place(self) -> str | None:
        """The quadrant, one of `PLACES`; None if the shape is too close to a centre line."""
        if min(abs(self.x - 0.5), abs(self.y - 0.5)) < OFF_CENTER:
            return None
        return f"{'top' if self.y < 0.5 else 'bottom'} {'left' if self.x < 0.5 else 'right'}"


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question, its answer and all possible answers; the other fields are for GQA.

    Attributes:
        group: the group of comparable answers, GQA's `groups.global`; None for yes/no questions.
        program: operation and argument of each step over the scene graph.
        entails: the texts of questions whose answers follow from this question's answer.
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]
    group: str | None = None
    program: Program = ()
    entails: tuple[str, ...] = ()


def yes_no(kind: str, text: str, answer: bool, program: Program = (), entails: tuple[str, ...] = ()) -> SceneQuestion:
    """Return a question whose answer is yes or no."""
    return SceneQuestion(kind, text, "yes" if answer else "no", YES_NO, None, program, entails)


# --- generation and rendering -------------------------------------------------------------------------


def random_scene(rng: random.Random) -> list[Shape]:
    """Return a scene without overlaps: a few random shapes, or several that share an attribute."""
    if rng.random() < CROWDED:
        attribute = rng.choice(tuple(ATTRIBUTES))
        shared = {attribute: rng.choice(ATTRIBUTES[attribute])}
        fixed = [shared] * rng.choice((3, 4, 4)) + [{}] * rng.choice((0, 1))
    else:
        fixed = [{}] * rng.choices((1, 2, 3, 4), SHAPE_COUNT_WEIGHTS)[0]
    shapes = []
    for attributes in fixed:
        values = {name: rng.choice(choices) for name, choices in ATTRIBUTES.items()} | attributes
        side = SIZES[values["size"]] * rng.uniform(0.97, 1.03)
        shapes.append(Shape(values["form"], values["color"], values["size"], side))
    # Each shape is inside its own cell, which is a patch of the tiny model's encoder. With shapes that cross patch
    # borders and mostly empty patches, a model this small doesn't learn within minutes to associate words with patches.
    cells = rng.sample(list(product(range(GRID), repeat=2)), len(shapes))
    placed = []
    for shape, cell in zip(shapes, cells, strict=True):
        room = 0.5 / GRID - shape.side / 2
        x, y = ((index + 0.5) / GRID + rng.uniform(-room, room) for index in cell)
        placed.append(replace(shape, x=x, y=y))
    return placed


def save_image(rng: random.Random, scene: list[Shape], image_size: int, path: Path) -> None:
    """Render a scene on a plain light background and save it as a JPEG file of high quality."""
    side = image_size * SUPERSAMPLING
    level = rng.randint(215, 250)
    background = tuple(level + rng.randint(-5, 5) for _ in range(3))
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    for shape in scene:
        x, y, half = shape.x * side, shape.y * side, shape.side * side / 2
        if shape.form == "circle":
            canvas.ellipse((x - half, y - half, x + half, y + half), fill=COLORS[shape.color])
        else:
            corners = [(x + half * dx, y + half * dy) for dx, dy in OUTLINES[shape.form]]
            canvas.polygon(corners, fill=COLORS[shape.color])
    image.reduce(SUPERSAMPLING).save(path, quality=95, subsampling=0)


OUTLINES = {  # corners in a square from -1 to 1
    "square": [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "triangle": [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "star": [  # ten corners
        (radius * math.cos(math.pi * (corner / 5 - 0.5)), radius * math.sin(math.pi * (corner / 5 - 0.5)))
        for corner, radius in enumerate((1.05, 0.45) * 5)
    ],
}


# --- questions ----------------------------------------------------------------------------------------


def scene_questions(scene: list[Shape]) -> Iterator[SceneQuestion]:
    """Yield every unambiguous question about the scene."""
    yield from _presence_questions(scene)
    for shape in scene:
        form, color, size = shape.form, shape.color, shape.size
        unique = {
            attribute: sum(getattr(other, attribute) == getattr(shape, attribute) for other in scene) == 1
            for attribute in ATTRIBUTES
        }
        if not unique["form"] and sum((other.form, other.size) == (form, size) for other in scene) == 1:
            yield SceneQuestion("color", f"What color is the {size} {form}?", color, ATTRIBUTES["color"])
        for known, kind, text in (
            ("form", "color", f"What color is the {form}?"),
            ("form", "size", f"What size is the {form}?"),
            ("color", "form", f"What shape is the {color} object?"),
            ("color", "size", f"What size is the {color} object?"),
            ("size", "color", f"What color is the {size} shape?"),
            ("size", "form", f"What shape is the {size} object?"),
        ):
            if unique[known]:
                yield SceneQuestion(kind, text, getattr(shape, kind), ATTRIBUTES[kind])
        for known, name in {"color": f"{color} shape", "form": form, "size": f"{size} shape"}.items():
            if unique[known] and (place := shape.place):
                yield SceneQuestion("where", f"Where is the {name}?", place, PLACES)
    yield from _order_questions(scene)


def _presence_questions(scene: list[Shape]) -> Iterator[SceneQuestion]:
    """Yield `How many circles are there?`, `Is there a red circle?`, `Are there more circles than squares?`."""
    for attribute, values in ATTRIBUTES.items():
        for value in values:
            count = sum(getattr(shape, attribute) == value for shape in scene)
            name = value if attribute == "form" else f"{value} shape"
            if str(count) in COUNTS:
                yield SceneQuestion("count", f"How many {name}s are there?", str(count), COUNTS)
            if attribute != "size":
                yield yes_no("exists", f"Is there a {name}?", count > 0)
    present = {(shape.color, shape.form) for shape in scene}
    for color, form in product(COLORS, FORMS):
        # With "no" as the answer, colour or form must be present: otherwise finding neither would be enough.
        if any(color == shape.color or form == shape.form for shape in scene):
            yield yes_no("exists", f"Is there a {color} {form}?", (color, form) in present)
    counts = {form: sum(shape.form == form for shape in scene) for form in FORMS}
    for more, fewer in permutations(FORMS, 2):
        if counts[more] or counts[fewer]:
            yield yes_no("more", f"Are there more {more}s than {fewer}s?", counts[more] > counts[fewer])


def _order_questions(scene: list[Shape]) -> Iterator[SceneQuestion]:
    """Yield `Is the red shape left of the blue shape?` and `What color is the leftmost shape?`."""
    unique = [shape for shape in scene if sum(other.color == shape.color for other in scene) == 1]
    for one, other in permutations(unique, 2):
        for axis, relation in (("x", "left of"), ("y", "above")):
            difference = getattr(other, axis) - getattr(one, axis)
            if abs(difference) >= MIN_DIFFERENCE:
                text = f"Is the {one.color} shape {relation} the {other.color} shape?"
                yield yes_no("relation", text, difference > 0)
    if len(scene) == 1:
        return
    for axis, first, last in (("x", "leftmost", "rightmost"), ("y", "highest", "lowest")):
        ordered = sorted(scene, key=lambda shape: float(getattr(shape, axis)))
        for word, end, neighbour in ((first, ordered[0], ordered[1]), (last, ordered[-1], ordered[-2])):
            if abs(getattr(end, axis) - getattr(neighbour, axis)) >= MIN_DIFFERENCE:
                yield SceneQuestion("color", f"What color is the {word} shape?", end.color, ATTRIBUTES["color"])


class BalancedSampler:
    """Samples scenes with questions such that every answer to a question text is about equally frequent.

    Args:
        list_questions: returns all questions about a scene.
        kinds: kinds of questions, each with its relative frequency as the first value.
    """

    def __init__(
        self,
        rng: random.Random,
        list_questions: Callable[[list[Shape]], Iterable[SceneQuestion]],
        kinds: Mapping[str, tuple[float, str, str]],
    ) -> None:
        self.rng, self.list_questions = rng, list_questions
        self.kind_weights = {kind: weight for kind, (weight, _, _) in kinds.items()}
        self.counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))

    def sample(self, questions_per_image: int) -> tuple[list[Shape], list[SceneQuestion]]:
        """Return a new scene and its questions."""
        scene = random_scene(self.rng)
        remaining: dict[str, list[SceneQuestion]] = {kind: [] for kind in self.kind_weights}
        for question in self.list_questions(scene):
            remaining[question.kind].append(question)
        wanted = max(1, questions_per_image + self.rng.randint(-1, 1))
        sampled: list[SceneQuestion] = []
        for kind in self.rng.choices(tuple(self.kind_weights), tuple(self.kind_weights.values()), k=5 * wanted):
            chosen = self._choose(remaining[kind])
            if chosen:
                self.counts[chosen.text][chosen.answer] += 1
                remaining[kind] = [question for question in remaining[kind] if question.text != chosen.text]
                sampled.append(chosen)
            if len(sampled) == wanted:
                break
        return scene, sampled

    def _choose(self, questions: Sequence[SceneQuestion]) -> SceneQuestion | None:
        """Return the question whose answer is most underused, ties broken at random; None if all are overused."""
        ranked = []
        for question in questions:
            counts = self.counts[question.text]
            rarest = min(counts[choice] for choice in question.choices)
            ranked.append((counts[question.answer] - rarest, self.rng.random(), question))
        excess, _, chosen = min(ranked, key=lambda entry: entry[:2], default=(0, 0.0, None))
        return chosen if excess <= 1 else None
