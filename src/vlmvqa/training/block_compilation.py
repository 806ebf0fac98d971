"""Compilation of the model's transformer blocks (`trainer.torch_compile`)."""

from __future__ import annotations

from vlmvqa.models.interface import Model


def compile_blocks(model: Model, backend: str | None, mode: str | None) -> str:
    """Compile each transformer block; return the backend.

    Blocks of one kind share a graph, so that compiling takes as long as for one block, and hooks of the model's parts
    and of FSDP2, which wraps blocks afterwards, are outside of it.
    """
    backend = backend or "inductor"
    for block in model.blocks:
        block.compile(backend=backend, mode=mode)
    return backend
