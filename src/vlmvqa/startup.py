"""Process-wide defaults of a script, set before PyTorch is imported: waiting threads, the allocator, fewer imports.

The scripts of `launch/` and the tests call `prepare`; `import vlmvqa` alone changes nothing in a user's process.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# OpenMP threads that wait for work sleep after this many spins. By default they spin for as long as a core is wanted by
# others: on a busy machine a training is then several times slower.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
# glibc's mallopt parameters. Freed memory stays with the process: a training step allocates the same sizes again, and
# pages that were returned to the kernel would fault in anew at every step.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, LARGEST = 2**31 - 1, 2**30  # bytes
# What transformers imports wherever it is installed, and no script uses through transformers: `Trainer` imports peft
# (which imports bitsandbytes and so torch._inductor) and datasets, the object-detection losses import SciPy, the
# quantizers torchao. Together they nearly double the start of a training. Our own adapters, optimizers and readers
# import these packages themselves when a config asks for them.
UNUSED_BY_TRANSFORMERS = ("peft", "datasets", "scipy", "torchao")
STILL_FOUND_LATER = ("torchao",)  # its optimizers are looked up when one is built
UNUSED_BY_TIMM = "wandb"


def prepare() -> None:
    """Set the defaults; what the user has set in the environment is kept. Must run before `import torch`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGEST)
            mallopt(M_TRIM_THRESHOLD, KEPT)


@contextmanager
def fewer_imports() -> Iterator[None]:
    """Let transformers and timm, imported within, believe that the packages above are not installed."""
    if UNUSED_BY_TIMM not in sys.modules:
        sys.modules[UNUSED_BY_TIMM] = None  # type: ignore[assignment] # Python's own way to make an import fail
    import transformers.utils
    from transformers.utils import import_utils

    asked: list[tuple[ModuleType, str, Any]] = []
    within = [True]
    for package in UNUSED_BY_TRANSFORMERS:
        name = f"is_{package}_available"
        for module in (import_utils, transformers.utils):
            asked.append((module, name, getattr(module, name)))
            setattr(module, name, _hidden(getattr(module, name), within, package in STILL_FOUND_LATER))
    try:
        yield
    finally:
        within.clear()
        for module, name, function in asked:
            setattr(module, name, function)
        if sys.modules.get(UNUSED_BY_TIMM, within) is None:
            del sys.modules[UNUSED_BY_TIMM]


def _hidden(available: Callable[..., bool], within: list[bool], later: bool) -> Callable[..., bool]:
    """False in place of `available`: in modules imported within for ever, or until the end of the block."""
    return lambda *given, **named: bool(later and not within and available(*given, **named))
