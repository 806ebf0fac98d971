"""A frozen vision encoder's output, read back in place of decoding and encoding in every epoch.

    examples --image--> float[3, H, H] --VisionEncoder--> float[N, Dv] --write--> shards --FeatureStore--> training

    folder/key.json          what the features depend on and how they are cut into shards; written first
           shard-00000.bin   raw little-endian [images, N, Dv]; bfloat16 as its 16 bits
           shard-00000.json  its images in order, and those left out; a shard that has it is whole
           index.json        all shards; written last: a folder that has it is whole

They are made by `feature_writer.py`. Legend: N tokens an image, H height and width, Dv vision width.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
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
# As tensors, and as the bytes of a shard.
STORED = {"float32": (torch.float32, "<f4"), "bfloat16": (torch.bfloat16, "<u2"), "float16": (torch.float16, "<f2")}

SAMPLES = 64  # images whose files are compared

ImageId = int | str


@dataclass(frozen=True)
class FeatureKey:
    """What the features of an image depend on; where it differs, they are others.

    Attributes:
        encoder: timm's name of the encoder.
        weights: hash of its layers and of every name and value of its state.
        transform: the `ImageSettings` by name.
        dtype: what the features are stored in, one of `STORED`.
    """

    encoder: str
    weights: str
    transform: Mapping[str, Any]
    dtype: str

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    @classmethod
    def of(cls, vision: VisionEncoder, images: ImageSettings, dtype: str) -> FeatureKey:
        """The key of an encoder as it is now: after its weights were cast, before they are sharded."""
        config = vision.encoder.pretrained_cfg
        name = ".".join(filter(None, (config["architecture"], config.get("tag"))))
        transform = json.loads(json.dumps(asdict(images)))  # as it is read back: lists for tuples
        return cls(name, _fingerprint(vision), transform, dtype)

    def differences(self, found: FeatureKey) -> list[str]:
        """`the image size is 224 there, now 448`: each way in which features that were found are not these."""
        said = []
        if found.encoder != self.encoder:
            said.append(f"the encoder is {found.encoder} there, now {self.encoder}")
        if found.weights != self.weights:
            said.append("the encoder's weights are others")
        for name in sorted({*found.transform, *self.transform}):
            there, now = found.transform.get(name), self.transform.get(name)
            if there != now:
                what = "image size" if name == "size" else f"image transform's {name}"
                said.append(f"the {what} is {there} there, now {now}")
        if found.dtype != self.dtype:
            said.append(f"the dtype is {found.dtype} there, now {self.dtype}")
        return said


class FeatureStore:
    """The features of a folder by image id, read from memory-mapped files; DataLoader workers may share it.

    Attributes:
        shape: N and Dv.
        left_out: images that could not be read when the features were made, and why.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        shards = index["shards"]
        self.folder = folder
        self.shape: tuple[int, int] = tuple(index["shape"])
        self.dtype, self._code = STORED[index["key"]["dtype"]]
        self.samples: dict[ImageId, int] = dict(index["samples"])
        self.left_out: dict[ImageId, str] = {image: why for shard in shards for image, why in shard["left_out"]}
        self._starts = [0, *accumulate(len(shard["ids"]) for shard in shards)]
        self._rows: dict[ImageId, int] = {}
        for shard in shards:
            self._rows |= {image: row for row, image in enumerate(shard["ids"], start=len(self._rows))}
        self._maps: dict[int, Any] = {}
        for number, shard in enumerate(shards):
            self._refuse_cut_short(shard_path(folder, number), len(shard["ids"]))

    @classmethod
    def open(cls, folder: Path, key: FeatureKey) -> FeatureStore:
        """The features of a folder.

        Raises:
            InputError: there are none, they are unfinished or damaged, or made of something else than `key` says.
        """
        index = _index(folder)
        differences = key.differences(FeatureKey(**index["key"]))
        if differences:
            raise InputError(
                f"the features in {folder} are stale: {'; '.join(differences)}; rebuild them with this run's model, "
                f"data and seed: {COMMAND} features.dir={folder} features.dtype={key.dtype} features.overwrite=true"
            )
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._rows

    def __getitem__(self, image_id: ImageId) -> Tensor:
        """`float[N, Dv]` in the stored dtype, copied out of the file.

        Raises:
            InputError: the image was left out, or is not one of those whose features were made.
        """
        row = self._rows.get(image_id)
        if row is None:
            why = self.left_out.get(image_id, "make them for this split")
            raise InputError(f"image {image_id} has no features in {self.folder}: {why}")
        number = bisect_right(self._starts, row) - 1
        found = self._map(number)[row - self._starts[number]]
        copied = np.array(found, dtype=found.dtype.newbyteorder("="))
        return torch.from_numpy(copied).view(self.dtype)

    def refuse_missing(self, image_ids: Iterable[ImageId]) -> None:
        """Stop where images were never asked for (those of another split, say); those left out are no surprise."""
        missing = [image for image in image_ids if image not in self._rows and image not in self.left_out]
        if missing:
            raise InputError(
                f"the features in {self.folder} lack {len(missing):,} of the images (the first is {missing[0]}); "
                f"make those of this split: {COMMAND} split=... features.dir=..."
            )

    def refuse_other_pictures(self, examples: Iterable[Example]) -> None:
        """Stop where some images' files are not those whose features were made: of another data set, or drawn anew."""
        for example in examples:
            there = self.samples.get(example.image_id)
            if there is not None and _checksum(example) not in (there, None):
                raise InputError(
                    f"the features in {self.folder} are of other pictures: {example.name} is not the file they were "
                    f"made of; rebuild them: {COMMAND} features.dir={self.folder} features.overwrite=true"
                )

    def _map(self, number: int) -> Any:
        if number not in self._maps:  # opened in the process that reads it
            shape = (self._starts[number + 1] - self._starts[number], *self.shape)
            self._maps[number] = np.memmap(shard_path(self.folder, number), self._code, mode="r", shape=shape)
        return self._maps[number]

    def _refuse_cut_short(self, path: Path, images: int) -> None:
        there, wanted = file_size(path), images * bytes_an_image(self.shape, self.dtype)
        if there != wanted:
            raise InputError(
                f"{path} has {there:,} bytes instead of {wanted:,}; run the command that made the features again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a map would be sent to a spawned worker as all its numbers


def stored_dtype(folder: Path) -> str:
    """What the features of a folder are stored in, one of `STORED`: for the key of a run that takes either.

    Raises:
        InputError: there are none, or they are unfinished.
    """
    dtype: str = _index(folder)["key"]["dtype"]
    return dtype


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).exists():
        if (folder / KEY).exists():
            raise InputError(f"the features in {folder} are unfinished; run the command that makes them again")
        raise InputError(f"{folder} holds no features; make them: {COMMAND} features.dir={folder}")
    return read_json(folder / INDEX)


# --- for the writer too --------------------------------------------------------------------------------


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that features are not stored in."""
    if dtype not in STORED:
        raise InputError(f"features.dtype={dtype} is unknown; use one of {', '.join(STORED)}{suggest(dtype, STORED)}")


def samples(examples: Sequence[Example]) -> list[tuple[ImageId, int]]:
    """CRC-32 of some images' files, evenly spread, by image id: the ids alone are those of another data set too."""
    chosen = examples[:: max(1, len(examples) // SAMPLES)]
    return [(one.image_id, crc) for one in chosen if (crc := _checksum(one)) is not None]


def _checksum(example: Example) -> int | None:
    """Of an image's file; None where there is none (any more)."""
    content = fingerprint.file_of(example.image)
    return None if content is None else crc32(content)


def shard_path(folder: Path, number: int) -> Path:
    """The numbers of a shard; its record has the suffix `.json`."""
    return folder / f"shard-{number:05d}.bin"


def bytes_an_image(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """N x Dv numbers."""
    return shape[0] * shape[1] * dtype.itemsize


def file_size(path: Path) -> int:
    """Its bytes; none where there is no such file."""
    return path.stat().st_size if path.exists() else 0


def read_json(path: Path) -> dict[str, Any]:
    """The content of one of the folder's JSON files."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete {path.parent} and rebuild the features") from error
    if found.pop("format", None) != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}; delete {path.parent} and rebuild the features")
    return found


def _fingerprint(vision: VisionEncoder) -> str:
    """A hash of what the encoder computes: its layers, and every name and value of its state."""
    # The number of heads is in no weight's shape and in no layer's description.
    heads = [vars(module).get("num_heads") for module in vision.modules()]
    return fingerprint.weights(vision, f"{vision.encoder} {heads}")
