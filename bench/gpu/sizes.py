"""Sizes of `bench.gpu`: `real`, and `tiny` for its code path on a CPU; the models and rows made from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from heapq import heapreplace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.flex_attention import WrappedFlexAttention

from bench import models, shapes
from bench.shapes import SHAPES, Shape
from vlmvqa.extras.planning.gpus import GPUS, Gpu
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import Document

LARGE = replace(SHAPES["vqav2"], image_size=336)  # 577 image tokens
PATTERNS = ("blockwise_prefix", "causal")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of every section.

    Attributes:
        name: also the name of the model in `bench.models`.
        half: data type of the fast rows.
        exact: largest relative difference of a loss from that of another way to compute it.
        repeats: timed calls.
        correct_shape: documents of the correctness section, longer than its window.
        correct_language, correct_vision: changes of its model.
        correct_rows: its batches: rows, and tokens per row.
        images: of the ladder.
        row_tokens: length of packed rows; `packed` is the number of such rows in a micro-batch.
        dense: rows of an image in a micro-batch with dense attention.
        every: the recipe's time is measured on every n-th micro-batch.
        steps: rows of an image per micro-batch, and micro-batches, of an optimizer step.
        answer_images, answer_batches: images, and images per call.
        heads: query heads, key-value heads, tokens and head width of the FlexAttention section.
        loss: supervised tokens, width and vocabulary of the loss section.
        copies: bytes of the collectives' buffers.
    """

    name: str = "real"
    half: torch.dtype = torch.bfloat16
    exact: float = 0.01
    repeats: int = 3
    correct_shape: Shape = LARGE
    # Larger initial weights than Gemma 2's 0.02, so that the softcap changes the scores.
    correct_language: Mapping[str, Any] = field(
        default_factory=lambda: {"num_hidden_layers": 2, "sliding_window": 512, "initializer_range": 0.05}
    )
    correct_vision: Mapping[str, Any] = field(default_factory=lambda: {"depth": 2})
    correct_rows: Sequence[tuple[int, int]] = ((1, 4096), (2, 2048))
    images: int = 48
    row_tokens: int = 4096
    packed: int = 4
    dense: int = 12
    every: int = 4
    steps: Sequence[tuple[int, int]] = ((4, 3), (12, 1), (48, 1))
    answer_images: int = 64
    answer_batches: Sequence[int] = (16, 64, 128)
    heads: tuple[int, int, int, int] = (8, 4, 4096, 256)
    loss: tuple[int, int, int] = (600, 2304, 256_000)
    copies: Sequence[int] = (2**20, 2**24, 2**28)


REAL = Sizes()
TINY = Sizes(
    name="tiny",
    half=torch.float32,
    exact=1e-5,
    repeats=1,
    correct_shape=SHAPES["vqav2"],
    correct_language={"num_hidden_layers": 2, "sliding_window": 12, "head_dim": 16, "query_pre_attn_scalar": 16},
    correct_vision={"depth": 1},
    correct_rows=((1, 256), (2, 128)),
    images=4,
    row_tokens=256,
    packed=2,
    dense=2,
    every=2,
    steps=((1, 3), (3, 1), (4, 1)),
    answer_images=3,
    answer_batches=(2, 3, 4),
    heads=(4, 2, 256, 16),
    loss=(60, 32, 400),
    copies=(2**10, 2**14),
)
SIZES = {"real": REAL, "tiny": TINY}


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype | None = None, pattern: str = "causal") -> VLM:
    """Return DINOv2-B/14 with Gemma 2 2B, or the tiny model."""
    return models.build_model(sizes.name, SHAPES["vqav2"], device, attention_pattern=pattern, dtype=dtype)


def packed_rows(documents: Sequence[Document], num_image_tokens: int, row_tokens: int) -> list[list[Document]]:
    """Pack documents into as few rows of at most `row_tokens` as possible, longest first into the emptiest row."""
    lengths = [shapes.length(document, num_image_tokens) for document in documents]
    order = sorted(range(len(documents)), key=lambda number: -lengths[number])
    for count in range(-(-sum(lengths) // row_tokens), len(documents) + 1):
        rows: list[list[Document]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]
        for number in order:
            tokens, row = filled[0]
            rows[row].append(documents[number])
            heapreplace(filled, (tokens + lengths[number], row))
        if max(filled)[0] <= row_tokens:
            return rows
    raise ValueError(f"a document has more than {row_tokens} tokens")


def full_rows(
    shape: Shape, rows: int, row_tokens: int, num_image_tokens: int, vocabulary: int, seed: int = 0
) -> list[list[Document]]:
    """Return rows of documents with at most `row_tokens` tokens each; no further document fits."""
    documents = iter(shapes.random_documents(shape, rows * (row_tokens // num_image_tokens + 1), vocabulary, seed))
    found: list[list[Document]] = []
    waiting = next(documents)
    for _ in range(rows):
        row, tokens = [], 0
        while tokens + (length := shapes.length(waiting, num_image_tokens)) <= row_tokens:
            row.append(waiting)
            tokens, waiting = tokens + length, next(documents)
        found.append(row)
    return found


@cache
def _uncompiled_flex() -> Any:
    return torch.compile(flex_attention, backend="aot_eager")


@contextmanager
def _flex_backward_on_cpu() -> Iterator[None]:
    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *_: None),
        mock.patch.object(WrappedFlexAttention, "__call__", lambda _: _uncompiled_flex()),
    ):
        yield


def flex_available(device: torch.device) -> AbstractContextManager[None]:
    """Let FlexAttention compute gradients on a CPU, without its kernels: inductor has no backward kernel there."""
    return nullcontext() if device.type == "cuda" else _flex_backward_on_cpu()


def known_gpu(device: torch.device) -> Gpu | None:
    """Return the data sheet of the GPU: the same product, with the nearest memory."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return gpu_named(properties.name, properties.total_memory)


def gpu_named(name: str, memory_bytes: int = 0) -> Gpu | None:
    """Return the data sheet of the GPU that CUDA calls `name`; of several, that with the nearest memory."""
    words = name.upper().replace("-", " ").split()
    same = [gpu for gpu in GPUS.values() if gpu.name.upper().split(" (")[0].split()[-1] in words]
    return min(same, key=lambda gpu: abs(gpu.memory - memory_bytes / 2**30), default=None)
