"""The functions of `models.checkpoint.Family` for pretrained models: load a saved one, compose one for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, ProcessorMixin
from transformers.initialization import no_init_weights

from vlmvqa import fingerprint
from vlmvqa.config.compose import build_settings
from vlmvqa.data.example import Example
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.build import build_pretrained, pretrained_config
from vlmvqa.extras.pretrained.hf_processor import ADDED_TOKENS, load_processor, random_processor
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM, attention_pattern_of
from vlmvqa.extras.pretrained.processor import PretrainedProcessor
from vlmvqa.models import loading
from vlmvqa.models.checkpoint import CONFIG, OURS

if TYPE_CHECKING:
    from vlmvqa.config.schema import DataSettings

SETTINGS = PretrainedSettings

# ---- saved models


def saved_settings(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], PretrainedSettings]:
    """Return vlmvqa's entries of a `config.json`, and the settings that load the model from its folder.

    The `config.json` of an adapter's folder is vlmvqa's own; its entry `model` holds the settings of the base model.
    """
    if "model_type" not in config:
        return dict(config), build_settings(PretrainedSettings, config["model"], f"{folder / CONFIG}: model")
    known = config.get(OURS, {})
    where = f"{folder / CONFIG}: {OURS}.model"
    settings = build_settings(PretrainedSettings, known.get("model", {"pretrained": str(folder)}), where)
    return known, dataclasses.replace(
        settings, pretrained=str(folder), weights="hub", overrides={}, image_splitting=None
    )


def load(folder: Path, settings: PretrainedSettings, config: Mapping[str, Any]) -> PretrainedVLM:
    """Load a saved model."""
    return build_pretrained(settings, pretrained_config(settings))


def uninitialized_like(model: PretrainedVLM, settings: PretrainedSettings) -> PretrainedVLM:
    """Build a model with the architecture of `model`; the caller sets its weights."""
    with no_init_weights():
        return build_pretrained(settings, deepcopy(model.net.config), uninitialized=True)


def load_processing_class(folder: Path) -> ProcessorMixin:
    """Load transformers' processor of a saved model."""
    return load_processor(str(folder))


def make_processor(library: ProcessorMixin, model: PretrainedVLM, config: Mapping[str, Any]) -> PretrainedProcessor:
    """Return the processor of a saved model."""
    return PretrainedProcessor.of(library, model.attention_pattern, config.get("max_text_tokens"))


def continued_settings(settings: PretrainedSettings, folder: Path) -> PretrainedSettings:
    """Return the settings unchanged: `pretrained` is already the folder of the saved model."""
    return settings


# ---- new models


def compose(
    settings: PretrainedSettings, data: DataSettings, examples: Sequence[Example]
) -> tuple[PretrainedVLM, PretrainedProcessor, dict[str, str] | None]:
    """Return the model of a run, its processor, and the name and fingerprint of the weights that training starts from.

    With `tokenizer: trained`, a tokenizer is trained on the texts of `examples`.
    """
    processor, config = _processor(settings, data, examples)
    if settings.weights == "random":
        return build_pretrained(settings, config), processor, None
    folder, named = loading.find(settings.pretrained), Path(settings.pretrained).expanduser()
    name = str(named.resolve()) if named.exists() else settings.pretrained  # absolute: valid in any working directory
    started_from = {"model": name, "weights": fingerprint.weights_in(folder)}
    return build_pretrained(dataclasses.replace(settings, pretrained=str(folder)), config), processor, started_from


def compose_processor(
    settings: PretrainedSettings, data: DataSettings, examples: Sequence[Example]
) -> PretrainedProcessor:
    """Return the processor alone; no weights are loaded."""
    return _processor(settings, data, examples)[0]


def _processor(
    settings: PretrainedSettings, data: DataSettings, examples: Sequence[Example]
) -> tuple[PretrainedProcessor, PreTrainedConfig]:
    """Return the processor of a pretrained model, and the network's config."""
    if data.resize != "squash" or data.reduced_decoding or data.tiles is not None:
        raise InputError(
            f"{settings.pretrained} resizes images as in its training; leave data.resize, data.reduced_decoding and "
            "data.tiles out"
        )
    config = pretrained_config(settings)
    if settings.weights == "random":
        if settings.tokenizer != "trained":
            raise InputError("model.weights=random needs model.tokenizer=trained, a tokenizer trained on the data")
        tokenizer = train_tokenizer(examples, config.get_text_config().vocab_size - ADDED_TOKENS)
        library, config = random_processor(config, tokenizer, settings.image_splitting)
    else:
        library = load_processor(settings.pretrained, settings.image_splitting)
    return PretrainedProcessor.of(library, attention_pattern_of(config), data.max_text_tokens), config
