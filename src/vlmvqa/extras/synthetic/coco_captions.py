"""Synthetic COCO captions: scenes of coloured shapes with five captions each, in the files of COCO and Karpathy."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from vlmvqa.extras.synthetic import scene as scenes
from vlmvqa.extras.synthetic.atomic_folder import generate_once
from vlmvqa.ranks import bar

VERSION = 1  # of the generated images, captions and files
MINIMUMS = {"train_images": 1, "val_images": 2, "image_size": scenes.MIN_IMAGE_SIZE}
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
    """Return `root`, generating the dataset first unless it exists (`generate_once`); `image_size` is in pixels.

    Splits: `train2014`, `val2014`, and Karpathy's: train is train2014, val and test are halves of val2014.
    """
    settings = {
        "version": VERSION,
        "benchmark": "coco captions",
        "train_images": train_images,
        "val_images": val_images,
        "image_size": image_size,
        "seed": seed,
    }

    def generate(folder: Path) -> None:
        karpathy: list[dict[str, Any]] = []
        (folder / "annotations").mkdir()
        for split, first_id, count in (("train2014", 1, train_images), ("val2014", 1_000_001, val_images)):
            rng = random.Random(f"{seed} captions {split}")
            images, annotations = [], []
            (folder / split).mkdir()
            ids = range(first_id, first_id + count)
            for image_id in bar(ids, doing=f"generating {split}", unit="images", shown=progress):
                scene = scenes.random_scene(rng)
                name, captions = f"COCO_{split}_{image_id:012d}.jpg", describe(scene)
                scenes.save_image(rng, scene, image_size, folder / split / name)
                images.append({"id": image_id, "file_name": name, "height": image_size, "width": image_size})
                annotations += [
                    {"image_id": image_id, "id": 10 * image_id + number, "caption": caption}
                    for number, caption in enumerate(captions)
                ]
                karpathy_split = "train" if split == "train2014" else ("val", "test")[image_id % 2]
                karpathy.append(_karpathy_record(image_id, split, name, karpathy_split, captions))
            content = {"info": {"description": "coloured shapes"}, "images": images, "annotations": annotations}
            (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
        content = {"images": karpathy, "dataset": "coco"}
        (folder / "annotations" / "dataset_coco.json").write_text(json.dumps(content))

    return generate_once(root, "caption shapes", settings, MINIMUMS, generate)


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


def _karpathy_record(image_id: int, folder: str, name: str, split: str, captions: list[str]) -> dict[str, Any]:
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
        "split": split,
        "sentids": ids,
        "sentences": sentences,
    }
