"""Process defaults of the scripts: thread spinning, memory allocation, fewer imports.

The scripts in `launch/` and the tests apply them before importing PyTorch; `import vlmvqa` applies none.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# Number of spins before an idle OpenMP thread sleeps. The far higher default makes training several times slower if
# other processes use the cores.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
# Options of glibc's mallopt, in bytes. Training steps allocate the same sizes repeatedly: freed memory below these
# sizes stays with the process, since pages returned to the kernel cause page faults when they are used again.
MALLOPT = {-3: 32 * 2**20, -1: 256 * 2**20}  # M_MMAP_THRESHOLD (32 MiB is its maximum), M_TRIM_THRESHOLD
# Packages that transformers imports if they are installed, although no script uses them through transformers:
# `Trainer` imports peft (and with it bitsandbytes and torch._inductor) and datasets, the object-detection losses
# import SciPy, the quantizers torchao. Our adapters, optimizers and readers import them if the config needs them.
UNUSED_BY_TRANSFORMERS = ("peft", "datasets", "scipy", "torchao")
NEEDED_LATER = ("torchao",)  # for its optimizers, which transformers imports when it builds one
UNUSED_BY_TIMM = "wandb"


def prepare() -> None:
    """Set the defaults of threads and memory; existing environment variables are kept."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # None under musl
    if mallopt is not None:
        for option, size in MALLOPT.items():
            mallopt(option, size)


@contextmanager
def fewer_imports() -> Iterator[None]:
    """Import transformers and timm in the block as if the packages above were not installed."""
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
    """Return a replacement of `available` that is False in the block, and afterwards too unless `later` is set.

    Modules imported in the block keep the replacement, so that they never use a package that they did not import.
    """
    return lambda *given, **named: bool(later and not inside and available(*given, **named))
