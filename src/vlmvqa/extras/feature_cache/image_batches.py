"""Decode images in worker processes, in batches that keep the errors of unreadable images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.extras.feature_cache.store import ImageId


class ImageBatch(NamedTuple):
    """Decoded images of a batch.

    Attributes:
        pixel_values: `float[I, 3, H, H]`, the I readable images.
        errors: for every image of the batch, why it is unreadable; None if it is readable.
    """

    pixel_values: Tensor
    errors: list[str | None]


class _Images(Dataset[Tensor | str]):
    """Decoded images or error messages; the main process applies the policy for bad records."""

    def __init__(self, examples: Sequence[Example], load_image: Callable[[Example], Tensor]) -> None:
        self.examples, self.load_image = examples, load_image

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.load_image(self.examples[index])
        except InputError as error:
            return str(error)


def load_batches(
    images: Mapping[ImageId, Example],
    batches: Sequence[Sequence[ImageId]],
    load_image: Callable[[Example], Tensor],
    workers: int,
    pin_memory: bool,
) -> Iterator[ImageBatch]:
    """Yield the images of each batch of ids; `load_image` returns an example's image as `float[3, H, H]`."""
    positions = {image_id: position for position, image_id in enumerate(images)}
    yield from DataLoader(
        _Images(list(images.values()), load_image),
        batch_sampler=[[positions[image_id] for image_id in ids] for ids in batches],
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # leaves the global random state unchanged
    )


def _collate(items: Sequence[Tensor | str]) -> ImageBatch:
    readable = [item for item in items if isinstance(item, Tensor)]
    errors = [item if isinstance(item, str) else None for item in items]
    return ImageBatch(torch.stack(readable) if readable else torch.empty(0), errors)
