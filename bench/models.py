"""The measured models, with random weights, and their batches.

Legend: B rows, T tokens, I images, N image tokens, Dv the encoder's width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from bench.shapes import Shape
from vlmvqa.models.flops import COUNTED, count
from vlmvqa.models.interface import cast_parameters
from vlmvqa.models.language import LanguageModel, LanguageSettings
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.sequence.rows import Batch, Document, build_row, pad_rows

MODELS = ("tiny", "mid", "real")
# Patch sizes: "mid" has as many patches as "real"; "tiny" has 4 x 4.
_VISION: dict[str, dict[str, Any]] = {
    "tiny": {"patch_size": 56, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "mid": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "real": {},  # DINOv2-B/14
}
_LANGUAGE: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "initializer_range": 0.2,  # scores and logits reach the softcaps: dropping one changes the loss
    },
    "mid": {
        "vocab_size": 32_768,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
    },
    "real": {},  # Gemma 2 2B is the config class's default
}


def build_model(
    name: str,
    shape: Shape,
    device: torch.device | str = "cpu",
    seed: int = 0,
    attention_pattern: str = "causal",
    dtype: torch.dtype | None = None,
    vision: Mapping[str, Any] | None = None,
    language: Mapping[str, Any] | None = None,
) -> VLM:
    """Return a `VLM` with random weights in training mode; every part trains.

    `mid` is for a few CPU cores: 64 million parameters, of which the output matrix takes 26 % (Gemma 2 2B's: 22 %) and
    the vision encoder, whose cost is also shared, 34 % (DINOv2-B with Gemma 2 2B: 3 %). `real` is DINOv2-B/14 and
    Gemma 2 2B in bfloat16. All have Gemma 2's two softcaps.

    It equals `models/build.py`'s model, without the config and data modules that are imported there.

    Args:
        attention_pattern: the attention pattern; "causal" equals that of transformers' Gemma 2.
        dtype: of the weights (default: `dtype_of(name)`).
        vision: constructor arguments of timm's encoder, in addition to those of `name`.
        language: fields of the decoder's config, likewise.
    """
    torch.manual_seed(seed)
    dtype = dtype or dtype_of(name)
    arguments = {"class_token": shape.class_token, **_VISION[name], **(vision or {})}
    config = Gemma2Config(**{**_LANGUAGE[name], **(language or {})})
    with torch.device(device):  # initialising 2.6 billion parameters on a CPU takes minutes
        encoder = timm.create_model(
            VisionSettings.name, num_classes=0, global_pool="", img_size=shape.image_size, **arguments
        )
        nn.init.normal_(encoder.pos_embed)
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tower = VisionEncoder(encoder, shape.image_size)
        projector = Projector(tower.features, config.hidden_size)
    vlm = VLM(tower, projector, LanguageModel(causal_lm), attention_pattern)
    return cast_parameters(vlm, dtype).to(device).train()


def model_settings(name: str, shape: Shape, attention_pattern: str = "causal") -> ModelSettings:
    """Return the settings with which `models/build.py` builds the same model, with float32 weights."""
    overrides = {"class_token": shape.class_token, **_VISION[name]}
    vision = VisionSettings(image_size=shape.image_size, weights="random", overrides=overrides)
    language = LanguageSettings(name="gemma2", weights="random", overrides=_LANGUAGE[name])
    return ModelSettings(vision, language=language, attention_pattern=attention_pattern)


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype in which a model computes."""
    return torch.bfloat16 if name == "real" else torch.float32


def causal_lm(model: VLM) -> PreTrainedModel:
    """Return transformers' causal language model with eager attention, sharing the weights of `model`."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(model.language.config)
    # Copy the modules, which then use transformers' attention; the memo keeps the weights shared.
    decoder = copy.deepcopy(model.language.decoder, {id(weight): weight for weight in model.parameters()})
    causal.model, causal.config = decoder, decoder.config
    causal.lm_head.weight = decoder.get_input_embeddings().weight
    causal.set_attn_implementation("eager")
    return causal.train(model.training)


def trained_bytes(model: nn.Module) -> int:
    """Return the least bytes of a forward and backward pass: trained weights are read twice, gradients written."""
    return 3 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


def random_pixels(model: VLM, images: int, seed: int = 0) -> Tensor:
    """Return random images `float[I, 3, H, W]` on the model's device and in its dtype."""
    parameter = next(model.parameters())
    size = model.vision.image_size
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return pixels.to(parameter)


def vocabulary(model: VLM) -> int:
    return int(model.language.config.vocab_size)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def make_batch(
    model: VLM,
    rows: Sequence[Sequence[Document]],
    pixels: Tensor,
    multiple: int = 1,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return rows of documents as a batch for the model, on the pixels' device.

    Every document has its own image: an image of two documents is in the batch twice and is encoded twice.

    Args:
        pixels: float[I, 3, H, W], indexed by `Document.images`.
        multiple: T is rounded up to a multiple of this.
        features: float[I, N, Dv], the encoder's output, if it is cached.
    """
    images = torch.tensor([one for row in rows for document in row for one in document.images], device=pixels.device)
    firsts = accumulate(map(len, rows), initial=0)  # index of each row's first image
    built = [
        build_row(row, model.num_image_tokens, model.attention_pattern, first)
        for row, first in zip(rows, firsts, strict=False)
    ]
    columns = pad_rows(built, multiple)
    known = {"pixel_values": pixels[images]} if features is None else {"image_features": features[images]}
    return {**known, **{name: column.to(pixels.device) for name, column in columns.items()}}


def needed_flops(model: VLM, batch: Batch) -> int:
    """Return the FLOPs of training on a batch, forward and backward (`vlmvqa/models/flops.py`).

    Currently frozen parameters count as frozen; the encoder needs none for images whose features are in the batch.
    """
    flops = model.flops()
    assert flops is not None  # Gemma 2 has no experts
    counts = count(batch, model.language.config.sliding_window).tolist()
    encoded = "pixel_values" in batch
    images = len(batch["pixel_values" if encoded else "image_features"])
    return flops.of({**dict(zip(COUNTED, counts, strict=True)), "images": images, "encoded": images * encoded})
