"""The models that are measured, of random weights, and what goes into them.

Legend: B rows, T tokens, I images, N image tokens, Dv the encoder's width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.shapes import Shape
from vlmvqa.models.build import build
from vlmvqa.models.flops import COUNTED, count
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.sequence.rows import Batch, Document, build_row, pad_rows

MODELS = ("tiny", "mid", "real")
# Pixels a patch: small images have as many patches as the real ones, but for "tiny", which has 4 x 4 of them.
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
    name: str, shape: Shape, device: torch.device | str = "cpu", seed: int = 0, attention_pattern: str = "causal"
) -> VLM:
    """A `VLM` of random weights in training mode; every part trains.

    `mid` is for a few CPU cores: 64 million parameters, of which the output matrix takes 26 % (Gemma 2 2B's: 22 %) and
    the vision encoder, whose cost sharing divides too, 34 % (DINOv2-B beside it: 3 %). `real` is DINOv2-B/14 and
    Gemma 2 2B in bfloat16. All have Gemma 2's two softcaps.

    Args:
        attention_pattern: the attention attention_pattern; "causal" is what transformers' Gemma 2 does by itself.
    """
    torch.manual_seed(seed)
    settings = ModelSettings(
        vision=VisionSettings(
            image_size=shape.image_size,
            weights="random",
            overrides={"class_token": shape.class_token, **_VISION[name]},
        ),
        language=LanguageSettings(name="gemma2", weights="random", overrides=_LANGUAGE[name]),
        attention_pattern=attention_pattern,
        dtype=str(dtype_of(name)).removeprefix("torch."),
    )
    with torch.device(device):  # drawing 2.6 billion numbers on a CPU takes minutes
        return build(settings).to(device).train()


def dtype_of(name: str) -> torch.dtype:
    """In which a model computes."""
    return torch.bfloat16 if name == "real" else torch.float32


def causal_lm(model: VLM) -> PreTrainedModel:
    """transformers' own causal language model, with its eager attention, on the very weights of `model`."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model.language.config)
    # Modules of its own, which compute as transformers does; the weights, known already, are not copied.
    decoder = copy.deepcopy(model.language.decoder, {id(weight): weight for weight in model.parameters()})
    whole.model, whole.config = decoder, decoder.config
    whole.lm_head.weight = decoder.get_input_embeddings().weight
    whole.set_attn_implementation("eager")
    return whole.train(model.training)


def trained_bytes(model: nn.Module) -> int:
    """What a forward and backward pass moves at least: weights that train are read twice, their gradient is written."""
    return 3 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


def draw_pixels(model: VLM, images: int, seed: int = 0) -> Tensor:
    """`float[I, 3, H, W]` on the model's device and in its type."""
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
    """Rows of documents as the model's batch, on the pixels' device.

    Every document brings its image: one that is in two documents is in the batch twice, and encoded twice.

    Args:
        pixels: float[I, 3, H, W], indexed by `Document.image`.
        multiple: T is rounded up to it.
        features: float[I, N, Dv], the encoder's output, if it is known.
    """
    images = torch.tensor([document.image for row in rows for document in row], device=pixels.device)
    firsts = accumulate(map(len, rows), initial=0)  # index of each row's first image
    built = [
        build_row(row, model.vision.num_image_tokens, model.attention_pattern, first)
        for row, first in zip(rows, firsts, strict=False)
    ]
    columns = pad_rows(built, multiple)
    known = {"pixel_values": pixels[images]} if features is None else {"image_features": features[images]}
    return {**known, **{name: column.to(pixels.device) for name, column in columns.items()}}


def needed_flops(model: VLM, batch: Batch) -> int:
    """Floating-point operations that training on a batch needs, forward and backward (`vlmvqa/models/flops.py`).

    What is frozen now counts as frozen; of images whose features are in the batch, the encoder takes none.
    """
    flops = model.flops()
    assert flops is not None  # Gemma 2 has no experts
    counts = count(batch, model.attention_pattern, model.language.config.sliding_window).tolist()
    encoded = "pixel_values" in batch
    images = len(batch["pixel_values" if encoded else "image_features"])
    return flops.of({**dict(zip(COUNTED, counts, strict=True)), "images": images, "encoded": images * encoded})
