"""Read cached features of a frozen vision encoder instead of decoding and encoding the images in every epoch.

    examples --image--> float[3, H, H] --VisionEncoder--> float[N, Dv] --writer--> shards --FeatureStore--> training

    folder/key.json          what the features depend on and how they are sharded; written first
           shard-00000.bin   raw little-endian [images, N, Dv]; bfloat16 as its 16 bits
           shard-00000.json  ids of its images in order, and the skipped ones; marks the shard as complete
           index.json        all shards; written last: marks the folder as complete

Legend: N tokens per image, H height and width, Dv vision width.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
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

if TYPE_CHECKING:
    from vlmvqa.models.vision import VisionEncoder

FORMAT = 1
KEY, INDEX = "key.json", "index.json"
COMMAND = "python launch/prepare.py features"
# Data types by name: of tensors, and of the bytes in a shard.
STORED = {"float32": (torch.float32, "<f4"), "bfloat16": (torch.bfloat16, "<u2"), "float16": (torch.float16, "<f2")}
SAMPLES = 64  # number of images whose files are compared

ImageId = int | str


@dataclass(frozen=True)
class FeatureKey:
    """Everything that the features of an image depend on.

    Attributes:
        encoder: timm's name of the encoder.
        weights: hash of its layers and of the names and values in its state dict.
        transform: the `ImageSettings` by name.
        dtype: the stored data type, one of `STORED`.
    """

    encoder: str
    weights: str
    transform: Mapping[str, Any]
    dtype: str

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    @classmethod
    def of(cls, vision: VisionEncoder, images: ImageSettings, dtype: str) -> FeatureKey:
        """Return the key of an encoder in its current state: after casting its weights, before sharding them."""
        config = vision.encoder.pretrained_cfg
        name = ".".join(filter(None, (config["architecture"], config.get("tag"))))
        transform = json.loads(json.dumps(asdict(images)))  # with lists instead of tuples, as in key.json
        # Neither the weights' shapes nor the printed layers include the number of heads.
        heads = [vars(module).get("num_heads") for module in vision.modules()]
        return cls(name, fingerprint.weights(vision, f"{vision.encoder} {heads}"), transform, dtype)

    def differences(self, found: FeatureKey) -> list[str]:
        """Return how stored features differ from this key: `the image size was 224, is now 448`."""
        texts = ["the encoder's weights differ"] if found.weights != self.weights else []
        before, now = (
            {"encoder": key.encoder, "dtype": key.dtype, **{f"image {k}": v for k, v in key.transform.items()}}
            for key in (found, self)
        )
        return texts + [
            f"the {name} was {before.get(name)}, is now {now.get(name)}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]


class FeatureStore:
    """The features in a folder by image id, read from memory-mapped files; DataLoader workers can share it.

    Attributes:
        shape: N and Dv.
        left_out: images that were unreadable when the features were computed, with the error message.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        shards, dtype = index["shards"], index["key"]["dtype"]
        self.folder = folder
        self.shape: tuple[int, int] = tuple(index["shape"])
        self.dtype, self._code = STORED[dtype]
        self.checksums: dict[ImageId, int] = dict(index["samples"])
        self.left_out: dict[ImageId, str] = dict(chain.from_iterable(shard["left_out"] for shard in shards))
        stored = chain.from_iterable(shard["ids"] for shard in shards)
        self._rows: dict[ImageId, int] = {image: row for row, image in enumerate(stored)}
        self._starts = [0, *accumulate(len(shard["ids"]) for shard in shards)]
        self._maps: dict[int, Any] = {}
        for number, shard in enumerate(shards):
            path = shard_path(folder, number)
            size, expected = file_size(path), len(shard["ids"]) * bytes_per_image(self.shape, dtype)
            if size != expected:
                raise InputError(
                    f"{path} has {size:,} bytes instead of {expected:,}; run the command that computed them again"
                )

    @classmethod
    def open(cls, folder: Path, key: FeatureKey) -> FeatureStore:
        """Open the features in a folder.

        Raises:
            InputError: there are none, they are incomplete or damaged, or their key differs from `key`.
        """
        index = _read_index(folder)
        differences = key.differences(FeatureKey(**index["key"]))
        if differences:
            raise InputError(
                f"the features in {folder} are stale: {'; '.join(differences)}; recompute them with this run's model, "
                f"data and seed: {COMMAND} features.dir={folder} features.dtype={key.dtype} features.overwrite=true"
            )
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._rows

    def __getitem__(self, image_id: ImageId) -> Tensor:
        """Return a copy of an image's features, `float[N, Dv]` in the stored data type.

        Raises:
            InputError: the image was skipped, or belongs to another split.
        """
        row = self._rows.get(image_id)
        if row is None:
            why = self.left_out.get(image_id, "compute them for this split")
            raise InputError(f"image {image_id} has no features in {self.folder}: {why}")
        shard = bisect_right(self._starts, row) - 1
        if shard not in self._maps:  # mapped in the worker process that reads it
            shape = (self._starts[shard + 1] - self._starts[shard], *self.shape)
            self._maps[shard] = np.memmap(shard_path(self.folder, shard), self._code, mode="r", shape=shape)
        stored = self._maps[shard][row - self._starts[shard]]
        return torch.from_numpy(np.array(stored, dtype=stored.dtype.newbyteorder("="))).view(self.dtype)

    def refuse_missing(self, image_ids: Iterable[ImageId]) -> None:
        """Raise if images have no features because they belong to another split; skipped images are accepted."""
        missing = [image for image in image_ids if image not in self._rows and image not in self.left_out]
        if missing:
            raise InputError(
                f"the features in {self.folder} lack {len(missing):,} of the images (the first is {missing[0]}); "
                f"compute the features of this split: {COMMAND} split=... features.dir=..."
            )

    def refuse_changed_images(self, examples: Iterable[Example]) -> None:
        """Raise if image files differ from those that were encoded, as in another or a newly generated dataset."""
        for example in examples:
            expected = self.checksums.get(example.image_id)
            if expected is not None and _checksum(example) not in (expected, None):
                raise InputError(
                    f"the features in {self.folder} belong to other images: {example.name} has changed since; "
                    f"recompute them: {COMMAND} features.dir={self.folder} features.overwrite=true"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # pickling a map would copy its content to spawned workers


def stored_dtype(folder: Path) -> str:
    """Return the data type of a folder's features, one of `STORED`.

    Raises:
        InputError: there are none, or they are incomplete.
    """
    dtype: str = _read_index(folder)["key"]["dtype"]
    return dtype


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        if (folder / KEY).exists():
            raise InputError(f"the features in {folder} are incomplete; run the command that computes them again")
        raise InputError(f"{folder} has no features; compute them: {COMMAND} features.dir={folder}")
    return read_json(folder / INDEX)


# --- shared with the writer ---------------------------------------------------------------------------


def check_dtype(dtype: str) -> None:
    """Raise if features cannot be stored in a data type."""
    if dtype not in STORED:
        raise InputError(f"features.dtype={dtype} is unknown; use one of {', '.join(STORED)}{suggest(dtype, STORED)}")


def sample_checksums(examples: Sequence[Example]) -> list[tuple[ImageId, int]]:
    """Return the CRC-32 of some image files, evenly spread: other datasets can have the same image ids."""
    chosen = examples[:: max(1, len(examples) // SAMPLES)]
    return [(example.image_id, crc) for example in chosen if (crc := _checksum(example)) is not None]


def _checksum(example: Example) -> int | None:
    """Return the CRC-32 of an image file; None if there is no file (any more)."""
    content = fingerprint.file_of(example.image)
    return None if content is None else crc32(content)


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's numbers; its record has the suffix `.json`."""
    return folder / f"shard-{number:05d}.bin"


def bytes_per_image(shape: tuple[int, int], dtype: str) -> int:
    """Return the size of N x Dv numbers of a data type of `STORED`."""
    return shape[0] * shape[1] * STORED[dtype][0].itemsize


def file_size(path: Path) -> int:
    """Return a file's size in bytes; 0 if it doesn't exist."""
    return path.stat().st_size if path.exists() else 0


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the folder's JSON files and check its format."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete {path.parent} and recompute the features") from error
    if content.pop("format", None) != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}; delete {path.parent} and recompute the features")
    return content
