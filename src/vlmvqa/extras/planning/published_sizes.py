"""Pretrained models in a plan: their published sizes, so that it needs no network, and their rows.

The defaults of transformers' config classes are not always those of the weights: SigLIP's feed-forward layers are 4,304
wide and PaliGemma's vocabulary has 257,216 entries. These are the configs on the hub, as far as sizes depend on them.

Legend: B rows, T tokens a row, P pictures that the encoder sees of an image, H pixels of a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM, pretrained_config
from vlmvqa.hub import OWN_CODE
from vlmvqa.sequence.rows import IGNORE

SO400M = {  # SigLIP's shape-optimised ViT at patch 14
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
# Beside a question's words: PaliGemma's BOS and newline; Idefics2's turns, and what stands around its images.
TEMPLATE_TOKENS = {"paligemma": 2, "idefics2": 16}
PIECES = 5  # of a split image: four crops and the whole
MULTIPLE = 8  # rows are padded to a multiple of so many tokens


def known_config(settings: PretrainedSettings) -> PreTrainedConfig:
    """A pretrained model's config, without the hub.

    Raises:
        InputError: it is neither known nor on this machine, or how it lays out images is not known here.
    """
    name = settings.pretrained
    if name in PUBLISHED:
        values = dict(PUBLISHED[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if settings.weights == "random":
        config = pretrained_config(settings)
    else:
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True, **OWN_CODE)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the sizes of model.pretrained={name} are not on this machine, and a plan uses no network; name a "
                f"folder, or one of {', '.join(PUBLISHED)}"
            ) from error
    if config.model_type not in TEMPLATE_TOKENS:
        raise InputError(
            f"how many tokens an image has in {name} ({config.model_type}) is not known to the planner; plan one of "
            f"{', '.join(TEMPLATE_TOKENS)}"
        )
    return config


def pieces(config: PreTrainedConfig, settings: PretrainedSettings) -> int:
    """Pictures that the encoder sees of an image; Idefics2 was published with splitting on."""
    split = settings.weights == "hub" if settings.image_splitting is None else settings.image_splitting
    return PIECES if config.model_type == "idefics2" and split else 1


def pictures(batch: Mapping[str, Tensor]) -> int:
    """P, of a batch."""
    values = batch["pixel_values"]
    return values.shape[1] if values.ndim == 5 else 1


def image_tokens(config: PreTrainedConfig, settings: PretrainedSettings) -> int:
    """Tokens of an image in the decoder's row."""
    if config.model_type == "idefics2":
        latents: int = config.perceiver_config.resampler_n_latents
        return pieces(config, settings) * latents
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def row_tokens(config: PreTrainedConfig, settings: PretrainedSettings, text_tokens: int) -> int:
    """Tokens of a row, which is one question: the image's, the template's, and those of the text but for EOS."""
    tokens = image_tokens(config, settings) + TEMPLATE_TOKENS[config.model_type] + text_tokens - 1
    return -(-tokens // MULTIPLE) * MULTIPLE


def batch(
    model: PretrainedVLM, settings: PretrainedSettings, rows: int, tokens: int, supervised: int
) -> dict[str, Tensor]:
    """A batch of the planned size, as `PretrainedProcessor.collate` makes it; what it says is nothing.

    Its pictures are as large as they can be: `[B, 3, H, H]`, under Idefics2 `[B, P, 3, H, H]`, and a mask of them.
    """
    config: Any = model.net.config
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    ids[:, : image_tokens(config, settings)] = config.image_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[:, -supervised:] = 0
    real = torch.ones_like(ids)
    real[:, 0] = 0
    made = {"input_ids": ids, "labels": labels, "attention_mask": real}
    side, seen = config.vision_config.image_size, pieces(config, settings)
    if config.model_type == "paligemma":
        return {**made, "pixel_values": torch.ones(rows, 3, side, side), "token_type_ids": (labels != IGNORE).long()}
    mask = torch.ones(rows, seen, side, side, dtype=torch.int64)
    mask[..., -1] = 0  # most pictures are not square: without padding the attention mask would be left out
    return {**made, "pixel_values": torch.ones(rows, seen, 3, side, side), "pixel_attention_mask": mask}
