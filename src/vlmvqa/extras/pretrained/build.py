"""Build a pretrained model: its config and weights, from the hub, a folder, or an architecture's defaults."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmvqa.errors import InputError, suggest
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM
from vlmvqa.hub import OWN_CODE, SAFE_WEIGHTS, hub_or_cache, loading_bar, unread
from vlmvqa.models.checkpoint import OURS
from vlmvqa.models.interface import DTYPES


def pretrained_config(settings: PretrainedSettings) -> PreTrainedConfig:
    """Return the model's config: from the hub or a folder, or an architecture's defaults with overrides.

    Raises:
        InputError: an unknown name or key, a config that cannot be read, or not a vision-language model.
    """
    if settings.pretrained in CONFIG_MAPPING_NAMES:
        known = AutoConfig.for_model(settings.pretrained).to_dict()
        for key in settings.overrides:
            if key not in known:
                raise InputError(f"model.overrides has no '{key}' for {settings.pretrained}{suggest(key, known)}")
        config: PreTrainedConfig = AutoConfig.for_model(settings.pretrained, **settings.overrides)
    else:
        try:
            with hub_or_cache(settings.pretrained):
                config = AutoConfig.from_pretrained(settings.pretrained, **OWN_CODE)
        except (OSError, ValueError) as error:
            raise unread(f"model.pretrained={settings.pretrained}", error) from error
    if config.model_type == OURS or config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(
            f"{settings.pretrained} is not a vision-language model of transformers but of model_type "
            f"{config.model_type}; name one that takes an image and text, such as PaliGemma or Idefics2"
        )
    return config


def build_pretrained(
    settings: PretrainedSettings, config: PreTrainedConfig, uninitialized: bool = False
) -> PretrainedVLM:
    """Build the model with its weights, or with `uninitialized` ones, which are set afterwards.

    Raises:
        InputError: unreachable, gated or broken weights, or a model that takes no image.
    """
    options: dict[str, Any] = {} if settings.attention is None else {"attn_implementation": settings.attention}
    dtype = DTYPES[settings.dtype]
    try:
        if settings.weights == "random" or uninitialized:
            made = PretrainedVLM(AutoModelForImageTextToText.from_config(config, dtype=dtype, **options))
            made.net.tie_weights()  # transformers does so only when it initializes weights
            _initialize_latents(made)
            return made
        with hub_or_cache(settings.pretrained), loading_bar():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                settings.pretrained, config=config, dtype=dtype, output_loading_info=True, **options, **SAFE_WEIGHTS
            )
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise unread(f"model.pretrained={settings.pretrained}", error) from error
    net, about = loaded
    if about["missing_keys"]:
        missing = sorted(about["missing_keys"])
        raise InputError(
            f"{settings.pretrained} has no weights for {missing[0]} ({len(missing)} are missing), which would be "
            "random; download it again, or name the complete model"
        )
    return PretrainedVLM(net)


def _initialize_latents(model: PretrainedVLM) -> None:
    """Initialize a resampler's queries: transformers sets them to ones, and equal queries have equal gradients."""
    latents = getattr(getattr(model.projector, "perceiver_resampler", None), "latents", None)
    if latents is not None:
        nn.init.normal_(latents, std=0.02)
