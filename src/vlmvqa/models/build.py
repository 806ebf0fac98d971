"""Build a `VLM` from settings, with weights from the hub, from files, or random.

The vision encoder is timm's, the decoder transformers'. Every way in which either can fail to load ends in an error
message that names the setting.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import VisionTransformer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmvqa.errors import InputError, suggest
from vlmvqa.hub import OWN_CODE, SAFE_WEIGHTS, hub_or_cache, unread
from vlmvqa.models.interface import DTYPES, cast_parameters
from vlmvqa.models.language import LanguageModel, LanguageSettings
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.progress import loading_bar


def build(settings: ModelSettings) -> VLM:
    """Build a model with its weights.

    Raises:
        InputError: an unknown setting, or weights that cannot be loaded.
    """
    if settings.dtype not in DTYPES:
        raise InputError(f"model.dtype={settings.dtype} is unknown; use one of {', '.join(DTYPES)}")
    vision = build_vision_encoder(settings.vision)
    return assemble(vision, build_language_model(settings.language, DTYPES[settings.dtype]), settings)


def build_uninitialized(settings: ModelSettings, language_config: PreTrainedConfig) -> VLM:
    """Build a model whose weights are loaded afterwards, from the decoder's full config."""
    with no_init_weights():
        vision = build_vision_encoder(dataclasses.replace(settings.vision, weights="random"))
        causal_lm = AutoModelForCausalLM.from_config(language_config, dtype=DTYPES[settings.dtype])
    return assemble(vision, LanguageModel(causal_lm, settings.language.attention, settings.language.loss), settings)


def assemble(vision: VisionEncoder, language: LanguageModel, settings: ModelSettings) -> VLM:
    """Connect an encoder and a language model with a new projector."""
    projector = Projector(vision.width, language.width, settings.projector.kind, settings.projector.dropout)
    return cast_parameters(VLM(vision, projector, language, settings.attention_pattern), DTYPES[settings.dtype])


# ---- the vision encoder


def build_vision_encoder(settings: VisionSettings) -> VisionEncoder:
    """Build timm's model.

    Raises:
        InputError: an unknown name or setting, weights that cannot be loaded, or no vision transformer.
    """
    if settings.weights != "random" and settings.overrides:
        raise InputError(
            f"model.vision.overrides would change the shape of {settings.name}'s trained weights; "
            "leave them out, or set model.vision.weights=random"
        )
    name = settings.name.removeprefix("timm/")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise InputError(
            f"model.vision.name={settings.name} is no timm model{suggest(architecture, timm.list_models())}"
        )
    arguments = {"num_classes": 0, "global_pool": "", "img_size": settings.image_size, **settings.overrides}
    arguments |= _weights_arguments(settings.weights)
    try:
        with hub_or_cache() if settings.weights == "hub" else nullcontext():
            encoder = timm.create_model(name, **arguments)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        near = suggest(unknown[1], inspect.signature(VisionTransformer).parameters) if unknown else ""
        raise InputError(
            f"model.vision.overrides: timm's {architecture} does not take these settings: {error}{near}"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if settings.weights == "random":
            raise
        raise unread(f"model.vision.name={settings.name} with weights={settings.weights}", error) from error
    if not hasattr(encoder, "has_class_token") or not hasattr(encoder, "blocks"):
        raise InputError(f"model.vision.name={settings.name} is not a vision transformer; choose a timm vit_* model")
    if settings.weights == "random":
        # timm initializes the position embedding with a standard deviation of 0.02, fifty times smaller than the
        # patches it is added to: trained from scratch, the encoder then hardly sees positions for a long time.
        nn.init.normal_(encoder.pos_embed)
    return VisionEncoder(encoder, settings.image_size)


def _weights_arguments(weights: str) -> dict[str, Any]:
    """Return timm's arguments for "hub", "random", or the path of a weights file."""
    if weights == "random":
        return {}
    if weights == "hub":
        return {"pretrained": True}
    path = Path(weights).expanduser()
    if not path.is_file():
        raise InputError(f"model.vision.weights={weights}: no such file; give a path, 'hub' or 'random'")
    if path.suffix != ".safetensors":
        raise InputError(
            f"model.vision.weights={weights} is no .safetensors, and pickled weights, which can run code, "
            "are never read here; save them with safetensors.torch.save_file"
        )
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


# ---- the language model


def language_config(settings: LanguageSettings) -> PreTrainedConfig:
    """Return the decoder's config: from the hub or a folder, or an architecture's defaults, with the overrides.

    Raises:
        InputError: a config that cannot be read, or an override that it does not have.
    """
    try:
        if settings.name in CONFIG_MAPPING_NAMES:
            config = AutoConfig.for_model(settings.name)
        else:
            with hub_or_cache(settings.name):
                config = AutoConfig.from_pretrained(settings.name, **OWN_CODE)
    except (OSError, ValueError) as error:
        raise unread(f"model.language.name={settings.name}", error) from error
    known = config.to_dict()
    for key in settings.overrides:
        if key not in known:
            raise InputError(f"model.language.overrides has no '{key}' for {settings.name}{suggest(key, known)}")
    if settings.name in CONFIG_MAPPING_NAMES:
        made: PreTrainedConfig = type(config)(**settings.overrides)
    else:
        with hub_or_cache(settings.name):
            made = AutoConfig.from_pretrained(settings.name, **settings.overrides, **OWN_CODE)
    return made


def build_language_model(settings: LanguageSettings, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Build the decoder with weights from the hub or a folder, or with random weights.

    Raises:
        InputError: an unknown name, unreachable or gated weights, or an architecture without weights.
    """
    if settings.weights == "hub" and settings.overrides:
        raise InputError(
            f"model.language.overrides would change the shape of {settings.name}'s trained weights; "
            "leave them out, or set model.language.weights=random"
        )
    config = language_config(settings)
    if settings.weights == "random":
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif settings.weights != "hub":
        raise InputError(
            f"model.language.weights={settings.weights} is unknown; use 'hub' (also for a folder) or 'random'"
        )
    elif settings.name in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"model.language.name={settings.name} is an architecture, which has no weights; "
            "name a hub id or folder, or set model.language.weights=random"
        )
    else:
        try:
            with hub_or_cache(settings.name), loading_bar():
                causal_lm = AutoModelForCausalLM.from_pretrained(
                    settings.name, config=config, dtype=dtype, **SAFE_WEIGHTS
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise unread(f"model.language.name={settings.name}", error) from error
    return LanguageModel(causal_lm, settings.attention, settings.loss)
