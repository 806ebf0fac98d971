"""Generation with a cache of a fixed size, whose decode step a GPU replays as one CUDA graph.

A decode step consists of some 1,600 small kernels, and starting them takes longer than running them on a large GPU. A
graph starts them all at once, but its tensors must keep their shapes and addresses: rows and questions that have
finished stay in the batch as padding. Numbers of slots and columns are rounded up, so that few shapes occur; their
steps are kept, with their caches, for later batches.

Legend: B rows, S slots, K columns of the cache.
"""

from __future__ import annotations

from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from vlmvqa.models.generation import CachedModel, OpenQuestions
from vlmvqa.models.language import LanguageModel
from vlmvqa.sequence.masks import Tokens
from vlmvqa.sequence.rows import PADDING, Batch

SLOTS, COLUMNS = 4, 64  # their numbers are rounded up to multiples of these
STEPS = 4  # most shapes for which a model keeps its decode step; each holds a cache of its own
_steps: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], DecodeStep]] = WeakKeyDictionary()


class StaticQuestions(OpenQuestions):
    """The open questions of a batch, in slots and rows that stay the same until the last answer ends."""

    def __init__(self, model: CachedModel, batch: Batch, max_new_tokens: int) -> None:
        super().__init__(model, batch)
        self.slots = _round_up(self.slots, SLOTS)
        self.columns = _round_up(self.keys.document.shape[1] + self.slots * (max_new_tokens - 1), COLUMNS)

    @cached_property
    def decode_step(self) -> DecodeStep:
        """The decode step, built at the first use: all answers may end with their first token."""
        step = find_decode_step(self.model.language, self.cache, self.slots, self.columns)
        step.load(self.cache, self.keys)
        del self.cache
        return step

    def step(self, ids: Tensor) -> None:
        """Append a token to each open question, `int64[Q, 1]`."""
        self.position = self.position + 1
        hidden = self.decode_step(self.model.language, self._place(ids, 0), self._new_tokens(ids))
        self.hidden = hidden[self.row, self.slot][:, None]

    def keep(self, open: Tensor) -> None:
        """Continue with these questions only, `bool[Q]`; the others' slots hold padding from now on."""
        self._select(open)


class DecodeStep:
    """A step that adds S tokens to each of B rows of a cache with K columns."""

    def __init__(self, language: LanguageModel, states: Cache, slots: int, columns: int) -> None:
        first = states.layers[0].keys
        assert first is not None
        rows, device = len(first), first.device
        self.columns = torch.arange(slots, device=device)  # those that the step writes
        self.cache = Cache(layers=[FixedLayer(layer, columns, self.columns) for layer in states.layers])
        self.keys = Tokens(*(torch.full((rows, columns), PADDING, device=device) for _ in Tokens._fields))
        self.tokens = Tokens(*(torch.zeros((rows, slots), dtype=torch.long, device=device) for _ in Tokens._fields))
        self.ids = torch.zeros((rows, slots), dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture(language)

    def load(self, states: Cache, keys: Tokens) -> None:
        """Start from the keys and values of prompts, and their token properties `[B, T]`."""
        length = keys.document.shape[1]
        for layer, computed in zip(self.cache.layers, states.layers, strict=True):
            layer.keys[:, :, :length].copy_(computed.keys)
            layer.values[:, :, :length].copy_(computed.values)
        for column, given in zip(self.keys, keys, strict=True):
            column.fill_(PADDING)
            column[:, :length].copy_(given)
        self.columns.copy_(torch.arange(length, length + len(self.columns), device=self.columns.device))

    def __call__(self, language: LanguageModel, ids: Tensor, tokens: Tokens) -> Tensor:
        """Return the last hidden states, `float[B, S, D]`, of tokens `[B, S]`; the next call overwrites them."""
        for kept, given in zip((self.ids, *self.tokens), (ids, *tokens), strict=True):
            kept.copy_(given)
        if self.graph is None:
            return self._run(language)
        self.graph.replay()
        return self.hidden

    def _run(self, language: LanguageModel) -> Tensor:
        for column, new in zip(self.keys, self.tokens, strict=True):
            column.index_copy_(1, self.columns, new)
        hidden: Tensor = language(language.embed(self.ids), self.tokens, self.keys, self.cache)
        self.columns += len(self.columns)
        return hidden

    def _capture(self, language: LanguageModel) -> None:
        """Run the step once, as libraries allocate memory at their first call, and record it."""
        with torch.cuda.device(self.ids.device):  # the model's, which need not be the current one
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(language)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads (a loader that pins memory, a server's) may call CUDA meanwhile.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.hidden = self._run(language)


class FixedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not analysed
    """Keys and values of a layer in tensors of a fixed size, `[B, heads, K, width]`.

    It serves local layers too: the mask hides what is outside their window.
    """

    def __init__(self, states: DynamicLayer, length: int, columns: Tensor) -> None:
        super().__init__()
        self.columns = columns
        for name in ("keys", "values"):
            given = getattr(states, name)
            setattr(self, name, given.new_zeros(*given.shape[:2], length, given.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new keys and values to the columns `self.columns`, and return all of them."""
        self.keys.index_copy_(2, self.columns, key_states)
        self.values.index_copy_(2, self.columns, value_states)
        return self.keys, self.values


def find_decode_step(language: LanguageModel, states: Cache, slots: int, columns: int) -> DecodeStep:
    """Return the decode step for a cache of prompts' states, kept from an earlier batch or new.

    A graph contains the addresses of the weights, so a model whose weights were replaced gets a new one.
    """
    first = states.layers[0].keys
    kept = _steps.setdefault(language, {})
    weights = hash(tuple(weight.data_ptr() for weight in language.parameters()))
    shape = (*first.shape[:2], slots, columns, first.dtype, first.device, weights)
    step = kept.pop(shape, None)
    while step is None and len(kept) >= STEPS:
        kept.pop(next(iter(kept)))  # the least recently used
    kept[shape] = step or DecodeStep(language, states, slots, columns)
    return kept[shape]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
