"""Bytes alive after each operation, by tracking storages from allocation to release, and FLOPs.

torch.distributed._tools.MemTracker tracks storages too, but reports totals per module: no timeline, no split by what
grows with the batch, no FLOPs, and no operations whose output size depends on data.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class MemoryTracker(TorchDispatchMode):
    """Tracks bytes alive and FLOPs, split into a constant, a share per row and a share per supervised token.

    Under FakeTensorMode nothing is computed or allocated, so tracking costs the same at any size.

    Args:
        rows: Prime number of rows (0: count everything as constant).
        tokens: Prime number of supervised tokens, likewise.
        crops: Number of crops of an image that the encoder sees.

    Attributes:
        timeline: After each operation: constant bytes, bytes per row, bytes per supervised token, gradient bytes.
        marks: Indices into the timeline, by name.
        part: Name that FLOPs are counted under; attention of the decoder has its own.
    """

    def __init__(self, rows: int = 0, tokens: int = 0, crops: int = 1) -> None:
        super().__init__()
        self.rows, self.tokens, self.crops = rows, tokens, crops
        self.timeline: list[tuple[int, int, int, int]] = []
        self.marks: dict[str, int] = {}
        self._alive = [0, 0, 0]  # constant, per row, per supervised token
        self._flops: dict[str, list[int]] = {}
        self.part = "encoder"
        self._gradients = 0
        self._tracked: dict[weakref.ref[Any], None] = {}
        self._excluded: list[Any] = []

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Exclude existing tensors and views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._excluded.append(storage)
            self._tracked[weakref.ref(storage)] = None

    def include(self, tensors: Iterable[Tensor]) -> None:
        """Count existing tensors."""
        for tensor in tensors:
            self._track(tensor.untyped_storage())

    def mark(self, name: str) -> None:
        """Mark the current moment."""
        self.marks[name] = len(self.timeline)
        self._record()

    def mark_gradient(self, name: str, tensor: Tensor) -> None:
        """Mark the moment when the gradient of a tensor is computed."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.mark(name))

    def release_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient separately and release it: where it is kept depends on the strategy."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes
        parameter.grad = None

    def flops(self) -> tuple[dict[str, int], int]:
        """Return the FLOPs per row, by part, and per supervised token."""
        return {name: row for name, (_, row, _) in self._flops.items()}, sum(c[2] for c in self._flops.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.tokens and function is torch.ops.aten.index.Tensor:
            args = (args[0], self._replace_masks(args[1]))
        if self.tokens and function is torch.ops.aten._local_scalar_dense.default:
            return self.crops  # the only number that a model reads from its data: the crops that aren't padding
        if self.tokens and function is torch.ops.aten.nonzero.default and args[0].ndim == 1:  # the supervised tokens
            args, function = ((self.tokens, args[0].ndim), 0), torch.ops.aten.full.default
            kwargs = {"dtype": torch.int64}
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            packet = function._overloadpacket
            attends = packet is torch.ops.aten.bmm or "attention" in str(packet)
            part = "attention" if attends and self.part == "decoder" else self.part
            counts = self._flops.setdefault(part, [0, 0, 0])
            self._add(counts, flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track(tensor.untyped_storage())
        self._record()
        return out

    def _record(self) -> None:
        constant, row, token = self._alive
        self.timeline.append((constant, row, token, self._gradients))

    def _replace_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Replace boolean indices, whose size depends on data: all crops are real."""
        return [
            torch.arange(len(index)) if index is not None and index.dtype == torch.bool and index.ndim == 1 else index
            for index in indices
        ]

    def _track(self, storage: torch.UntypedStorage) -> None:
        if weakref.ref(storage) in self._tracked:
            return
        size = storage.nbytes()
        self._add(self._alive, size)

        def released(reference: weakref.ref[Any]) -> None:
            self._tracked.pop(reference, None)
            self._add(self._alive, -size)

        self._tracked[weakref.ref(storage, released)] = None

    def _add(self, counts: list[int], amount: int) -> None:
        for index, prime in ((1, self.rows), (2, self.tokens)):
            if prime and amount % prime == 0:
                counts[index] += amount // prime
                return
        counts[0] += amount
