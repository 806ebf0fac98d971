"""vlmvqa: train, change and measure vision-language models for visual question answering."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmvqa.inference.predict import load as load

# bitsandbytes asks the hub for faster kernels of a CPU, and says that it has none; torchao registers its types with
# PyTorch in a way that newer ones do not need.
for name in ("bitsandbytes.backends.cpu.ops", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: not for `import vlmvqa.metrics`.
    if name == "load":
        from vlmvqa.inference.predict import load

        return load
    raise AttributeError(f"module 'vlmvqa' has no attribute '{name}'")
