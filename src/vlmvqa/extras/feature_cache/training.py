"""The cached features of a training run, checked against its encoder and images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.extras.feature_cache.store import FeatureStore
from vlmvqa.models.trained_model import TrainedModel


def open_features(data: DataSettings, trained: TrainedModel, examples: Sequence[Example]) -> FeatureStore:
    """Open the features that `data.feature_cache` names.

    Raises:
        InputError: they are not those of this encoder and these images.
    """
    folder = Path(str(data.feature_cache)).expanduser()
    vision: Any = trained.model.vision
    store = FeatureStore.open(folder, vision, trained.processor.images, examples)
    if data.on_bad_record == "error" and store.skipped:
        image, why = next(iter(store.skipped.items()))
        raise InputError(f"image {image} has no features in {folder}: {why.rstrip('.')}; set data.on_bad_record=skip")
    return store
