"""Compilation of the model's transformer blocks (`trainer.torch_compile`)."""

from __future__ import annotations

from torch._dynamo import list_backends
from torch._inductor import list_mode_options

from vlmvqa.config.compatibility import Conflicts, RunRequest
from vlmvqa.errors import suggest
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


def conflicts(r: RunRequest) -> Conflicts:
    """Return the conflicts of `torch.compile`'s arguments."""
    backend, mode = r.trainer.get("torch_compile_backend"), r.trainer.get("torch_compile_mode")
    backends, modes = list_backends(None), list(list_mode_options())
    return [
        (
            backend is not None and backend not in backends,
            f"trainer.torch_compile_backend={backend} is unknown; use inductor{suggest(str(backend), backends)}",
        ),
        (
            mode is not None and (mode not in modes or backend not in (None, "inductor")),
            f"trainer.torch_compile_mode={mode} must be one of {', '.join(modes)}, with the backend inductor",
        ),
    ]
