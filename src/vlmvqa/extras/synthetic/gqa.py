"""Synthetic GQA: scenes of coloured shapes with questions about their scene graphs, in GQA's files.

As in GQA (Hudson & Manning 2019), each question has a program over the scene graph and entails other questions: an
answer that the circle is red entails that there is a circle.

    *_balanced    questions sampled such that no question text has a most frequent answer (`scene.BalancedSampler`)
    *_all         these and the questions that they entail, not balanced
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic.atomic_folder import generated_once
from vlmvqa.extras.synthetic.scene import ATTRIBUTES, PLACES, Program, SceneQuestion, Shape, yes_no
from vlmvqa.ranks import bar

VERSION = 1  # of the generated images, questions and files
MINIMUMS = {"train_images": 1, "val_images": 1, "image_size": scenes.MIN_IMAGE_SIZE, "questions_per_image": 1}

# kind of question: (weight, structural type, semantic type)
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
ORDERS = {"left of": ("x", "to the left of"), "above": ("y", "above")}  # words of the question: (axis, GQA's relation)


@generated_once("GQA shapes", MINIMUMS, version=VERSION, benchmark="gqa")
def write(
    folder: Path,
    *,
    train_images: int = 2000,
    val_images: int = 200,
    image_size: int = 48,
    questions_per_image: int = 6,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write `train_balanced`, and `balanced` and `all` of `val` and `testdev`; `image_size` is in pixels.

    `val` and `testdev` have `val_images` images each. `questions_per_image` is an average, of balanced questions.
    """
    (folder / "images").mkdir()
    for first_id, split, images in ((1, "train", train_images), (2, "val", val_images), (3, "testdev", val_images)):
        questions: dict[str, dict[str, Any]] = {}
        rng = random.Random(f"{seed} gqa {split}")
        sampler = scenes.BalancedSampler(rng, scene_questions, KINDS)
        for number in bar(range(images), doing=f"generating {split}", unit="images", shown=progress):
            scene, sampled = sampler.sample(questions_per_image)
            image_id = f"{first_id}{number:06d}"
            scenes.save_image(rng, scene, image_size, folder / "images" / f"{image_id}.jpg")
            questions |= _records(image_id, sampled, list(scene_questions(scene)))
        balanced = {key: record for key, record in questions.items() if record["isBalanced"]}
        (folder / f"{split}_balanced_questions.json").write_text(json.dumps(balanced))
        if split != "train":
            (folder / f"{split}_all_questions.json").write_text(json.dumps(questions))


# --- questions ----------------------------------------------------------------------------------------


def scene_questions(scene: list[Shape]) -> Iterator[SceneQuestion]:
    """Yield every unambiguous question about the scene."""
    yield from _presence_questions(scene)
    colors, forms = [shape.color for shape in scene], [shape.form for shape in scene]
    for number, shape in enumerate(scene):
        form, color = shape.form, shape.color
        names: dict[str, Program] = {}  # of the shape, where only this one has it, and the steps that select it
        if forms.count(form) == 1:
            names[form] = (("select", f"{form} ({number})"),)
            yield from _form_questions(shape, names[form])
        if colors.count(color) == 1:
            names[f"{color} shape"] = (("select", f"shape ({number})"), ("filter color", color))
            text, program = f"What shape is the {color} object?", (*names[f"{color} shape"], ("query", "name"))
            parts = (f"Is there a {color} shape?", f"Is there a {color} {form}?")
            yield SceneQuestion("shape", text, form, ATTRIBUTES["form"], "shape", program, parts)
        for name, select in names.items():
            text, program = f"Where is the {name}?", (*select, ("query", "position"))
            if place := shape.place:
                yield SceneQuestion("position", text, place, PLACES, "position", program, (f"Is there a {name}?",))
    yield from _order_questions([shape for shape in scene if colors.count(shape.color) == 1])
    yield from _comparison_questions([shape for shape in scene if forms.count(shape.form) == 1])


def _presence_questions(scene: list[Shape]) -> Iterator[SceneQuestion]:
    """Yield `Is there a circle?`, `Is there a red circle?`, `Is there a circle and a star?`."""
    present = {
        **{form: any(shape.form == form for shape in scene) for form in ATTRIBUTES["form"]},
        **{f"{color} shape": any(shape.color == color for shape in scene) for color in ATTRIBUTES["color"]},
    }
    for name, is_present in present.items():
        yield yes_no("exists", f"Is there a {name}?", is_present, (("select", name), ("exist", "?")))
    for color, form in product(ATTRIBUTES["color"], ATTRIBUTES["form"]):
        # With "no" as the answer, colour or form must be present: otherwise finding neither would be enough.
        if present[form] or present[f"{color} shape"]:
            both = any((shape.color, shape.form) == (color, form) for shape in scene)
            parts = (f"Is there a {form}?", f"Is there a {color} shape?") if both else ()
            program = (("select", form), ("filter color", color), ("exist", "?"))
            yield yes_no("exists", f"Is there a {color} {form}?", both, program, parts)
    for one, other in combinations(ATTRIBUTES["form"], 2):
        if present[one] or present[other]:
            both = present[one] and present[other]
            parts = (f"Is there a {one}?", f"Is there a {other}?") if both else ()
            steps = (("select", one), ("exist", "?"), ("select", other), ("exist", "?"), ("and", ""))
            yield yes_no("logical", f"Is there a {one} and a {other}?", both, steps, parts)


def _form_questions(shape: Shape, select: Program) -> Iterator[SceneQuestion]:
    """Yield the questions about the attributes of the only shape of its form."""
    form, exists = shape.form, f"Is there a {shape.form}?"
    has_color = (exists, f"Is there a {shape.color} {form}?", f"Is the {form} {shape.color}?")
    for kind, value, entails in (("color", shape.color, has_color), ("size", shape.size, (exists,))):
        program = (*select, ("query", kind))
        yield SceneQuestion(kind, f"What {kind} is the {form}?", value, ATTRIBUTES[kind], kind, program, entails)
    for color in ATTRIBUTES["color"]:
        program = (*select, ("verify color", color))
        same = color == shape.color
        yield yes_no("attribute", f"Is the {form} {color}?", same, program, has_color[:2] if same else (exists,))
        for choices in ((shape.color, color), (color, shape.color)) if not same else ():
            program = (*select, ("choose color", "|".join(choices)))
            text = f"Is the {form} {choices[0]} or {choices[1]}?"
            yield SceneQuestion("choose", text, shape.color, choices, "color", program, has_color)


def _order_questions(shapes: list[Shape]) -> Iterator[SceneQuestion]:
    """Yield `Is the red shape left of the blue shape?` for shapes with unique colours."""
    for (one, other), (words, (axis, relation)) in product(permutations(shapes, 2), ORDERS.items()):
        difference = getattr(other, axis) - getattr(one, axis)
        if abs(difference) >= scenes.MIN_DIFFERENCE:
            first, second = f"{one.color} shape", f"{other.color} shape"
            entails = (f"Is the {second} {words} the {first}?", f"Is there a {first}?", f"Is there a {second}?")
            program = (("select", "shape"), ("filter color", one.color), ("verify rel", f"{second},{relation},o"))
            yield yes_no("relation", f"Is the {first} {words} the {second}?", difference > 0, program, entails)


def _comparison_questions(shapes: list[Shape]) -> Iterator[SceneQuestion]:
    """Yield `Are the circle and the star the same color?` for shapes with unique forms."""
    for one, other in combinations(shapes, 2):
        program = (("select", one.form), ("select", other.form), ("same color", ""))
        entails = (f"Is there a {one.form}?", f"Is there a {other.form}?")
        text = f"Are the {one.form} and the {other.form} the same color?"
        yield yes_no("same", text, one.color == other.color, program, entails)


# --- GQA's records ------------------------------------------------------------------------------------


def _records(image_id: str, sampled: list[SceneQuestion], possible: list[SceneQuestion]) -> dict[str, dict[str, Any]]:
    """Return an image's records by question id: the sampled questions and those they entail."""
    by_text = {question.text: question for question in possible}
    balanced = {question.text for question in sampled}
    entailed = [by_text[text] for question in sampled for text in question.entails if text not in balanced]
    texts = dict.fromkeys(question.text for question in [*sampled, *entailed])
    ids = {text: f"{image_id}{number:03d}" for number, text in enumerate(texts)}
    return {key: _record(image_id, by_text[text], ids, text in balanced) for text, key in ids.items()}


def _record(image_id: str, question: SceneQuestion, ids: dict[str, str], balanced: bool) -> dict[str, Any]:
    _, structural, semantic = KINDS[question.kind]
    inputs = {"select": [], "same color": [0, 1], "and": [1, 3]}  # steps before it; by default the previous one
    program = [
        {"operation": operation, "dependencies": inputs.get(operation, [step - 1]), "argument": argument}
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
