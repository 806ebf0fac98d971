"""Every byte that is alive while operations run, from each storage's birth to its death, and their FLOPs.

Under FakeTensorMode nothing is computed and nothing allocated, so this costs the same at any size.
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


class Ledger(TorchDispatchMode):
    """The bytes alive after each operation, and the operations' FLOPs, by what they grow with."""

    def __init__(self, rows: int = 0, tokens: int = 0, pictures: int = 1) -> None:
        super().__init__()
        self.rows, self.tokens, self.pictures = rows, tokens, pictures
        self.timeline: list[tuple[int, int, int, int]] = []
        self.marks: dict[str, int] = {}
        self._alive = [0, 0, 0]  # constant, a row, a supervised token
        self._flops = [0, 0, 0]
        self._gradients = 0
        self._known: dict[weakref.ref[Any], None] = {}
        self._kept: list[Any] = []

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, nor views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._kept.append(storage)
            self._known[weakref.ref(storage)] = None

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count these, which are there already."""
        for tensor in tensors:
            self._born(tensor.untyped_storage())

    def mark(self, name: str) -> None:
        """Name this moment."""
        self.marks[name] = len(self.timeline)
        self._record()

    def mark_gradient(self, name: str, tensor: Tensor) -> None:
        """Name the moment when a tensor's gradient is there."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.mark(name))

    def set_gradient_aside(self, parameter: Tensor) -> None:
        """Drop a gradient that is done: where it is kept, and how much of it, is the strategy's choice."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes
        parameter.grad = None

    def flops(self) -> dict[str, int]:
        return {"row_flops": self._flops[1], "token_flops": self._flops[2]}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.tokens and function is torch.ops.aten.index.Tensor:
            args = (args[0], self._without_data(args[1]))
        if self.tokens and function is torch.ops.aten._local_scalar_dense.default:
            return self.pictures  # the one number that a model reads from its data: how many of a row are not padding
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self._add(self._flops, flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        self._record()
        return out

    def _record(self) -> None:
        constant, row, token = self._alive
        self.timeline.append((constant, row, token, self._gradients))

    def _without_data(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """A mask as an index: how many tokens are supervised is data, of which there is none; all pictures are real."""
        known: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool and index.ndim == 1:
                known.append(torch.arange(len(index)))
            elif index is not None and index.dtype == torch.bool:
                known += [torch.zeros(self.tokens, dtype=torch.int64) for _ in range(index.ndim)]
            else:
                known.append(index)
        return known

    def _born(self, storage: torch.UntypedStorage) -> None:
        if weakref.ref(storage) in self._known:
            return
        size = storage.nbytes()
        self._add(self._alive, size)

        def gone(reference: weakref.ref[Any]) -> None:
            self._known.pop(reference, None)
            self._add(self._alive, -size)

        self._known[weakref.ref(storage, gone)] = None

    def _add(self, counts: list[int], amount: int) -> None:
        for place, prime in ((1, self.rows), (2, self.tokens)):
            if prime and amount % prime == 0:
                counts[place] += amount // prime
                return
        counts[0] += amount
