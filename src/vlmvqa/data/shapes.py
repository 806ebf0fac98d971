"""The embedded data set: scenes of coloured shapes with questions (`scenes.py`), in VQAv2's own files.

It needs no download and is drawn in seconds, so it serves the first run, the tests and the
comparison of two changes.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import uuid
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmvqa.data import scenes, vqav2
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError

VERSION = 5  # of what is drawn, asked and written; a data set made by another version is not reused
SMALLEST_IMAGE = 32


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
    train_images: int,
    val_images: int,
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
    _check(settings)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _reuse(root, settings)
    unfinished = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        for split, first_id, images in (("train2014", 1, train_images), ("val2014", 1_000_001, val_images)):
            _write_split(unfinished, split, range(first_id, first_id + images), settings, progress)
        (unfinished / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
        os.rename(unfinished, root)
    except OSError as error:
        # Another process finished first: a folder cannot be renamed over one that holds files.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return _reuse(root, settings)
        raise InputError(
            f"cannot write the shapes data set to {root}: {error.strerror}; choose another data.root."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _check(settings: dict[str, int]) -> None:
    """Refuse numbers no data set can be made of."""
    least = {"train_images": 1, "val_images": 1, "image_size": SMALLEST_IMAGE, "questions_per_image": 1}
    for name, minimum in least.items():
        if settings[name] < minimum:
            raise InputError(f"the shapes data set needs {name} of at least {minimum}, not {settings[name]}.")


def _reuse(root: Path, settings: dict[str, int]) -> Path:
    """`root`, if it was written with these settings."""
    try:
        found = json.loads((root / "settings.json").read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{root} exists and is not a shapes data set (no readable settings.json); choose another data.root."
        ) from None
    if found != settings:
        raise InputError(
            f"{root} was written with other settings ({_differences(found, settings)}); "
            "delete it, or choose another data.root."
        )
    return root


def _differences(found: Any, wanted: dict[str, int]) -> str:
    """`seed 0, now 1`: what differs between two settings."""
    found = found if isinstance(found, dict) else {}
    return ", ".join(
        f"{name} {found.get(name)}, now {value}" for name, value in wanted.items() if found.get(name) != value
    )


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
    asker = scenes.Asker(rng)
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir()
    for image_id in tqdm(image_ids, desc=f"drawing {split}", unit="image", disable=not progress):
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
