"""vlmvqa: train, change and measure vision-language models for visual question answering.

The public API is `__all__`, documented in docs/api.md, and `vlmvqa.metrics`; everything else may change.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmvqa.data.example import Example as Example
    from vlmvqa.data.example import Question as Question
    from vlmvqa.errors import InputError as InputError
    from vlmvqa.extras.report.attribution import Attribution as Attribution
    from vlmvqa.extras.report.attribution import attribute as attribute
    from vlmvqa.extras.report.attribution import draw as draw
    from vlmvqa.inference.predictor import Answer as Answer
    from vlmvqa.inference.predictor import Predictor as Predictor
    from vlmvqa.inference.predictor import load as load
    from vlmvqa.models.interface import GenerationSettings as GenerationSettings

# `vlmvqa.evaluation` is a folder next to src/ in a checkout, and inside the package in a wheel.
if not Path(__file__).with_name("evaluation").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[2]))

# Hide warnings of optional packages that users cannot act on: torchao registers types with a deprecated function of
# PyTorch; bitsandbytes has no faster kernels for CPUs.
for _name, _text in (("torch.utils._pytree", "register_constant"), ("bitsandbytes.backends.cpu.ops", "kernels")):
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())  # type: ignore[misc]

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Attribution",
    "Example",
    "GenerationSettings",
    "InputError",
    "Predictor",
    "Question",
    "attribute",
    "draw",
    "load",
]

# Modules of the public names, imported on first use: torch and transformers take seconds, and `import vlmvqa` and
# `vlmvqa.metrics` need neither.
_MODULES = {
    "Answer": "inference.predictor",
    "Attribution": "extras.report.attribution",
    "GenerationSettings": "models.interface",
    "Example": "data.example",
    "InputError": "errors",
    "Predictor": "inference.predictor",
    "Question": "data.example",
    "attribute": "extras.report.attribution",
    "draw": "extras.report.attribution",
    "load": "inference.predictor",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vlmvqa' has no attribute '{name}'")
    return getattr(importlib.import_module(f"vlmvqa.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
