"""Scenes of coloured shapes with the questions of their scene graphs, in GQA's own files.

A question is a program over the graph, as in GQA (Hudson & Manning 2019), and entails others: who says that the
circle is red must also say that there is a circle.

    *_balanced    chosen so that no question text has a favourite answer (`scenes.Asker`)
    *_all         these and what they entail, not balanced
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic.folder import refuse_small, write_once
from vlmvqa.extras.synthetic.scene import ATTRIBUTES, PLACES, YES_NO, Shape
from vlmvqa.progress import bar

VERSION = 1  # of what is drawn, asked and written
LEAST = {"train_images": 1, "val_images": 1, "image_size": scenes.SMALLEST_IMAGE, "questions_per_image": 1}

# kind of question: (share, structural type, semantic type)
KINDS = {
    "exists": (0.14, "verify", "obj"),
    "color": (0.20, "query", "attr"),
    "shape": (0.14, "query", "obj"),
    "size": (0.10, "query", "attr"),
    "position": (0.12, "query", "attr"),
    "attribute": (0.08, "verify", "attr"),
    "relation": (0.03, "verify", "rel"),
    "choose": (0.10, "choose", "attr"),
    "logical": (0.05, "logical", "obj"),
    "same": (0.04, "compare", "attr"),
}
Program = tuple[tuple[str, str], ...]  # operation and argument of each step
ORDERS = {"left of": ("x", "to the left of"), "above": ("y", "above")}  # in a question: (axis, as GQA names it)


@dataclass(frozen=True, slots=True)
class GraphAsked(scenes.Asked):
    """A question of a scene graph.

    Attributes:
        group: the answers it is compared with, GQA's `groups.global`; None where it is yes or no.
        program: operation and argument of each step.
        entails: the questions whose answers follow from this one's.
    """

    group: str | None
    program: Program
    entails: tuple[str, ...] = ()


def write(
    root: Path,
    *,
    train_images: int = 2000,
    val_images: int = 200,
    image_size: int = 48,
    questions_per_image: int = 6,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the data set under `root` unless it is there already, and return `root`.

    There are `train_balanced`, and `balanced` and `all` of `val` and `testdev`, each with `val_images` images.

    Args:
        image_size: side of the square images in pixels.
        questions_per_image: balanced ones, on average.

    Raises:
        InputError: a setting is out of range, or `root` holds something else.
    """
    settings: dict[str, int | str] = {
        "version": VERSION,
        "benchmark": "gqa",
        "train_images": train_images,
        "val_images": val_images,
        "image_size": image_size,
        "questions_per_image": questions_per_image,
        "seed": seed,
    }
    refuse_small("GQA shapes", settings, LEAST)

    def draw(folder: Path) -> None:
        (folder / "images").mkdir()
        for first_id, split, images in ((1, "train", train_images), (2, "val", val_images), (3, "testdev", val_images)):
            questions: dict[str, dict[str, Any]] = {}
            rng = random.Random(f"{seed} gqa {split}")
            asker = scenes.Asker(rng, askable, {kind: share for kind, (share, _, _) in KINDS.items()})
            for number in bar(range(images), doing=f"generating {split}", unit="images", shown=progress):
                scene, asked = asker.scene(questions_per_image)
                image_id = f"{first_id}{number:06d}"
                picture = scenes.paint(rng, scene, image_size)
                picture.save(folder / "images" / f"{image_id}.jpg", quality=95, subsampling=0)
                questions |= _records(image_id, asked, list(askable(scene)))
            balanced = {key: record for key, record in questions.items() if record["isBalanced"]}
            (folder / f"{split}_balanced_questions.json").write_text(json.dumps(balanced))
            if split != "train":
                (folder / f"{split}_all_questions.json").write_text(json.dumps(questions))

    return write_once(root, "GQA shapes", settings, draw)


# --- questions ----------------------------------------------------------------------------------------


def askable(scene: list[Shape]) -> Iterator[GraphAsked]:
    """Every unambiguous question about the scene."""
    yield from _about_presence(scene)
    colors, forms = [shape.color for shape in scene], [shape.form for shape in scene]
    for number, shape in enumerate(scene):
        if forms.count(shape.form) == 1:
            yield from _about_form(shape, number)
        if colors.count(shape.color) == 1:
            yield from _about_color(shape, number)
    yield from _about_order([shape for shape in scene if colors.count(shape.color) == 1])
    yield from _about_likeness([shape for shape in scene if forms.count(shape.form) == 1])


def _whether(kind: str, text: str, is_so: bool, program: Program, entails: tuple[str, ...] = ()) -> GraphAsked:
    """A question that is answered with yes or no."""
    return GraphAsked(kind, text, "yes" if is_so else "no", YES_NO, None, program, entails)


def _about_presence(scene: list[Shape]) -> Iterator[GraphAsked]:
    """`Is there a circle?`, `Is there a red circle?`, `Is there a circle and a star?`"""
    there = {
        **{form: any(shape.form == form for shape in scene) for form in ATTRIBUTES["form"]},
        **{f"{color} shape": any(shape.color == color for shape in scene) for color in ATTRIBUTES["color"]},
    }
    for name, is_there in there.items():
        yield _whether("exists", f"Is there a {name}?", is_there, (("select", name), ("exist", "?")))
    for color, form in product(ATTRIBUTES["color"], ATTRIBUTES["form"]):
        # A "no" is only asked where the colour or the form is there: else looking for one of them would do.
        if there[form] or there[f"{color} shape"]:
            both = any((shape.color, shape.form) == (color, form) for shape in scene)
            parts = (f"Is there a {form}?", f"Is there a {color} shape?") if both else ()
            program = (("select", form), ("filter color", color), ("exist", "?"))
            yield _whether("exists", f"Is there a {color} {form}?", both, program, parts)
    for one, other in combinations(ATTRIBUTES["form"], 2):
        if there[one] or there[other]:
            both = there[one] and there[other]
            parts = (f"Is there a {one}?", f"Is there a {other}?") if both else ()
            steps = (("select", one), ("exist", "?"), ("select", other), ("exist", "?"), ("and", ""))
            yield _whether("logical", f"Is there a {one} and a {other}?", both, steps, parts)


def _about_form(shape: Shape, number: int) -> Iterator[GraphAsked]:
    """What can be asked of the only shape of its form."""
    form = shape.form
    select = (("select", f"{form} ({number})"),)
    there = f"Is there a {form}?"
    colored = (there, f"Is there a {shape.color} {form}?", f"Is the {form} {shape.color}?")
    for kind, known, entails in (("color", shape.color, colored), ("size", shape.size, (there,))):
        program = (*select, ("query", kind))
        yield GraphAsked(kind, f"What {kind} is the {form}?", known, ATTRIBUTES[kind], kind, program, entails)
    yield from _about_place(shape, form, select)
    for color in ATTRIBUTES["color"]:
        program = (*select, ("verify color", color))
        is_so = color == shape.color
        yield _whether("attribute", f"Is the {form} {color}?", is_so, program, colored[:2] if is_so else (there,))
        for choices in ((shape.color, color), (color, shape.color)) if not is_so else ():
            program = (*select, ("choose color", "|".join(choices)))
            text = f"Is the {form} {choices[0]} or {choices[1]}?"
            yield GraphAsked("choose", text, shape.color, choices, "color", program, colored)


def _about_color(shape: Shape, number: int) -> Iterator[GraphAsked]:
    """What can be asked of the only shape of its colour."""
    name = f"{shape.color} shape"
    select = (("select", f"shape ({number})"), ("filter color", shape.color))
    entails = (f"Is there a {name}?", f"Is there a {shape.color} {shape.form}?")
    text, program = f"What shape is the {shape.color} object?", (*select, ("query", "name"))
    yield GraphAsked("shape", text, shape.form, ATTRIBUTES["form"], "shape", program, entails)
    yield from _about_place(shape, name, select)


def _about_place(shape: Shape, name: str, select: Program) -> Iterator[GraphAsked]:
    """`Where is the circle?`"""
    if min(abs(shape.x - 0.5), abs(shape.y - 0.5)) >= scenes.OFF_CENTER:
        place = f"{'top' if shape.y < 0.5 else 'bottom'} {'left' if shape.x < 0.5 else 'right'}"
        program = (*select, ("query", "position"))
        entails = (f"Is there a {name}?",)
        yield GraphAsked("position", f"Where is the {name}?", place, PLACES, "position", program, entails)


def _about_order(shapes: list[Shape]) -> Iterator[GraphAsked]:
    """`Is the red shape left of the blue shape?`, of shapes that are the only ones of their colour."""
    for (one, other), (words, (axis, relation)) in product(permutations(shapes, 2), ORDERS.items()):
        difference = getattr(other, axis) - getattr(one, axis)
        if abs(difference) >= scenes.CLEAR:
            first, second = f"{one.color} shape", f"{other.color} shape"
            entails = (f"Is the {second} {words} the {first}?", f"Is there a {first}?", f"Is there a {second}?")
            program = (("select", "shape"), ("filter color", one.color), ("verify rel", f"{second},{relation},o"))
            yield _whether("relation", f"Is the {first} {words} the {second}?", difference > 0, program, entails)


def _about_likeness(shapes: list[Shape]) -> Iterator[GraphAsked]:
    """`Are the circle and the star the same color?`, of shapes that are the only ones of their form."""
    for one, other in combinations(shapes, 2):
        program = (("select", one.form), ("select", other.form), ("same color", ""))
        entails = (f"Is there a {one.form}?", f"Is there a {other.form}?")
        text = f"Are the {one.form} and the {other.form} the same color?"
        yield _whether("same", text, one.color == other.color, program, entails)


# --- GQA's records ------------------------------------------------------------------------------------


def _records(image_id: str, asked: list[GraphAsked], possible: list[GraphAsked]) -> dict[str, dict[str, Any]]:
    """An image's questions by id: those that were asked, and what they entail."""
    by_text = {question.text: question for question in possible}
    balanced = {question.text for question in asked}
    entailed = [by_text[text] for question in asked for text in question.entails if text not in balanced]
    texts = dict.fromkeys(question.text for question in [*asked, *entailed])
    ids = {text: f"{image_id}{number:03d}" for number, text in enumerate(texts)}
    return {key: _record(image_id, by_text[text], ids, text in balanced) for text, key in ids.items()}


def _record(image_id: str, question: GraphAsked, ids: dict[str, str], balanced: bool) -> dict[str, Any]:
    _, structural, semantic = KINDS[question.kind]
    program = [
        {"operation": operation, "dependencies": _dependencies(operation, step), "argument": argument}
        for step, (operation, argument) in enumerate(question.program)
    ]
    return {
        "semantic": program,
        "entailed": [ids[text] for text in question.entails if text in ids],
        "equivalent": [ids[question.text]],
        "question": question.text,
        "imageId": image_id,
        "isBalanced": balanced,
        "groups": {"global": question.group, "local": f"{question.kind}-{question.text}"},
        "answer": question.answer,
        "types": {"detailed": question.kind, "semantic": semantic, "structural": structural},
        "fullAnswer": f"{question.answer.capitalize()}.",
    }


def _dependencies(operation: str, step: int) -> list[int]:
    """The steps that a step takes its input from."""
    return {"select": [], "same color": [0, 1], "and": [1, 3]}.get(operation, [step - 1])
