"""Attention masks: one predicate of which tokens see which, and the dense and block masks built from it.

The predicate is defined over token properties (`Tokens`), not over indices. A dense boolean mask (any device) and a
FlexAttention `BlockMask` (CUDA) both evaluate it.

Legend: B rows, T tokens, Q query tokens, K key tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from vlmvqa.sequence.rows import NONE, PADDING, Batch

SPAN = 64  # queries
BLOCK = 128  # tokens of a block of FlexAttention


class Tokens(NamedTuple):
    """Token properties that the predicate uses: `int64` tensors of one shape (see the diagram in `rows.py`)."""

    document: Tensor
    branch: Tensor
    block: Tensor
    position: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        """Return the columns of a batch."""
        return cls(*(batch[name] for name in cls._fields))

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply a function to every column."""
        return Tokens(*(function(column) for column in self))

    def append(self, other: Tokens) -> Tokens:
        """Concatenate the tokens of two `[B, ...]` along the rows."""
        return Tokens(*(torch.cat(columns, dim=1) for columns in zip(self, other, strict=True)))


def visible(query: Tokens, key: Tokens, window: int | None = None) -> Tensor:
    """Return whether `query` sees `key`: `bool`, broadcast over the shapes of both.

    Args:
        window: number of positions that Gemma 2's local layers see back (None: all). It is counted on restarted
            positions, not on indices, so that a question sees the same tokens in any shared row.
    """
    same_document = (query.document == key.document) & (key.document != PADDING)
    image_or_own_branch = (key.branch == 0) | (key.branch == query.branch)
    same_block = (query.block == key.block) & (key.block != NONE)
    seen = same_document & image_or_own_branch & ((key.position <= query.position) | same_block)
    return seen if window is None else seen & (query.position - key.position < window)


def dense_mask(query: Tokens, key: Tokens, window: int | None = None) -> Tensor:
    """Return `bool[B, 1, Q, K]` from tokens `[B, Q]` and `[B, K]`.

    A query that sees nothing (padding) is set to see everything: softmax over nothing is NaN, and NaN times the zero
    gradient of an unused position is NaN in every key. Padding has no label, so nothing depends on it.
    """
    mask = visible(query.map(lambda t: t[:, :, None]), key.map(lambda t: t[:, None, :]), window)
    return (mask | ~mask.any(-1, keepdim=True))[:, None]


def key_spans(tokens: Tokens) -> list[tuple[slice, slice]]:
    """Return spans of queries, each with the range of keys that they see in any row.

    For tokens `[B, T]` that attend to themselves. Documents and their texts follow each other, so that most scores
    outside these ranges are hidden and dense attention need not compute them. Padding is left out. Reads values, for
    which a GPU needs a synchronization.
    """
    seen = visible(tokens.map(lambda t: t[:, :, None]), tokens.map(lambda t: t[:, None, :])).any(0)
    length = len(seen)
    index = torch.arange(length)
    firsts = torch.where(seen, index, length).amin(1).split(SPAN)
    ends = torch.where(seen, index + 1, 1).amax(1).split(SPAN)  # a query that is padding in all rows sees nothing
    keys = [(int(first.min()), int(end.max())) for first, end in zip(firsts, ends, strict=True)]
    return [
        (slice(SPAN * number, min(SPAN * (number + 1), length)), slice(min(first, end - 1), end))
        for number, (first, end) in enumerate(keys)
    ]


def block_mask(tokens: Tokens, window: int | None = None) -> BlockMask:
    """Return FlexAttention's `BlockMask` over tokens `[B, T]` that attend to themselves.

    The predicate is evaluated once for all pairs, and each 128 x 128 block is skipped, computed without a mask, or
    computed with it. PyTorch's `create_block_mask` returns the same, but evaluates the predicate under vmap, whose
    overhead on the host exceeds the computation.

    T must be a multiple of 128, the block size; training pads its rows to one. For other lengths, PyTorch 2.15's
    compiled CPU kernel computes wrong values (cf. pytorch#159247).
    """
    narrow = tokens.map(lambda t: t.int())  # the kernel reads them for each pair

    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(narrow.map(lambda t: t[row, query]), narrow.map(lambda t: t[row, key]), window)

    length = tokens.position.shape[1]
    seen = visible(narrow.map(lambda t: t[:, :, None]), narrow.map(lambda t: t[:, None, :]), window)
    seen = F.pad(seen, (0, -length % BLOCK, 0, -length % BLOCK))
    pairs = rearrange(seen, "b (q i) (k j) -> b 1 q k i j", i=BLOCK, j=BLOCK).sum((-1, -2), dtype=torch.int32)
    full = pairs == BLOCK * BLOCK
    kinds = torch.stack([(pairs > 0) & ~full, full]).int()  # int32[2, B, 1, query blocks, key blocks]
    counts = kinds.sum(-1, dtype=torch.int32)
    indices = kinds.argsort(dim=-1, descending=True, stable=True).int()  # blocks of the kind first, in order
    return BlockMask.from_kv_blocks(
        counts[0], indices[0], counts[1], indices[1], BLOCK, mask_mod=may_see, seq_lengths=(length, length)
    )
