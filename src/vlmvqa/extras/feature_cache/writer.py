"""Encode every image once and write the features that `features.py` reads back; the forecast of their size.

Every file is written under another name and renamed, and a folder's index comes last: a run that is killed at any time
leaves whole shards, which are kept, and one unfinished, which is made again.

Legend: I images, N tokens an image, H height and width, Dv vision width.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError, counted
from vlmvqa.extras.feature_cache.store import (
    FORMAT,
    INDEX,
    KEY,
    STORED,
    FeatureKey,
    FeatureStore,
    ImageId,
    bytes_an_image,
    file_size,
    read_json,
    samples,
    shard_path,
)
from vlmvqa.progress import bar

if TYPE_CHECKING:
    from vlmvqa.models.vision import VisionEncoder

SHARD_BYTES = 2**28  # what a killed run has to do again: 680 images of DINOv2-B at 224 in bfloat16
Record = dict[str, Any]  # of a shard: the `ids` of its images, and `left_out`, pairs of an id and why
Pictures = tuple[Tensor, list[str | None]]  # of a batch: the pixels that can be had, and of each image why they cannot


@dataclass(frozen=True)
class Forecast:
    """What the features of so many images take on the disk.

    Attributes:
        shape: N and Dv.
        present: bytes of features in the folder already, which are kept or replaced.
        free: bytes free on its disk.
    """

    folder: Path
    images: int
    shape: tuple[int, int]
    dtype: str
    present: int
    free: int

    @property
    def bytes(self) -> int:
        return self.images * bytes_an_image(self.shape, STORED[self.dtype][0])

    def __str__(self) -> str:
        each = size(bytes_an_image(self.shape, STORED[self.dtype][0]))
        there = f", {size(self.present)} of them there already" if self.present else ""
        return (
            f"{counted(self.images, 'image')} of {self.shape[0]} tokens x {self.shape[1]} numbers in {self.dtype}, "
            f"{each} each: {size(self.bytes)} of features in {self.folder}{there}; {size(self.free)} are free"
        )

    def refuse(self) -> None:
        """Stop where the disk does not hold it."""
        missing = self.bytes - self.present - self.free
        if missing > 0:
            smaller = ", use features.dtype=bfloat16" if self.dtype == "float32" else ""
            raise InputError(
                f"the features need {size(self.bytes)}, {size(missing)} more than the disk of {self.folder} has; "
                f"free space there{smaller}, or choose another features.dir"
            )


def forecast(folder: Path, images: int, shape: tuple[int, int], dtype: str) -> Forecast:
    """What the features of so many images will take in `folder`; `shape`: the encoder's `tokens` and `width`."""
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    present = sum(map(file_size, folder.glob("shard-*")))
    return Forecast(folder, images, shape, dtype, present, shutil.disk_usage(disk).free)


def unique_images(examples: Iterable[Example]) -> dict[ImageId, Example]:
    """One example of each image, in order.

    Raises:
        InputError: one id names two files.
    """
    found: dict[ImageId, Example] = {}
    for example in examples:
        first = found.setdefault(example.image_id, example)
        if isinstance(first.image, Path) and first.image != example.image:
            raise InputError(f"image id {example.image_id} names both {first.name} and {example.name}; fix the data")
    return found


def write(
    folder: Path,
    key: FeatureKey,
    vision: VisionEncoder,
    examples: Iterable[Example],
    image: Callable[[Example], Tensor],
    bad_records: BadRecords,
    *,
    batch_size: int = 64,
    workers: int = 0,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> FeatureStore:
    """Encode every image once, on the encoder's device and in its dtype, going on where an earlier call stood.

    Args:
        image: the tensor `float[3, H, H]` of an example, as training makes it (`Processor.image`).
        bad_records: what happens to an image that cannot be read; one left out is remembered by the store.
        batch_size: images at a time.
        workers: processes that decode them.
        overwrite: replace what the folder holds, where it is not of the same images by the same key.
        shard_bytes: size of a file at most, unless a single image has more.

    Raises:
        InputError: the folder holds other features, an image cannot be read, or the disk is full.
    """
    images, shape = unique_images(examples), (vision.tokens, vision.width)
    if not images:
        raise InputError("the split holds no images; check split and data.max_train_samples")
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch_size={batch_size} workers={workers}: use at least 1 image and no fewer workers than 0")
    each = bytes_an_image(shape, STORED[key.dtype][0])
    compared = samples(list(images.values()))
    most = _claim(folder, key, list(images), compared, max(1, shard_bytes // each), overwrite)
    shards = list(_chunks(list(images), most))
    records = [_kept(shard_path(folder, number), ids, each, bad_records) for number, ids in enumerate(shards)]
    chunks = {number: list(_chunks(shards[number], batch_size)) for number, kept in enumerate(records) if kept is None}
    read = _read_pictures(images, [ids for batches in chunks.values() for ids in batches], image, workers, vision)
    kept = len(images) - sum(len(shards[number]) for number in chunks)
    done = bar(doing="encoding", unit="images", total=len(images), shown=progress, initial=kept)
    vision.eval()  # nothing is drawn
    with done, torch.inference_mode():
        for number, batches in chunks.items():
            encoded = (_encode(vision, ids, next(read), key.dtype, bad_records, done.update) for ids in batches)
            records[number] = _write_shard(folder, number, encoded)
    if not any(record["ids"] for record in records if record):
        raise InputError("none of the images could be read; see the listing of skipped records")
    _replace(folder / INDEX, {"key": asdict(key), "shape": shape, "shards": records, "samples": compared})
    return FeatureStore.open(folder, key)


def _claim(
    folder: Path,
    key: FeatureKey,
    ids: Sequence[ImageId],
    compared: Sequence[tuple[ImageId, int]],
    most: int,
    overwrite: bool,
) -> int:
    """Make the folder one for these features; how many images a shard has in it (`most`, if it is new)."""
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    if (folder / KEY).exists():
        found = read_json(folder / KEY)
        differences = key.differences(FeatureKey(**found["key"]))
        before = dict(found["samples"])
        done = {image for path in folder.glob("shard-*.json") for image in read_json(path)["ids"]}
        changed = any(image in done and before.get(image, now) != now for image, now in compared)
        if found["images"] != digest or changed:
            differences.append("they are of other images")
        if not differences:
            _replace(folder / KEY, {**found, "samples": compared})  # of those not encoded yet, some may be fixed by now
            return int(found["shard_images"])
        if not overwrite:
            raise InputError(
                f"{folder} holds other features: {'; '.join(differences)}; choose another features.dir, "
                "or replace them with features.overwrite=true"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / INDEX, folder / KEY, *folder.glob("shard-*")):
            old.unlink(missing_ok=True)
        _replace(folder / KEY, {"key": asdict(key), "images": digest, "samples": compared, "shard_images": most})
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another features.dir") from error
    return most


def _kept(path: Path, ids: Sequence[ImageId], each: int, bad_records: BadRecords) -> Record | None:
    """The record of a shard that an earlier call finished; None where it is to be made."""
    if not path.with_suffix(".json").exists():
        return None
    record = read_json(path.with_suffix(".json"))
    if record["left_out"] and bad_records.policy == "error":
        return None  # fixed since, perhaps; and if not, it is an error now
    if file_size(path) != each * len(record["ids"]) or len(record["ids"]) + len(record["left_out"]) != len(ids):
        return None
    for _, why in record["left_out"]:
        bad_records.add_error(InputError(why))
    return record


class _Pictures(Dataset[Tensor | str]):
    """Decoded images, or why one cannot be read: what then happens is decided in one place, not in the workers."""

    def __init__(self, examples: Iterable[Example], image: Callable[[Example], Tensor]) -> None:
        self.examples, self.image = list(examples), image

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.image(self.examples[index])
        except InputError as error:
            return str(error)


def _read_pictures(
    images: Mapping[ImageId, Example],
    batches: Iterable[Sequence[ImageId]],
    image: Callable[[Example], Tensor],
    workers: int,
    vision: VisionEncoder,
) -> Iterator[Pictures]:
    places = {image_id: place for place, image_id in enumerate(images)}
    yield from DataLoader(
        _Pictures(images.values(), image),
        batch_sampler=[[places[image_id] for image_id in ids] for ids in batches],
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=next(vision.parameters()).is_cuda,
        generator=torch.Generator(),  # its own, so that the caller's random state stays where it was
    )


def _collate(items: Sequence[Tensor | str]) -> Pictures:
    pixels = [item for item in items if isinstance(item, Tensor)]
    problems = [item if isinstance(item, str) else None for item in items]
    return torch.stack(pixels) if pixels else torch.empty(0), problems


def _encode(
    vision: VisionEncoder,
    ids: Sequence[ImageId],
    pictures: Pictures,
    dtype: str,
    bad_records: BadRecords,
    count: Callable[[int], Any],
) -> tuple[bytes, Record]:
    """A batch's features as they are stored, and its record."""
    pixels, problems = pictures
    left_out = [(image, why) for image, why in zip(ids, problems, strict=True) if why is not None]
    for _, why in left_out:
        bad_records.add_error(InputError(why))
    kept = [image for image, why in zip(ids, problems, strict=True) if why is None]
    content = b""
    if kept:
        weight = next(vision.parameters())
        stored = vision(pixels.to(weight.device, weight.dtype, non_blocking=True)).to(STORED[dtype][0])
        finite = stored.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise InputError(
                f"image {kept[finite.index(False)]}: its features are not finite in {dtype}; use "
                "features.dtype=bfloat16 or float32, and if they are not finite there too, check the encoder's weights"
            )
        bits = stored.cpu().view(torch.uint16) if dtype == "bfloat16" else stored.cpu()
        content = bits.numpy().astype(STORED[dtype][1], copy=False).tobytes()
    count(len(ids))
    return content, {"ids": kept, "left_out": left_out}


def _write_shard(folder: Path, number: int, batches: Iterable[tuple[bytes, Record]]) -> Record:
    """Write a shard as its batches come; its record."""
    path = shard_path(folder, number)
    for old in (folder / INDEX, path.with_suffix(".json")):
        old.unlink(missing_ok=True)
    partial = path.with_suffix(".partial")
    record: Record = {"ids": [], "left_out": []}
    try:
        # Written, not mapped: where the disk is full, a mapped file ends the process without a word.
        with partial.open("wb") as file:
            for content, batch in batches:
                file.write(content)
                record["ids"] += batch["ids"]
                record["left_out"] += batch["left_out"]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _replace(path.with_suffix(".json"), record)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        partial.unlink(missing_ok=True)
        raise InputError(
            f"the disk of {folder} is full; free space and run the same command again, which resumes at shard {number}"
        ) from error
    return record


def _chunks(ids: Sequence[ImageId], most: int) -> Iterator[list[ImageId]]:
    for start in range(0, len(ids), most):
        yield list(ids[start : start + most])


def _replace(path: Path, content: Record) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"format": FORMAT, **content}) + "\n")
    partial.replace(path)


def size(count: int) -> str:
    """Bytes in the units that disks are sold in."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= of:
            return f"{count / of:,.1f} {unit}"
    return f"{count} bytes"
