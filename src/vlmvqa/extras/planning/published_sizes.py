"""Published sizes of models, so that planning needs no network, and the rows of pretrained models.

The defaults of transformers' config classes aren't always those of the published weights: SigLIP's feed-forward layers
are 4,304 wide, PaliGemma's vocabulary has 257,216 entries. These are the configs on the hub, limited to sizes.

Legend: B rows, T tokens per row, P crops per image (the encoder's inputs), H image height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM, pretrained_config
from vlmvqa.hub import OWN_CODE
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.sequence.rows import IGNORE

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
    "head_dim": 256,
}
GEMMA2_2B = {
    "model_type": "gemma2",
    "vocab_size": 257216,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32003,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def _paligemma(size: int, text: Mapping[str, Any]) -> dict[str, Any]:
    width = text["hidden_size"]
    vision = {
        **SO400M,
        "model_type": "siglip_vision_model",
        "image_size": size,
        "projection_dim": width,
        "vision_use_head": False,
    }
    return {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "projection_dim": width,
        "hidden_size": width,
        "vision_config": vision,
        "text_config": dict(text),
    }


IDEFICS2_8B = {
    "model_type": "idefics2",
    "image_token_id": 32001,
    "vision_config": {**SO400M, "model_type": "idefics2_vision", "image_size": 980},
    "perceiver_config": {
        "model_type": "idefics2_perceiver",
        "hidden_size": 4096,
        "resampler_n_latents": 64,
        "resampler_depth": 3,
        "resampler_n_heads": 16,
        "resampler_head_dim": 96,
        "num_key_value_heads": 4,
    },
    "text_config": MISTRAL_7B,
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
SPLIT_CROPS = 5  # crops of a split image: four quarters and the full image
MULTIPLE = 8  # rows are padded to a multiple of this many tokens


def known_architecture(settings: ModelSettings) -> ModelSettings:
    """Return the settings with a language model whose sizes are known without the hub.

    Raises:
        InputError: The sizes are neither published here nor on this machine.
    """
    name = settings.language.name
    settings = replace(settings, language=replace(settings.language, loss="chunked"))  # the fused loss needs no more
    if name in DEFAULT_SIZES:
        return replace(settings, language=replace(settings.language, name=DEFAULT_SIZES[name]))
    if name not in CONFIG_MAPPING_NAMES:
        advice = (
            "set an architecture (model.language.name=llama) and its sizes (model.language.overrides.hidden_size=...)"
        )
        _local_config("model.language.name", name, advice)
    return settings


def known_config(settings: PretrainedSettings) -> PreTrainedConfig:
    """Return a pretrained model's config without using the hub.

    Raises:
        InputError: The sizes are neither published here nor on this machine, or the architecture is not supported.
    """
    name = settings.pretrained
    if name in PUBLISHED:
        values = dict(PUBLISHED[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
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


def crops_per_image(config: PreTrainedConfig, settings: PretrainedSettings) -> int:
    """Return the number of crops per image (P); Idefics2 was published with splitting on."""
    split = settings.weights == "hub" if settings.image_splitting is None else settings.image_splitting
    return SPLIT_CROPS if config.model_type == "idefics2" and split else 1


def crops_in(batch: Mapping[str, Tensor]) -> int:
    """Return the number of crops per image (P) in a batch."""
    values = batch["pixel_values"]
    return values.shape[1] if values.ndim == 5 else 1


def num_image_tokens(config: PreTrainedConfig, settings: PretrainedSettings) -> int:
    """Return the number of tokens of an image in the decoder's row."""
    if config.model_type == "idefics2":
        latents: int = config.perceiver_config.resampler_n_latents
        return crops_per_image(config, settings) * latents
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def row_tokens(config: PreTrainedConfig, settings: PretrainedSettings, text_tokens: int) -> int:
    """Return the length of a row, which is one question: tokens of image, template and text (without EOS)."""
    tokens = num_image_tokens(config, settings) + TEMPLATE_TOKENS[config.model_type] + text_tokens - 1
    return -(-tokens // MULTIPLE) * MULTIPLE


def dummy_batch(
    model: PretrainedVLM, settings: PretrainedSettings, rows: int, tokens: int, supervised: int
) -> dict[str, Tensor]:
    """Return a dummy batch of the planned size with the columns of `PretrainedProcessor.collate`.

    Images have the maximal size: `[B, 3, H, H]`, for Idefics2 `[B, P, 3, H, H]` with a mask.
    """
    config: Any = model.net.config
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    ids[:, : num_image_tokens(config, settings)] = config.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, -supervised:] = 0
    not_padding = torch.ones_like(ids)
    not_padding[:, 0] = 0
    columns = {"input_ids": ids, "labels": labels, "attention_mask": not_padding}
    side, crops = config.vision_config.image_size, crops_per_image(config, settings)
    if config.model_type == "paligemma":
        answers = (labels != IGNORE).long()
        return {**columns, "pixel_values": torch.ones(rows, 3, side, side), "token_type_ids": answers}
    mask = torch.ones(rows, crops, side, side, dtype=torch.int64)
    mask[..., -1] = 0  # most images aren't square, and without padding the attention mask would be skipped
    return {**columns, "pixel_values": torch.ones(rows, crops, 3, side, side), "pixel_attention_mask": mask}
