"""Encode every image once and write the features that `store.py` reads; a killed run is resumed where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlmvqa.data.example import Example
from vlmvqa.errors import BadRecords, InputError, counted
from vlmvqa.extras.feature_cache.store import (
    FEATURES,
    FORMAT,
    INDEX,
    FeatureStore,
    ImageId,
    Key,
    bytes_per_image,
    changed_image,
    differences,
    file_size,
    read_index,
    sample_checksums,
)
from vlmvqa.extras.vision.several_images import refuse_several_images
from vlmvqa.models.interface import DTYPES
from vlmvqa.paths import replace_file
from vlmvqa.ranks import bar
from vlmvqa.sequence.rows import Document

if TYPE_CHECKING:
    from vlmvqa.models.vision import VisionEncoder


class _Images(Dataset[tuple[int, Tensor, str]]):
    """The images still to encode: row in the file, `float[3, H, H]`, and the error of an unreadable (blank) one.

    The main process handles the errors.
    """

    def __init__(
        self,
        images: Sequence[tuple[int, Example]],
        load_images: Callable[[Example], Document],
        shape: tuple[int, int, int],
    ) -> None:
        self.images, self.load_images, self.shape = images, load_images, shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor, str]:
        row, example = self.images[index]
        try:
            (pixels,) = self.load_images(example).images
            return row, pixels, ""
        except InputError as error:
            return row, torch.zeros(self.shape), str(error)


def unique_images(examples: Iterable[Example]) -> dict[ImageId, Example]:
    """Return one example of each image by its id, in order.

    Raises:
        InputError: two files have the same id, or questions are about several images.
    """
    examples = list(examples)
    refuse_several_images(examples, "data.feature_cache")
    found: dict[ImageId, Example] = {}
    for example in examples:
        first = found.setdefault(example.image_id, example)
        if isinstance(first.image, Path) and first.image != example.image:
            raise InputError(f"image id {example.image_id} names both {first.name} and {example.name}; fix the data")
    return found


def disk_space(folder: Path, images: int, shape: tuple[int, int], dtype: str) -> str:
    """Return a sentence with the size of the features of a number of images; `shape` is N and Dv.

    Raises:
        InputError: the disk has too little space.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free, present = shutil.disk_usage(existing).free, file_size(folder / FEATURES)
    image_bytes = bytes_per_image(shape, DTYPES[dtype])
    total = images * image_bytes
    if total - present > free:
        smaller = ", use features.dtype=bfloat16" if dtype == "float32" else ""
        raise InputError(
            f"the features need {_size(total)}, {_size(total - present - free)} more than the disk of {folder} has; "
            f"free space there{smaller}, or choose another features.dir"
        )
    kept = f", {_size(present)} of them already present" if present else ""
    return (
        f"{counted(images, 'image')} of {shape[0]} tokens x {shape[1]} numbers in {dtype}, {_size(image_bytes)} each: "
        f"{_size(total)} of features in {folder}{kept}; {_size(free)} are free"
    )


def _size(count: int) -> str:
    return f"{tqdm.format_sizeof(count)}B"


def write(
    folder: Path,
    key: Key,
    vision: VisionEncoder,
    examples: Iterable[Example],
    load_images: Callable[[Example], Document],
    bad_records: BadRecords,
    *,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
) -> FeatureStore:
    """Encode every image that has no features yet, on the encoder's device and in its dtype.

    Args:
        key: the `feature_key` of the encoder; features of another key are replaced only if `overwrite` is set.
        load_images: returns an example's image as `float[3, H, H]`, as in training (`Processor.load_images`).
        workers: number of processes that decode images.

    Raises:
        InputError: the folder holds other features, an image is unreadable, or the disk is full.
    """
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch_size={batch_size} workers={workers}: use at least 1 image, 0 workers")
    images, shape = unique_images(examples), (vision.features.tokens, vision.features.width)
    if not images:
        raise InputError("the split has no images; check split and data.max_train_samples")
    ids, image_bytes = list(images), bytes_per_image(shape, DTYPES[key["dtype"]])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        skipped, encoded = _resume(folder, key, images, image_bytes, overwrite)
        index = {"key": key, "shape": shape, "ids": ids, "samples": sample_checksums(list(images.values()))}
        _write_index(folder, index, skipped)
        todo = [(row, images[image]) for row, image in enumerate(ids) if image not in encoded]
        inputs = 3 * len(vision.towers), vision.image_size, vision.image_size
        pixels, pin = _Images(todo, load_images, inputs), next(vision.parameters()).is_cuda
        loaded = DataLoader(pixels, batch_size, num_workers=workers, pin_memory=pin)
        with bar(doing="encoding", unit="images", total=len(ids), initial=len(encoded)) as count:
            for rows, features, errors in _encoded(vision, loaded, ids, key["dtype"]):
                unreadable = {ids[row]: why for row, why in zip(rows, errors, strict=True) if why}
                for why in unreadable.values():
                    bad_records.add_error(InputError(why))
                skipped |= unreadable
                if unreadable:
                    _write_index(folder, index, skipped)  # before the file has rows for these images
                _write_rows(folder / FEATURES, rows, features)
                for row in rows:
                    if ids[row] not in unreadable:
                        skipped.pop(ids[row], None)
                count.update(len(rows))
        _write_index(folder, index, skipped)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}); free space and resume with the same command, or "
            "choose another features.dir"
        ) from error
    if len(skipped) == len(ids):
        raise InputError("none of the images could be read; see the list of skipped records")
    return FeatureStore(folder)


def _resume(
    folder: Path, key: Key, images: Mapping[ImageId, Example], image_bytes: int, overwrite: bool
) -> tuple[dict[ImageId, str], set[ImageId]]:
    """Return the skipped and the encoded images of a folder; delete other features if `overwrite` is set."""
    found = read_index(folder) if (folder / INDEX).exists() else {}  # refuses folders of another format
    if found and (folder / FEATURES).exists():
        skipped = dict(found["skipped"])
        encoded = set(found["ids"][: file_size(folder / FEATURES) // image_bytes]) - set(skipped)
        reason = differences(found["key"], key)
        samples = ((image, crc) for image, crc in found["samples"] if image in encoded)
        if not reason and (found["ids"] != list(images) or changed_image(samples, images.values())):
            reason = "they belong to other images"
        if not reason:
            return skipped, encoded
        if not overwrite:
            raise InputError(
                f"{folder} has other features: {reason}; choose another features.dir, "
                "or replace them with features.overwrite=true"
            )
    for name in (FEATURES, INDEX):  # in this order: without an index, existing features are not used
        (folder / name).unlink(missing_ok=True)
    (folder / FEATURES).touch()
    return {}, set()


def _encoded(
    vision: VisionEncoder, loaded: Iterable[tuple[list[int], Tensor, list[str]]], ids: Sequence[ImageId], dtype: str
) -> Iterator[tuple[list[int], Tensor, list[str]]]:
    """Yield the rows, features and errors of each batch of `_Images`."""
    vision.eval()
    for rows, pixel_values, errors in loaded:
        rows = list(map(int, rows))
        with torch.inference_mode():
            yield rows, _encode(vision, [ids[row] for row in rows], pixel_values, dtype), errors


def _write_rows(path: Path, rows: Sequence[int], features: Tensor) -> None:
    """Write the features of images, each at its row of the file."""
    with path.open("r+b") as file:
        for row, one in zip(rows, features, strict=True):
            content = one.view(torch.uint8).numpy().data
            file.seek(row * content.nbytes)
            file.write(content)


def _encode(vision: VisionEncoder, ids: Sequence[ImageId], pixel_values: Tensor, dtype: str) -> Tensor:
    """Return the features `dtype[I, N, Dv]` of images `float[I, 3, H, H]`."""
    weight = next(vision.parameters())
    features = vision(pixel_values.to(weight.device, weight.dtype, non_blocking=True)).to(DTYPES[dtype])
    finite = features.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise InputError(
            f"image {ids[finite.index(False)]}: its features are not finite in {dtype}; use "
            "features.dtype=bfloat16 or float32, and if they are not finite there too, check the encoder's weights"
        )
    return features.cpu()


def _write_index(folder: Path, index: Mapping[str, Any], skipped: Mapping[ImageId, str]) -> None:
    replace_file(folder / INDEX, json.dumps({"format": FORMAT, **index, "skipped": list(skipped.items())}) + "\n")
