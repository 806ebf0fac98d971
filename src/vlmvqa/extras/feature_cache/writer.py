"""Encode every image once and write the features that `store.py` reads.

Every file is written under another name and then renamed, the folder's index last. A killed run leaves complete shards,
which are kept, and one incomplete shard, which is written again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmvqa.data.example import Example
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.feature_cache.store import (
    FORMAT,
    INDEX,
    KEY,
    STORED,
    FeatureKey,
    FeatureStore,
    ImageId,
    bytes_per_image,
    file_size,
    read_json,
    sample_checksums,
    shard_path,
)
from vlmvqa.ranks import bar

if TYPE_CHECKING:
    from vlmvqa.models.vision import VisionEncoder

ShardRecord = dict[str, Any]  # `ids` of the stored images, and `left_out`: (id, error) of the skipped ones


@dataclass(frozen=True)
class WriteOptions:
    """How features are computed and stored.

    Attributes:
        workers: number of processes that decode images.
        overwrite: whether to replace features of other images or another key.
        shard_bytes: maximum size of a shard, unless a single image is larger. A killed run loses at most one shard: 680
            images of DINOv2-B at 224 in bfloat16 by default.
    """

    batch_size: int = 64
    workers: int = 0
    overwrite: bool = False
    shard_bytes: int = 2**28
    progress: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise InputError(f"batch_size={self.batch_size} workers={self.workers}: use at least 1 image, 0 workers")


class _Images(Dataset[Tensor | str]):
    """Decoded images by id; an unreadable one gives its error message, which the main process handles."""

    def __init__(self, images: Mapping[ImageId, Example], load_image: Callable[[Example], Tensor]) -> None:
        self.images, self.load_image = images, load_image

    def __getitem__(self, image_id: ImageId) -> Tensor | str:
        try:
            return self.load_image(self.images[image_id])
        except InputError as error:
            return str(error)


def _collate(items: Sequence[Tensor | str]) -> tuple[Tensor, list[str | None]]:
    """Return the readable images, `float[I, 3, H, H]`, and every image's error or None."""
    readable = [item for item in items if isinstance(item, Tensor)]
    errors = [item if isinstance(item, str) else None for item in items]
    return torch.stack(readable) if readable else torch.empty(0), errors


def unique_images(examples: Iterable[Example]) -> dict[ImageId, Example]:
    """Return one example of each image by its id, in order.

    Raises:
        InputError: two files have the same id.
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
    load_image: Callable[[Example], Tensor],
    bad_records: BadRecords,
    options: WriteOptions,
) -> FeatureStore:
    """Encode every image once, on the encoder's device and in its dtype, skipping shards that exist already.

    `load_image` returns an example's image as `float[3, H, H]`, as in training (`Processor.image`).

    Raises:
        InputError: the folder holds other features, an image is unreadable, or the disk is full.
    """
    images, shape = unique_images(examples), (vision.num_image_tokens, vision.width)
    if not images:
        raise InputError("the split has no images; check split and data.max_train_samples")
    ids, checksums = list(images), sample_checksums(list(images.values()))
    image_bytes = bytes_per_image(shape, key.dtype)
    shard_images = max(1, options.shard_bytes // image_bytes)
    shard_images = _prepare_folder(folder, key, ids, checksums, shard_images, options.overwrite)
    shards = _chunks(ids, shard_images)
    records = [_finished_shard(folder, number, image_bytes, bad_records) for number in range(len(shards))]
    todo = {n: _chunks(shards[n], options.batch_size) for n, record in enumerate(records) if record is None}
    batches = list(chain.from_iterable(todo.values()))
    loaded: Iterator[tuple[Tensor, list[str | None]]] = iter(
        DataLoader(
            _Images(images, load_image),
            batch_sampler=batches,
            collate_fn=_collate,
            num_workers=options.workers,
            pin_memory=next(vision.parameters()).is_cuda,
            generator=torch.Generator(),  # leaves the global random state unchanged
        )
    )
    initial = len(ids) - sum(map(len, batches))
    progress = bar(doing="encoding", unit="images", total=len(ids), shown=options.progress, initial=initial)
    vision.eval()
    with progress, torch.inference_mode():
        for number, shard_batches in todo.items():
            encoded = (_encode(vision, batch, *next(loaded), key.dtype, bad_records) for batch in shard_batches)
            records[number] = _write_shard(folder, number, encoded, progress.update)
    if not any(record["ids"] for record in records if record):
        raise InputError("none of the images could be read; see the list of skipped records")
    _write_json(folder / INDEX, {"key": asdict(key), "shape": shape, "shards": records, "samples": checksums})
    return FeatureStore.open(folder, key)


def _prepare_folder(
    folder: Path,
    key: FeatureKey,
    ids: Sequence[ImageId],
    checksums: Sequence[tuple[ImageId, int]],
    shard_images: int,
    overwrite: bool,
) -> int:
    """Create the folder or continue in it; return its number of images per shard (`shard_images` if it is new)."""
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    if (folder / KEY).exists():
        found = read_json(folder / KEY)
        differences = key.differences(FeatureKey(**found["key"]))
        before = dict(found["samples"])
        encoded = {image for path in folder.glob("shard-*.json") for image in read_json(path)["ids"]}
        changed = any(image in encoded and before.get(image, crc) != crc for image, crc in checksums)
        if found["images"] != digest or changed:
            differences.append("they belong to other images")
        if not differences:
            _write_json(folder / KEY, {**found, "samples": checksums})  # unreadable images may have been replaced
            return int(found["shard_images"])
        if not overwrite:
            raise InputError(
                f"{folder} has other features: {'; '.join(differences)}; choose another features.dir, "
                "or replace them with features.overwrite=true"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / INDEX, folder / KEY, *folder.glob("shard-*")):
            old.unlink(missing_ok=True)
        content = {"key": asdict(key), "images": digest, "samples": checksums, "shard_images": shard_images}
        _write_json(folder / KEY, content)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another features.dir") from error
    return shard_images


def _finished_shard(folder: Path, number: int, image_bytes: int, bad_records: BadRecords) -> ShardRecord | None:
    """Return the record of a complete shard; None if the shard has to be written."""
    path = shard_path(folder, number)
    if not path.with_suffix(".json").exists():
        return None
    record = read_json(path.with_suffix(".json"))
    if record["left_out"] and bad_records.policy == "error":
        return None  # read the skipped images again: they are fixed, or an error now
    if file_size(path) != image_bytes * len(record["ids"]):
        return None
    for _, why in record["left_out"]:
        bad_records.add_error(InputError(why))
    return record


def _encode(
    vision: VisionEncoder,
    ids: Sequence[ImageId],
    pixel_values: Tensor,
    errors: Sequence[str | None],
    dtype: str,
    bad_records: BadRecords,
) -> tuple[bytes, ShardRecord]:
    """Return a batch's features as stored bytes, and its part of the shard's record."""
    left_out = [(image, why) for image, why in zip(ids, errors, strict=True) if why is not None]
    for _, why in left_out:
        bad_records.add_error(InputError(why))
    kept = [image for image, why in zip(ids, errors, strict=True) if why is None]
    content = b""
    if kept:
        weight = next(vision.parameters())
        features = vision(pixel_values.to(weight.device, weight.dtype, non_blocking=True)).to(STORED[dtype][0])
        finite = features.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise InputError(
                f"image {kept[finite.index(False)]}: its features are not finite in {dtype}; use "
                "features.dtype=bfloat16 or float32, and if they are not finite there too, check the encoder's weights"
            )
        bits = features.cpu().view(torch.uint16) if dtype == "bfloat16" else features.cpu()
        content = bits.numpy().astype(STORED[dtype][1], copy=False).tobytes()
    return content, {"ids": kept, "left_out": left_out}


def _write_shard(
    folder: Path, number: int, batches: Iterable[tuple[bytes, ShardRecord]], count: Callable[[int], Any]
) -> ShardRecord:
    """Write a shard batch by batch; return its record."""
    path = shard_path(folder, number)
    for old in (folder / INDEX, path.with_suffix(".json")):
        old.unlink(missing_ok=True)
    partial = path.with_suffix(".partial")
    record: ShardRecord = {"ids": [], "left_out": []}
    try:
        # Not memory-mapped: a full disk would kill the process (SIGBUS) without an error message.
        with partial.open("wb") as file:
            for content, batch in batches:
                file.write(content)
                for name, items in batch.items():
                    record[name] += items
                count(sum(map(len, batch.values())))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _write_json(path.with_suffix(".json"), record)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        partial.unlink(missing_ok=True)
        raise InputError(
            f"the disk of {folder} is full; free space and run the same command again, which resumes at shard {number}"
        ) from error
    return record


def _chunks(ids: Sequence[ImageId], size: int) -> list[list[ImageId]]:
    return [list(ids[start : start + size]) for start in range(0, len(ids), size)]


def _write_json(path: Path, content: ShardRecord) -> None:
    """Replace a JSON file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"format": FORMAT, **content}) + "\n")
    partial.replace(path)
