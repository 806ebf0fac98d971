"""Sizes of published models, so that planning needs no network.

The defaults of transformers' config classes aren't always those of the published weights: SigLIP's feed-forward layers
are 4,304 wide, PaliGemma's vocabulary has 257,216 entries. Listed are the sizes that differ from the defaults.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.build import pretrained_config
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.hub import OWN_CODE
from vlmvqa.models.vlm import ModelSettings

Settings = ModelSettings | PretrainedSettings

SO400M = {  # SigLIP's shape-optimized ViT, patch size 14
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
GEMMA_2B = {
    "model_type": "gemma",
    "vocab_size": 257216,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
GEMMA2_2B = {"model_type": "gemma2", "vocab_size": 257216, "hidden_size": 2304}


def _paligemma(size: int, text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "projection_dim": text["hidden_size"],
        "vision_config": {**SO400M, "model_type": "siglip_vision_model", "image_size": size, "vision_use_head": False},
        "text_config": text,
    }


IDEFICS2_8B = {
    "model_type": "idefics2",
    "vision_config": {**SO400M, "model_type": "idefics2_vision", "image_size": 980},
    "perceiver_config": {"model_type": "idefics2_perceiver"},
    "text_config": {"model_type": "mistral", "vocab_size": 32003},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"google/paligemma-3b-{kind}-{s}": _paligemma(s, GEMMA_2B) for kind in ("pt", "mix") for s in (224, 448, 896)},
    **{f"google/paligemma2-3b-{kind}-{s}": _paligemma(s, GEMMA2_2B) for kind in ("pt", "mix") for s in (224, 448, 896)},
    **{f"HuggingFaceM4/idefics2-8b{kind}": IDEFICS2_8B for kind in ("", "-base", "-chatty")},
}
# Hub ids of language models whose sizes are the defaults of their config class.
DEFAULT_SIZES = {"google/gemma-2-2b": "gemma2", "google/gemma-2-2b-it": "gemma2"}
# Tokens in addition to image and question: PaliGemma's BOS and newline; Idefics2's turns and image delimiters.
TEMPLATE_TOKENS = {"paligemma": 2, "idefics2": 16}


def known_settings(settings: Any) -> Settings:
    """Return the settings of a model whose sizes are known without the hub.

    Raises:
        InputError: The sizes are neither published here nor on this machine, or the architecture is not supported.
    """
    if isinstance(settings, PretrainedSettings):
        known_config(settings)
        return settings
    assert isinstance(settings, ModelSettings)
    name = settings.language.name
    if name not in CONFIG_MAPPING_NAMES and name not in DEFAULT_SIZES:
        advice = (
            "set an architecture (model.language.name=llama) and its sizes (model.language.overrides.hidden_size=...)"
        )
        _local_config("model.language.name", name, advice)
    # The fused loss needs no more memory.
    return replace(settings, language=replace(settings.language, name=DEFAULT_SIZES.get(name, name), loss="chunked"))


def known_config(settings: PretrainedSettings) -> PreTrainedConfig:
    """Return a pretrained model's config without using the hub; raises like `known_settings`."""
    name = settings.pretrained
    if name in PUBLISHED:
        return AutoConfig.for_model(**PUBLISHED[name])
    if settings.weights == "random":
        config = pretrained_config(settings)
    else:
        config = _local_config("model.pretrained", name, f"name a folder, or one of {', '.join(PUBLISHED)}")
    if config.model_type not in TEMPLATE_TOKENS:
        raise InputError(
            f"the planner doesn't know the number of image tokens of {name} ({config.model_type}); plan one of "
            f"{', '.join(TEMPLATE_TOKENS)}"
        )
    return config


def _local_config(key: str, name: str, advice: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, **OWN_CODE)
    except (OSError, ValueError) as error:
        reason = "are not on this machine, and a plan uses no network"
        raise InputError(f"the sizes of {key}={name} {reason}; {advice}") from error
