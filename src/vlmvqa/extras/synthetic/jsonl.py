"""The embedded scenes as data of one's own: a line of JSON for each question.

root/train.jsonl, val.jsonl    {"id", "image", "question", "answers", "question_type"}
root/pictures/                 the scenes, drawn by `shapes.py`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmvqa.data.datasets import vqav2
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2
from vlmvqa.extras.synthetic.folder import refuse_small, write_once

VERSION = 1  # of what is written


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

    Args:
        image_size: side of the square images in pixels.

    Raises:
        InputError: a setting is out of range, or `root` holds something else.
    """
    drawn = {
        "train_images": train_images,
        "val_images": val_images,
        "image_size": image_size,
        "questions_per_image": questions_per_image,
        "seed": seed,
    }
    refuse_small("jsonl", drawn, synthetic_vqav2.LEAST)

    def draw(folder: Path) -> None:
        pictures = synthetic_vqav2.write(folder / "pictures", **drawn, progress=progress)
        for split in ("train", "val"):
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for example in vqav2.read(pictures, split):
                    assert isinstance(example.image, Path)
                    image = example.image.relative_to(folder).as_posix()
                    for question in example.questions:
                        record: dict[str, Any] = {"id": question.id, "image": image, "question": question.text}
                        record |= {"answers": [question.target], "question_type": question.question_type}
                        file.write(json.dumps(record) + "\n")

    return write_once(root, "jsonl", {"version": VERSION, "benchmark": "jsonl", **drawn}, draw)
