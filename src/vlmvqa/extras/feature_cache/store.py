"""Read cached features of a frozen vision encoder instead of decoding and encoding the images in every epoch.

    examples --image--> float[3, H, H] --VisionEncoder--> float[N, Dv] --writer--> features.bin --FeatureStore--> rows

    folder/index.json     key (what the features depend on), shape (N, Dv), ids of the images in order, the skipped ones
                          with their errors, and checksums of some image files; written first
           features.bin   raw [images, N, Dv] in the order of the ids; complete when it has its full size

Legend: N tokens per image, H height and width, Dv vision width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from vlmvqa import fingerprint
from vlmvqa.data.example import Example
from vlmvqa.data.images import ImageSettings
from vlmvqa.errors import InputError, suggest
from vlmvqa.extras.vision.several_images import refuse_several_images
from vlmvqa.models.interface import DTYPES

if TYPE_CHECKING:
    from vlmvqa.models.vision import VisionEncoder

FORMAT = 2
INDEX, FEATURES = "index.json", "features.bin"
COMMAND = "python launch/prepare.py features"
SAMPLES = 64  # number of images whose files are compared

ImageId = int | str
Key = Mapping[str, Any]


class FeatureStore:
    """The features in a folder by image id; DataLoader workers can share it.

    Attributes:
        index: the content of index.json.
        skipped: images that were unreadable when the features were computed, with the error message.

    Raises:
        InputError: there are no features in the folder, or they are incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.shape: tuple[int, int] = tuple(self.index["shape"])
        self.dtype = DTYPES[self.index["key"]["dtype"]]
        self.skipped: dict[ImageId, str] = dict(self.index["skipped"])
        ids = self.index["ids"]
        self._rows = {image: row for row, image in enumerate(ids) if image not in self.skipped}
        self._image_bytes = bytes_per_image(self.shape, self.dtype)
        if file_size(folder / FEATURES) != len(ids) * self._image_bytes:
            raise InputError(f"the features in {folder} are incomplete; run the command that computes them again")

    @classmethod
    def open(
        cls, folder: Path, vision: VisionEncoder, images: ImageSettings, examples: Sequence[Example]
    ) -> FeatureStore:
        """Open the features of an encoder and of these examples' images.

        Raises:
            InputError: the features are missing or incomplete, or those of another encoder, transform or dataset.
        """
        refuse_several_images(examples, "data.feature_cache")
        store = cls(folder)
        found = store.index["key"]
        recompute = f"{COMMAND} features.dir={folder} features.overwrite=true"
        if stale := differences(found, feature_key(vision, images, found["dtype"])):
            raise InputError(
                f"the features in {folder} are stale: {stale}; recompute them with this run's model, data and seed: "
                f"{recompute} features.dtype={found['dtype']}"
            )
        ids = (example.image_id for example in examples)
        if missing := [image for image in ids if image not in store._rows and image not in store.skipped]:
            raise InputError(
                f"the features in {folder} lack {len(missing):,} of the images (the first is {missing[0]}); "
                f"compute the features of this split: {COMMAND} split=... features.dir=..."
            )
        if changed := changed_image(store.index["samples"], examples):
            raise InputError(
                f"the features in {folder} belong to other images: {changed.name} has changed since; "
                f"recompute them: {recompute}"
            )
        return store

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, image_id: ImageId) -> Tensor:
        """Return an image's features, `float[N, Dv]` in the stored data type.

        Raises:
            InputError: the image was skipped, or belongs to another split.
        """
        if image_id not in self._rows:
            why = self.skipped.get(image_id, "compute them for this split")
            raise InputError(f"image {image_id} has no features in {self.folder}: {why}")
        offset = self._rows[image_id] * self._image_bytes
        stored = np.fromfile(self.folder / FEATURES, np.uint8, self._image_bytes, offset=offset)
        return torch.from_numpy(stored).view(self.dtype).view(self.shape)


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's index.json.

    Raises:
        InputError: there is none, or it is damaged or of another format.
    """
    path = folder / INDEX
    if not path.exists():
        raise InputError(f"{folder} has no features; compute them: {COMMAND} features.dir={folder}")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete {folder} and recompute the features") from error
    if content.pop("format", None) != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}; delete {folder} and recompute the features")
    return content


def feature_key(vision: VisionEncoder, images: ImageSettings, dtype: str) -> Key:
    """Return what the features of an image depend on, for an encoder with cast but not yet sharded weights."""
    # Neither the weights' shapes nor the printed modules include the number of heads.
    heads = [vars(module).get("num_heads") for module in vision.modules()]
    transform = json.loads(json.dumps(asdict(images)))  # with lists instead of tuples, as in index.json
    return {
        "encoder": " + ".join(map(_name, vision.towers)),
        "weights": fingerprint.weights(vision, f"{vision} {heads} {vision.features}"),
        "dtype": dtype,
        **{f"image {name}": value for name, value in transform.items()},
    }


def _name(vision: VisionEncoder) -> str:
    """Return the name of timm's model with its pretrained tag."""
    config = vision.encoder.pretrained_cfg
    return ".".join(filter(None, (config["architecture"], config.get("tag"))))


def differences(found: Key, key: Key) -> str:
    """Return how a stored key differs from another one: `the image size was 224, is now 448`."""
    return "; ".join(
        "the encoder's weights differ" if name == "weights" else f"the {name} was {found.get(name)}, is now {value}"
        for name, value in key.items()
        if found.get(name) != value
    )


def check_dtype(dtype: str) -> None:
    """Raise if features cannot be stored in a data type."""
    if dtype not in DTYPES:
        raise InputError(f"features.dtype={dtype} is unknown; use one of {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")


def sample_checksums(examples: Sequence[Example]) -> list[tuple[ImageId, int]]:
    """Return the CRC-32 of some image files, evenly spread: other datasets can have the same image ids."""
    chosen = examples[:: max(1, len(examples) // SAMPLES)]
    return [(example.image_id, crc) for example in chosen if (crc := _checksum(example)) is not None]


def changed_image(samples: Iterable[tuple[ImageId, int]], examples: Iterable[Example]) -> Example | None:
    """Return the first example whose image file differs from its checksum; a file that is gone does not."""
    expected = dict(samples)
    known = (example for example in examples if example.image_id in expected)
    return next((one for one in known if _checksum(one) not in (expected[one.image_id], None)), None)


def _checksum(example: Example) -> int | None:
    content = fingerprint.file_of(example.image)
    return None if content is None else crc32(content)


def bytes_per_image(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the size of N x Dv numbers."""
    return shape[0] * shape[1] * dtype.itemsize


def file_size(path: Path) -> int:
    """Return a file's size in bytes; 0 if it doesn't exist."""
    return path.stat().st_size if path.exists() else 0
