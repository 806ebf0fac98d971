"""Synthetic VQAv2: scenes of coloured shapes with questions (`scene.py`), in VQAv2's files.

It needs no download and is generated in seconds, so it serves first runs, tests and comparisons of two changes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import Example
from vlmvqa.errors import BadRecords
from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic.atomic_folder import generated_once
from vlmvqa.ranks import bar

VERSION = 5  # of the generated images, questions and files; a dataset of another version is not reused
MINIMUMS = {"train_images": 1, "val_images": 1, "image_size": scenes.MIN_IMAGE_SIZE, "questions_per_image": 1}

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
    """Read a split with VQAv2's reader, generating the dataset on first use."""
    write(root, **settings, progress=True)
    return vqav2.read(root, split, prompt=prompt, max_samples=max_samples, bad_records=bad_records)


def files(root: Path, split: str, **settings: int) -> list[Path]:
    """Return the files that a split is read from, generating the dataset on first use."""
    write(root, **settings, progress=True)
    return vqav2.files(root, split)


@generated_once("shapes", MINIMUMS, version=VERSION)
def write(
    folder: Path,
    *,
    train_images: int = 12000,
    val_images: int = 400,
    image_size: int = 48,
    questions_per_image: int = 6,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write train2014 and val2014; `image_size` is in pixels.

    `questions_per_image` is an average: each image has that many, one more or one fewer. Validation images depend only
    on `seed`, `image_size` and `questions_per_image`, not on the number of training images.
    """
    for split, first_id, images in (("train2014", 1, train_images), ("val2014", 1_000_001, val_images)):
        rng = random.Random(f"{seed} {split}")
        sampler = scenes.BalancedSampler(rng, scenes.scene_questions, scenes.KINDS)
        questions: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (folder / split).mkdir()
        ids = range(first_id, first_id + images)
        for image_id in bar(ids, doing=f"generating {split}", unit="images", shown=progress):
            scene, sampled = sampler.sample(questions_per_image)
            scenes.save_image(rng, scene, image_size, folder / split / f"COCO_{split}_{image_id:012d}.jpg")
            for number, question in enumerate(sampled):
                _, question_type, answer_type = scenes.KINDS[question.kind]
                record = {"image_id": image_id, "question_id": image_id * 1000 + number}
                questions.append({**record, "question": question.text})
                record |= {"question_type": question_type, "answer_type": answer_type}
                record |= {"multiple_choice_answer": question.answer, "answers": _annotator_answers(rng, question)}
                annotations.append(record)
        header = {"info": {"description": "coloured shapes"}, "data_type": "shapes", "data_subtype": split}
        task = {**header, "task_type": "Open-Ended", "questions": questions}
        (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(task))
        content = json.dumps({**header, "annotations": annotations})
        (folder / f"v2_mscoco_{split}_annotations.json").write_text(content)


def _annotator_answers(rng: random.Random, question: scenes.SceneQuestion) -> list[dict[str, Any]]:
    """Return the answers of ten annotators; three questions in ten have one to three wrong answers."""
    wrong = rng.choices((1, 2, 3), (3, 2, 1))[0] if rng.random() < 0.3 else 0
    others = [choice for choice in question.choices if choice != question.answer]
    answers = [rng.choice(others) for _ in range(wrong)] + [question.answer] * (10 - wrong)
    rng.shuffle(answers)
    return [
        {"answer": answer, "answer_confidence": "yes" if answer == question.answer else "maybe", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]
