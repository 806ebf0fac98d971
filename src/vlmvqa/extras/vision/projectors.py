"""Kinds of projector that change the number of tokens of an image.

To add a kind, write its class, a subclass of `Projector`, in a module of its own and add a line to `KINDS`.
"""

from __future__ import annotations

import importlib
import inspect

from vlmvqa.errors import InputError, suggest
from vlmvqa.models.projector import LAYERS, Projector
from vlmvqa.models.vision import FeatureShape
from vlmvqa.models.vlm import ProjectorSettings

# Module under `vlmvqa.extras.vision`, and class.
KINDS = {
    "pixel_shuffle": ("reductions", "PixelShuffle"),
    "pool": ("reductions", "AveragePool"),
    "resampler": ("resampler", "Resampler"),
}


def build_kind(settings: ProjectorSettings, features: FeatureShape, width: int) -> Projector:
    """Build a projector of one of `KINDS` from features to embeddings of a width.

    Raises:
        InputError: an unknown kind or option, or features that the kind cannot take.
    """
    kind, known = settings.kind, (*LAYERS, *KINDS)
    if kind not in known:
        raise InputError(f"model.projector.kind={kind} is unknown; use one of {', '.join(known)}{suggest(kind, known)}")
    options: list[str] = []
    if kind in KINDS:
        module, name = KINDS[kind]
        make = getattr(importlib.import_module(f"vlmvqa.extras.vision.{module}"), name)
        options = [name for name in inspect.signature(make).parameters if name not in ("features", "width", "dropout")]
    for option in settings.options:
        if option not in options:
            raise InputError(f"model.projector.options has no '{option}' for kind={kind}{suggest(option, options)}")
    projector: Projector = make(features, width, dropout=settings.dropout, **settings.options)
    return projector
