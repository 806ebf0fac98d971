"""The entry point of the group `lmms_eval.models`: lmms-eval calls it to find the model `vlmvqa`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return the model's name and class; the class is imported on first use."""
    return ModelManifest("vlmvqa", simple_class_path="vlmvqa.evaluation.lmms_eval_adapter.model.VlmVqa")
