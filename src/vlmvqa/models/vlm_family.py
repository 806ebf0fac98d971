"""The family of `VLM`: how its models are saved, loaded and composed for a run (`checkpoint.Family`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from vlmvqa.data.example import Example
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import load_tokenizer, train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.hub import OWN_CODE, unread
from vlmvqa.models.build import build, build_uninitialized
from vlmvqa.models.model_folder import CONFIG, TOKENIZER, WEIGHTS
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.settings import build_settings

if TYPE_CHECKING:
    from vlmvqa.config.schema import DataSettings

SETTINGS = ModelSettings

# ---- saved models


def saved_settings(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], ModelSettings]:
    """Return the entries of a `config.json`, and the settings that build the saved model."""
    return dict(config), build_settings(ModelSettings, config["model"], f"{folder / CONFIG}: model")


def load(folder: Path, settings: ModelSettings, config: Mapping[str, Any]) -> VLM:
    """Load a saved model.

    Raises:
        InputError: the file of weights is missing or broken, or belongs to another model.
    """
    model = uninitialized(settings, config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder / WEIGHTS} does not hold this model's weights ({str(error).splitlines()[0]})"
        ) from error
    return model


def uninitialized(settings: ModelSettings, config: Mapping[str, Any]) -> VLM:
    """Build a saved model without its weights."""
    language_config = dict(config["language_config"])
    return build_uninitialized(settings, AutoConfig.for_model(language_config.pop("model_type"), **language_config))


def uninitialized_like(model: VLM, settings: ModelSettings) -> VLM:
    """Build a model like `model`, whose weights are set afterwards."""
    return build_uninitialized(settings, deepcopy(model.language.config))


def load_processing_class(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a saved model."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / TOKENIZER, **OWN_CODE)
    except (OSError, ValueError) as error:
        raise unread(f"the tokenizer of {folder}", error) from error
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerBase, model: VLM, config: Mapping[str, Any]) -> Processor:
    """Return the processor of a saved model."""
    images = build_settings(ImageSettings, config["images"], "config.json: images")
    return Processor(
        tokenizer, images, model.vision.num_image_tokens, model.attention_pattern, config["max_text_tokens"]
    )


def continued_settings(settings: ModelSettings, folder: Path) -> ModelSettings:
    """Return the settings of a run that continues to train a saved model: it uses the saved tokenizer."""
    language = dataclasses.replace(settings.language, tokenizer=str(folder / TOKENIZER))
    return dataclasses.replace(settings, language=language)


# ---- new models


def compose(settings: ModelSettings, data: DataSettings, examples: Sequence[Example]) -> tuple[VLM, Processor, None]:
    """Build a model and its processor for a run.

    Args:
        examples: the texts that a tokenizer is trained on, if the settings ask for one.
    """
    model = build(settings)
    return model, _processor(model, settings, data, examples), None


def compose_processor(settings: ModelSettings, data: DataSettings, examples: Sequence[Example]) -> Processor:
    """Return the processor alone: the model is built on the meta device."""
    vision = dataclasses.replace(settings.vision, weights="random")
    language = dataclasses.replace(settings.language, weights="random")
    with torch.device("meta"):
        model = build(dataclasses.replace(settings, vision=vision, language=language))
    return _processor(model, settings, data, examples)


def _processor(model: VLM, settings: ModelSettings, data: DataSettings, examples: Sequence[Example]) -> Processor:
    if settings.language.tokenizer == "trained":
        tokenizer = train_tokenizer(examples, model.language.config.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.language.tokenizer or settings.language.name)
    known = model.vision.data_config
    images = ImageSettings(
        settings.vision.image_size,
        tuple(known["mean"]),
        tuple(known["std"]),
        known["interpolation"],
        data.resize,
        data.reduced_decoding,
    )
    return Processor(tokenizer, images, model.vision.num_image_tokens, model.attention_pattern, data.max_text_tokens)
