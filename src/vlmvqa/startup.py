"""Defaults of a script's process: waiting threads, memory allocation, fewer imports.

The scripts of `launch/` and the tests apply them before they import PyTorch. `import vlmvqa` applies none.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# OpenMP threads that wait for work sleep after so many spins. The default is far higher, which makes a training several
# times slower where other processes use the cores.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
# Options of glibc's mallopt, in bytes. A training step allocates the same sizes again and again: freed memory below
# these sizes stays with the process, since pages returned to the kernel fault when they are used again.
MALLOPT = {-3: 32 * 2**20, -1: 256 * 2**20}  # M_MMAP_THRESHOLD (32 MiB is the most it takes), M_TRIM_THRESHOLD
# Packages that transformers imports wherever they are installed, and no script uses through transformers: `Trainer`
# imports peft (and so bitsandbytes and torch._inductor) and datasets, the object-detection losses import SciPy, the
# quantizers torchao. Our own adapters, optimizers and readers import them when a config asks for them.
UNUSED_BY_TRANSFORMERS = ("peft", "datasets", "scipy", "torchao")
NEEDED_LATER = ("torchao",)  # transformers looks for its optimizers when one is built
UNUSED_BY_TIMM = "wandb"


def prepare() -> None:
    """Set the defaults of threads and memory; environment variables that the user has set are kept."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # None under musl
    if mallopt is not None:
        for option, size in MALLOPT.items():
            mallopt(option, size)


@contextmanager
def fewer_imports() -> Iterator[None]:
    """In the block, import transformers and timm as if the packages above were not installed."""
    if UNUSED_BY_TIMM not in sys.modules:
        sys.modules[UNUSED_BY_TIMM] = None  # type: ignore[assignment] # makes its import fail
    import transformers.utils
    from transformers.utils import import_utils

    replaced: list[tuple[ModuleType, str, Any]] = []
    inside = [True]
    for package in UNUSED_BY_TRANSFORMERS:
        name = f"is_{package}_available"
        for module in (import_utils, transformers.utils):
            replaced.append((module, name, getattr(module, name)))
            setattr(module, name, _hidden(getattr(module, name), inside, package in NEEDED_LATER))
    try:
        yield
    finally:
        inside.clear()
        for module, name, function in replaced:
            setattr(module, name, function)
        if sys.modules.get(UNUSED_BY_TIMM, inside) is None:
            del sys.modules[UNUSED_BY_TIMM]


def _hidden(available: Callable[..., bool], inside: list[bool], later: bool) -> Callable[..., bool]:
    """Return a stand-in for `available` that is False inside the block, and with `later` the real answer after it.

    A module that is imported inside the block keeps the stand-in, so that it never uses a package it has not imported.
    """
    return lambda *given, **named: bool(later and not inside and available(*given, **named))
