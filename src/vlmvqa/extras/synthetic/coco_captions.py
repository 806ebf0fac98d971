"""Scenes of coloured shapes with five captions each, in COCO's own files, with Karpathy's splits of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic.folder import refuse_small, write_once
from vlmvqa.progress import bar

VERSION = 1  # of what is drawn and written
LEAST = {"train_images": 1, "val_images": 2, "image_size": scenes.SMALLEST_IMAGE}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five"}


def write(
    root: Path,
    *,
    train_images: int = 1200,
    val_images: int = 400,
    image_size: int = 48,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the data set under `root` unless it is there already, and return `root`.

    There are `train2014`, `val2014`, and Karpathy's: his train is train2014, his val and test are halves of val2014.

    Args:
        image_size: side of the square images in pixels.

    Raises:
        InputError: a setting is out of range, or `root` holds something else.
    """
    settings: dict[str, int | str] = {
        "version": VERSION,
        "benchmark": "coco captions",
        "train_images": train_images,
        "val_images": val_images,
        "image_size": image_size,
        "seed": seed,
    }
    refuse_small("caption shapes", settings, LEAST)

    def draw(folder: Path) -> None:
        karpathy: list[dict[str, Any]] = []
        (folder / "annotations").mkdir()
        for split, first_id, count in (("train2014", 1, train_images), ("val2014", 1_000_001, val_images)):
            rng = random.Random(f"{seed} captions {split}")
            images, annotations = [], []
            (folder / split).mkdir()
            ids = range(first_id, first_id + count)
            for image_id in bar(ids, doing=f"generating {split}", unit="images", shown=progress):
                scene = scenes.draw_scene(rng)
                name, captions = f"COCO_{split}_{image_id:012d}.jpg", describe(scene)
                picture = scenes.paint(rng, scene, image_size)
                picture.save(folder / split / name, quality=95, subsampling=0)
                images.append({"id": image_id, "file_name": name, "height": image_size, "width": image_size})
                annotations += [
                    {"image_id": image_id, "id": 10 * image_id + number, "caption": caption}
                    for number, caption in enumerate(captions)
                ]
                part = "train" if split == "train2014" else ("val", "test")[image_id % 2]
                karpathy.append(_karpathy(image_id, split, name, part, captions))
            content = {"info": {"description": "coloured shapes"}, "images": images, "annotations": annotations}
            (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
        content = {"images": karpathy, "dataset": "coco"}
        (folder / "annotations" / "dataset_coco.json").write_text(json.dumps(content))

    return write_once(root, "caption shapes", settings, draw)


def describe(scene: list[scenes.Shape]) -> list[str]:
    """Five captions: what there is, counted, always in the same order."""
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
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _karpathy(image_id: int, folder: str, name: str, part: str, captions: list[str]) -> dict[str, Any]:
    ids = [10 * image_id + number for number in range(len(captions))]
    sentences = [
        {"tokens": caption.replace(",", "").split(), "raw": caption, "imgid": image_id, "sentid": key}
        for key, caption in zip(ids, captions, strict=True)
    ]
    return {
        "filepath": folder,
        "filename": name,
        "imgid": image_id,
        "cocoid": image_id,
        "split": part,
        "sentids": ids,
        "sentences": sentences,
    }
