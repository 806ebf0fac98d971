"""The embedded data set: scenes of coloured shapes with questions (`scenes.py`), in VQAv2's own files.

It needs no download and is drawn in seconds, so it serves the first run, the tests and the
comparison of two changes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import Example
from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic.folder import refuse_small, write_once
from vlmvqa.progress import bar

VERSION = 5  # of what is drawn, asked and written; a data set made by another version is not reused
LEAST = {"train_images": 1, "val_images": 1, "image_size": scenes.SMALLEST_IMAGE, "questions_per_image": 1}

write_submission = vqav2.write_submission  # the files are VQAv2's


def read(
    root: Path,
    split: str,
    *,
    prompt: str,
    max_samples: int | None,
    bad_records: BadRecords,
    **settings: int,
) -> list[Example]:
    """The generated set, drawn at first use, read back by the loader of the real one."""
    write(root, **settings, progress=True)
    return vqav2.read(root, split, prompt=prompt, max_samples=max_samples, bad_records=bad_records)


def files(root: Path, split: str, **settings: int) -> list[Path]:
    """What a split is read from, drawn at first use."""
    write(root, **settings, progress=True)
    return vqav2.files(root, split)


def write(
    root: Path,
    *,
    train_images: int = 12000,
    val_images: int = 400,
    image_size: int = 48,
    questions_per_image: int = 6,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the data set under `root` unless it is there already, and return `root`.

    It appears whole or not at all, so several processes may ask for it at once. The validation images
    depend on `seed`, `image_size` and `questions_per_image` alone, not on the number of training images.

    Args:
        image_size: side of the square images in pixels; below 64 the shapes get small.
        questions_per_image: on average; single images have one more or one less.

    Raises:
        InputError: a setting is out of range, or `root` holds something else.
    """
    settings = {
        "version": VERSION,
        "train_images": train_images,
        "val_images": val_images,
        "image_size": image_size,
        "questions_per_image": questions_per_image,
        "seed": seed,
    }
    refuse_small("shapes", settings, LEAST)

    def draw(folder: Path) -> None:
        for split, first_id, images in (("train2014", 1, train_images), ("val2014", 1_000_001, val_images)):
            _write_split(folder, split, range(first_id, first_id + images), settings, progress)

    return write_once(root, "shapes", settings, draw)


# --- VQAv2's files ------------------------------------------------------------------------------------


def _annotators(rng: random.Random, question: scenes.Asked) -> list[dict[str, Any]]:
    """Ten people's answers: of three questions in ten, one to three of them are wrong."""
    wrong = rng.choices((1, 2, 3), (3, 2, 1))[0] if rng.random() < 0.3 else 0
    others = [choice for choice in question.choices if choice != question.answer]
    answers = [rng.choice(others) for _ in range(wrong)] + [question.answer] * (10 - wrong)
    rng.shuffle(answers)
    return [
        {"answer": answer, "answer_confidence": "yes" if answer == question.answer else "maybe", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]


def _write_split(root: Path, split: str, image_ids: range, settings: dict[str, int], progress: bool) -> None:
    """One split's images, questions file and annotations file."""
    rng = random.Random(f"{settings['seed']} {split}")
    asker = scenes.Asker(rng, scenes.askable, {kind: share for kind, (share, _, _) in scenes.KINDS.items()})
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir()
    for image_id in bar(image_ids, doing=f"generating {split}", unit="images", shown=progress):
        scene, asked = asker.scene(settings["questions_per_image"])
        image = scenes.paint(rng, scene, settings["image_size"])
        image.save(root / split / f"COCO_{split}_{image_id:012d}.jpg", quality=95, subsampling=0)
        for number, question in enumerate(asked):
            _, question_type, answer_type = scenes.KINDS[question.kind]
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append({**ids, "question": question.text})
            annotations.append(
                {
                    **ids,
                    "question_type": question_type,
                    "answer_type": answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": _annotators(rng, question),
                }
            )
    header = {"info": {"description": "coloured shapes"}, "data_type": "shapes", "data_subtype": split}
    task = {**header, "task_type": "Open-Ended"}
    (root / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({**task, "questions": questions}))
    (root / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({**header, "annotations": annotations}))
