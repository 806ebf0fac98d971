"""Synthetic COCO captions: scenes of coloured shapes with five captions each, in the files of COCO and Karpathy."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic.atomic_folder import generated_once
from vlmvqa.ranks import bar

VERSION = 1  # of the generated images, captions and files
MINIMUMS = {"train_images": 1, "val_images": 2, "image_size": scenes.MIN_IMAGE_SIZE}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five"}


@generated_once("caption shapes", MINIMUMS, version=VERSION, benchmark="coco captions")
def write(
    folder: Path,
    *,
    train_images: int = 1200,
    val_images: int = 400,
    image_size: int = 48,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write train2014, val2014 and Karpathy's splits; `image_size` is in pixels.

    Karpathy's train is train2014, val and test are halves of val2014.
    """
    karpathy: list[dict[str, Any]] = []
    (folder / "annotations").mkdir()
    for split, first_id, count in (("train2014", 1, train_images), ("val2014", 1_000_001, val_images)):
        rng = random.Random(f"{seed} captions {split}")
        images, annotations = [], []
        (folder / split).mkdir()
        ids = range(first_id, first_id + count)
        for image_id in bar(ids, doing=f"generating {split}", unit="images", shown=progress):
            scene = scenes.random_scene(rng)
            name, captions = f"COCO_{split}_{image_id:012d}.jpg", dict(enumerate(describe(scene), 10 * image_id))
            scenes.save_image(rng, scene, image_size, folder / split / name)
            images.append({"id": image_id, "file_name": name, "height": image_size, "width": image_size})
            annotations += [{"image_id": image_id, "id": key, "caption": text} for key, text in captions.items()]
            record = {"filepath": split, "filename": name, "imgid": image_id, "cocoid": image_id}
            record["split"] = "train" if split == "train2014" else ("val", "test")[image_id % 2]
            sentences = [
                {"tokens": text.replace(",", "").split(), "raw": text, "imgid": image_id, "sentid": key}
                for key, text in captions.items()
            ]
            karpathy.append({**record, "sentids": list(captions), "sentences": sentences})
        content = {"info": {"description": "coloured shapes"}, "images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    content = {"images": karpathy, "dataset": "coco"}
    (folder / "annotations" / "dataset_coco.json").write_text(json.dumps(content))


def describe(scene: list[scenes.Shape]) -> list[str]:
    """Return five captions that list the shapes with their counts, always in the same order."""
    counts = Counter((shape.color, shape.form) for shape in scene)
    parts = [
        f"{NUMBERS[counts[color, form]]} {color} {form}" + ("s" if counts[color, form] > 1 else "")
        for color in scenes.COLORS
        for form in scenes.FORMS
        if counts[color, form]
    ]
    listed = _join(parts)
    return [
        listed,
        f"there {'are' if len(scene) > 1 else 'is'} {listed}",
        f"a picture of {listed}",
        f"{listed} on a light background",
        f"{_join(parts[::-1])} in a picture",
    ]


def _join(parts: list[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
