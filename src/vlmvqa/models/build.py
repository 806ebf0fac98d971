"""Build a `VLM` from settings, load a saved one, and compose one for a run (`checkpoint.Family`).

Weights come from the hub, from files, or are random. The vision encoder is timm's, the decoder transformers'. Every
failure to load either ends in an error message that names the setting.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import Eva, VisionTransformer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmvqa.config.compose import build_settings
from vlmvqa.data.example import Example
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import InputError, suggest
from vlmvqa.models.checkpoint import CONFIG, TOKENIZER, WEIGHTS
from vlmvqa.models.interface import DTYPES, cast_parameters
from vlmvqa.models.language import LanguageModel, LanguageSettings
from vlmvqa.models.projector import LAYERS, Projector
from vlmvqa.models.vision import FeatureShape, VisionEncoder, VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings, ProjectorSettings

if TYPE_CHECKING:
    from vlmvqa.config.schema import DataSettings


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
        vision = build_vision_encoder(random_weights(settings.vision))
        causal_lm = AutoModelForCausalLM.from_config(language_config, dtype=DTYPES[settings.dtype])
    return assemble(vision, LanguageModel(causal_lm, settings.language.attention, settings.language.loss), settings)


def assemble(vision: VisionEncoder, language: LanguageModel, settings: ModelSettings) -> VLM:
    """Connect an encoder and a language model with a new projector."""
    projector = build_projector(settings.projector, vision.features, language.width)
    return cast_parameters(VLM(vision, projector, language, settings.attention_pattern), DTYPES[settings.dtype])


# ---- the vision encoder


def build_vision_encoder(settings: VisionSettings) -> VisionEncoder:
    """Build an encoder from timm's model, or several that are fused.

    Raises:
        InputError: an unknown name or setting, weights that cannot be loaded, or a model without usable features.
    """
    if settings.fused:
        from vlmvqa.extras.vision.encoders import FusedEncoder

        return FusedEncoder([build_vision_encoder(one) for one in fused_settings(settings)])
    encoder = build_timm_model(settings)
    if settings.layers == -1 and settings.norm and isinstance(encoder, VisionTransformer | Eva):
        return VisionEncoder(encoder, settings.image_size, settings.class_token)
    from vlmvqa.extras.vision.encoders import LayerEncoder

    return LayerEncoder(encoder, settings)


def fused_settings(settings: VisionSettings) -> list[VisionSettings]:
    """Return the settings of each encoder that is fused; of one encoder, its own."""
    first = dataclasses.replace(settings, fused=())
    return (
        [dataclasses.replace(one, class_token=False) for one in (first, *settings.fused)] if settings.fused else [first]
    )


def random_weights(settings: VisionSettings) -> VisionSettings:
    """Return the settings of the same encoder with random weights."""
    return dataclasses.replace(settings, weights="random", fused=tuple(map(random_weights, settings.fused)))


def build_timm_model(settings: VisionSettings) -> Any:
    """Build timm's model without a head, for `build_vision_encoder`."""
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
    arguments = timm_arguments(settings)
    try:
        encoder = _create(name, settings, arguments)
    except AssertionError as error:
        raise InputError(f"model.vision.name={settings.name} cannot be built without a head: {error}") from error
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        near = suggest(unknown[1], inspect.signature(VisionTransformer).parameters) if unknown else ""
        raise InputError(
            f"model.vision.overrides: timm's {architecture} does not take these settings: {error}{near}"
        ) from error
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise InputError(
            f"model.vision.name={settings.name} cannot be used: its batch normalisation keeps running statistics, "
            "which are not weights; choose a vision transformer, ConvNeXt or Swin"
        )
    if settings.weights == "random" and isinstance(getattr(encoder, "pos_embed", None), nn.Parameter):
        # timm initializes the position embedding with a standard deviation of 0.02, fifty times smaller than the
        # patches it is added to: trained from scratch, the encoder then hardly sees positions for a long time.
        nn.init.normal_(encoder.pos_embed)
    return encoder


def _create(name: str, settings: VisionSettings, arguments: dict[str, Any]) -> Any:
    """Create timm's model, without an image size if it takes none, as a convolutional model."""
    try:
        if settings.weights == "random":
            return timm.create_model(name, **arguments)
        from vlmvqa.hub import reading

        what = f"model.vision.name={settings.name} with weights={settings.weights}"
        with reading(what, None if settings.weights == "hub" else settings.weights, RuntimeError):
            return timm.create_model(name, **arguments)
    except TypeError as error:
        if "'img_size'" not in str(error) or "img_size" not in arguments:
            raise
        return _create(name, settings, {key: value for key, value in arguments.items() if key != "img_size"})


def timm_arguments(settings: VisionSettings) -> dict[str, Any]:
    """Return the arguments of `timm.create_model`.

    Raises:
        InputError: a weights file does not exist or is not in safetensors format.
    """
    arguments = {"num_classes": 0, "global_pool": "", "img_size": settings.image_size, **settings.overrides}
    weights = settings.weights
    if weights == "random":
        return arguments
    if weights == "hub":
        return {**arguments, "pretrained": True}
    path = Path(weights).expanduser()
    if not path.is_file():
        raise InputError(f"model.vision.weights={weights}: no such file; give a path, 'hub' or 'random'")
    if path.suffix != ".safetensors":
        raise InputError(
            f"model.vision.weights={weights} is no .safetensors, and pickled weights, which can run code, "
            "are never read here; save them with safetensors.torch.save_file"
        )
    return {**arguments, "pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


# ---- the projector


def build_projector(settings: ProjectorSettings, features: FeatureShape, width: int) -> Projector:
    """Build the projector from features to embeddings of a width.

    Raises:
        InputError: an unknown kind or option, or features that the kind cannot take.
    """
    if settings.kind in LAYERS and not settings.options:
        return Projector(features, width, settings.kind, settings.dropout)
    from vlmvqa.extras.vision.projectors import build_kind

    return build_kind(settings, features, width)


# ---- the language model


def language_config(settings: LanguageSettings) -> PreTrainedConfig:
    """Return the decoder's config: from the hub or a folder, or an architecture's defaults, with the overrides.

    Raises:
        InputError: a config that cannot be read, or an override that it does not have.
    """
    if settings.name in CONFIG_MAPPING_NAMES:
        config = AutoConfig.for_model(settings.name)
    else:
        from vlmvqa.hub import OWN_CODE, reading

        with reading(f"model.language.name={settings.name}", settings.name):
            config = AutoConfig.from_pretrained(settings.name, **OWN_CODE)
    known = config.to_dict()
    for key in settings.overrides:
        if key not in known:
            raise InputError(f"model.language.overrides has no '{key}' for {settings.name}{suggest(key, known)}")
    if settings.name in CONFIG_MAPPING_NAMES:
        made: PreTrainedConfig = type(config)(**settings.overrides)
    else:
        with reading(f"model.language.name={settings.name}", settings.name):
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
        from vlmvqa.hub import SAFE_WEIGHTS, loading_bar, reading

        with reading(f"model.language.name={settings.name}", settings.name), loading_bar():
            causal_lm = AutoModelForCausalLM.from_pretrained(settings.name, config=config, dtype=dtype, **SAFE_WEIGHTS)
    return LanguageModel(causal_lm, settings.attention, settings.loss)


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
    """Build a model with the architecture of `model`; the caller sets its weights."""
    return build_uninitialized(settings, deepcopy(model.language.config))


def load_processing_class(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a saved model."""
    from vlmvqa.hub import OWN_CODE, reading

    with reading(f"the tokenizer of {folder}", str(folder)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / TOKENIZER, **OWN_CODE)
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerBase, model: VLM, config: Mapping[str, Any]) -> Processor:
    """Return the processor of a saved model."""
    images = build_settings(ImageSettings, config["images"], "config.json: images")
    return Processor(tokenizer, images, model.num_image_tokens, model.attention_pattern, config["max_text_tokens"])


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
    language = dataclasses.replace(settings.language, weights="random")
    with torch.device("meta"):
        model = build(dataclasses.replace(settings, vision=random_weights(settings.vision), language=language))
    return _processor(model, settings, data, examples)


def _processor(model: VLM, settings: ModelSettings, data: DataSettings, examples: Sequence[Example]) -> Processor:
    if settings.language.tokenizer == "trained":
        tokenizer = train_tokenizer(examples, model.language.config.vocab_size)
    else:
        from vlmvqa.hub import load_tokenizer

        tokenizer = load_tokenizer(settings.language.tokenizer or settings.language.name)
    first, *others = (_image_settings(tower, data) for tower in model.vision.towers)
    images = dataclasses.replace(first, fused=tuple(others), tiles=data.tiles)
    if images.resize == "letterbox":
        from vlmvqa.extras.vision.letterbox import check

        check(model)
    return Processor(tokenizer, images, model.num_image_tokens, model.attention_pattern, data.max_text_tokens)


def _image_settings(encoder: VisionEncoder, data: DataSettings) -> ImageSettings:
    """Return the preprocessing of an encoder's input."""
    known = encoder.data_config
    mean, std = tuple(known["mean"]), tuple(known["std"])
    return ImageSettings(encoder.image_size, mean, std, known["interpolation"], data.resize, data.reduced_decoding)
