"""A `VLM` as transformers' PaliGemma: vision encoder, one linear projector, Gemma or Gemma 2, prefix_lm attention.

PaliGemma accepts `Dinov2Model` as its vision encoder with any number of image tokens and applies Gemma 2's final
softcap (transformers 5.23), so the exported model computes the same function. LLaVA, whose head applies no softcap,
could not. PaliGemma's processor writes `<image>` tokens, BOS, the prompt and a newline.

Legend: I images, H image height and width, N image tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from vlmvqa.data.images import INTERPOLATIONS
from vlmvqa.errors import InputError
from vlmvqa.models.interface import DTYPES
from vlmvqa.models.trained_model import TrainedModel
from vlmvqa.models.vision import VisionEncoder
from vlmvqa.models.vlm import VLM, ModelSettings

REGISTERED = "load it with `import vlmvqa.hf` instead (docs/ecosystem.md)"
# Names of timm's parameters in transformers, applied one after the other; `qkv` is then split into three.
DINOV2 = {
    r"^cls_token": "embeddings.cls_token",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^blocks": "encoder.layer",
    r"^norm": "layernorm",
    r"attn\.proj": "attention.o_proj",
    r"attn\.qkv": "attention.qkv_proj",
    r"ls(\d)\.gamma": r"layer_scale\1.lambda1",
}
SIGLIP = {
    r"^pos_embed": "embeddings.position_embedding.weight",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^blocks": "encoder.layers",
    r"^norm": "post_layernorm",
    r"\.norm(\d)": r".layer_norm\1",
    r"attn\.proj": "self_attn.out_proj",
    r"attn\.qkv": "self_attn.qkv_proj",
}


def refuse(trained: TrainedModel) -> None:
    """Raise InputError if PaliGemma's classes cannot compute what the model and its processor compute."""
    model, settings = trained.model, trained.settings
    if not isinstance(model, VLM) or not isinstance(settings, ModelSettings):
        raise InputError("the model is one of transformers already; load its folder with transformers as it is")
    language, text, images = model.language, trained.processor.tokenizer, trained.processor.images
    template = trained.prompt.endswith("\n") and trained.prompt.count("{question}") == 1
    encoder = _encoder_problem(model.vision)
    checks = {
        f"model.attention_pattern={model.attention_pattern} is not its pattern, prefix_lm": (
            model.attention_pattern == "prefix_lm"
        ),
        f"its encoder {encoder}": encoder is None,
        f"model.projector.kind={settings.projector.kind} is not linear": settings.projector.kind == "linear",
        f"its language model, {language.config.model_type}, is not Gemma or Gemma 2": (
            language.config.model_type in ("gemma", "gemma2")
        ),
        "its output head has weights of its own": language.head is None,
        f"data.prompt={trained.prompt!r} does not end with a newline, which the processor appends": template,
        "its tokenizer has no BOS, which the processor writes": text.bos_token is not None,
        f"data.resize={images.resize} is not squash": images.resize == "squash",
        "data.tiles is set": images.tiles is None,
        "an image has more tokens than its sliding window": trained.processor.num_image_tokens < _window(model),
    }
    for reason, fits in checks.items():
        if not fits:
            raise InputError(f"the model cannot be exported as PaliGemma: {reason}; {REGISTERED}")


def notes(trained: TrainedModel) -> list[str]:
    """Return in which cases the exported model and its processor differ from the trained ones, one sentence each."""
    found, known = [], trained.processor
    if known.max_text_tokens is not None:
        found.append(f"A question of more than {known.max_text_tokens} tokens is truncated by vlmvqa only.")
    if known.num_image_tokens + (known.max_text_tokens or 0) + trained.decoding.max_new_tokens > _window(trained.model):
        found.append(
            f"Where image and text have more than {_window(trained.model)} tokens, PaliGemma lets image and question "
            "see each other beyond the sliding window of its local layers, vlmvqa does not."
        )
    if known.images.reduced:
        found.append("It was trained with data.reduced_decoding=true; transformers decodes JPEGs at full size.")
    return found


def _window(model: Any) -> float:
    """Return the sliding window of the local layers in tokens; infinity without one."""
    return getattr(model.language.config, "sliding_window", None) or math.inf


def _encoder_problem(vision: VisionEncoder) -> str | None:
    """Return why neither `Dinov2Model` nor `SiglipVisionModel` computes what the encoder does; None if one does."""
    encoder = vision.encoder
    if type(encoder) is not VisionTransformer:
        return f"is a {type(encoder).__name__}, not timm's VisionTransformer"
    if type(vision) is not VisionEncoder or vision.num_class_tokens != int(encoder.has_class_token):
        return "returns other features than those of the last layer with its class token"
    block = encoder.blocks[0]
    scaled = isinstance(block.ls1, LayerScale)
    if encoder.num_prefix_tokens > int(encoder.has_class_token):
        return "has register tokens, which would reach the language model"
    if encoder.has_class_token and encoder.pos_embed.shape[1] != encoder.patch_embed.num_patches + 1:
        return "has no position embedding for its class token"
    if scaled and not encoder.has_class_token:
        return "has layer scales but no class token"
    odd = (encoder.norm_pre, block.attn.q_norm, block.attn.norm, block.mlp.norm)
    if not all(isinstance(module, nn.Identity) for module in odd) or not isinstance(block.mlp.act, nn.GELU):
        return "has other norms or activations than DINOv2 and SigLIP"
    return None


def config(trained: TrainedModel) -> PaliGemmaConfig:
    """Return the config of the exported model, without the image token (see `processor`)."""
    model: Any = trained.model
    text = model.language.config.to_dict()
    return PaliGemmaConfig(
        vision_config=_vision_config(model.vision.encoder, model.vision.image_size),
        text_config=text,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        vocab_size=text["vocab_size"],
        tie_word_embeddings=True,
    )


def _vision_config(encoder: Any, image_size: int) -> PreTrainedConfig:
    block = encoder.blocks[0]
    width, inner = encoder.embed_dim, block.mlp.fc1.out_features
    shared = {
        "hidden_size": width,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": image_size,
        "patch_size": encoder.patch_embed.patch_size[0],
        "hidden_act": "gelu_pytorch_tanh" if block.mlp.act.approximate == "tanh" else "gelu",
        "layer_norm_eps": encoder.norm.eps,
    }
    if encoder.has_class_token:
        return Dinov2Config(**shared, mlp_ratio=inner // width, use_mask_token=False)
    return SiglipVisionConfig(**shared, intermediate_size=inner, vision_use_head=False)


def weights(model: VLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by their names in PaliGemma."""
    encoder: Any = model.vision.encoder
    for name, weight in encoder.state_dict().items():
        yield from _encoder_weight(name, weight, encoder.has_class_token)
    if encoder.has_class_token and not isinstance(encoder.blocks[0].ls1, LayerScale):
        for number in range(len(encoder.blocks)):  # Dinov2Model always has layer scales
            for scale in (1, 2):
                yield (
                    f"model.vision_tower.encoder.layer.{number}.layer_scale{scale}.lambda1",
                    torch.ones_like(encoder.norm.weight),
                )
    for name, weight in model.projector.layers[0].state_dict().items():
        yield f"model.multi_modal_projector.linear.{name}", weight
    for name, weight in model.language.decoder.state_dict().items():
        yield f"model.language_model.{name}", weight


def _encoder_weight(name: str, weight: Tensor, is_dinov2: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield a weight of timm's encoder by its names in `Dinov2Model` or `SiglipVisionModel`."""
    if name == "pos_embed" and not is_dinov2:
        weight = weight[0]
    for old, new in (DINOV2 if is_dinov2 else SIGLIP).items():
        name = re.sub(old, new, name)
    thirds = weight.chunk(3) if "qkv_proj" in name else [weight]
    for letter, part in zip("qkv", thirds, strict=False):
        yield f"model.vision_tower.{name.replace('qkv_proj', f'{letter}_proj')}", part


def processor(trained: TrainedModel) -> PaliGemmaProcessor:
    """Return the exported processor.

    Its chat template writes the model's prompt template around the question of a user's turn.
    """
    images = trained.processor.images
    pixels = SiglipImageProcessorPil(
        size={"height": images.size, "width": images.size},
        resample=int(INTERPOLATIONS[images.interpolation]),
        image_mean=list(images.mean),
        image_std=list(images.std),
        image_seq_length=trained.processor.num_image_tokens,
    )
    before, after = (json.dumps(text) for text in trained.prompt.removesuffix("\n").split("{question}"))
    template = (
        "{% for part in messages[-1].content %}{% if part.type == 'image' %}<image>{% endif %}{% endfor %}"
        f"{{{{ {before} }}}}"
        "{% for part in messages[-1].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
        f"{{{{ {after} }}}}"
    )
    tokenizer = deepcopy(trained.processor.tokenizer)  # the processor adds tokens to it
    # Generation continues all rows of a batch at the same position. save_pretrained writes `init_kwargs` only.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return PaliGemmaProcessor(pixels, tokenizer, chat_template=template)


def convert(trained: TrainedModel) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    """Return the model, which shares the trained weights, and its processor.

    Raises:
        InputError: PaliGemma's classes cannot compute the same.
    """
    refuse(trained)
    library, known = processor(trained), config(trained)
    tokenizer = library.tokenizer
    known.image_token_id = library.image_token_id
    for one in (known, known.text_config):
        one.pad_token_id, one.bos_token_id, one.eos_token_id = (
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(known)
    found = model.load_state_dict(dict(weights(cast(VLM, trained.model))), assign=True, strict=False)
    model.tie_weights()
    wrong = [*found.unexpected_keys, *(name for name, weight in model.named_parameters() if weight.is_meta)]
    if wrong:
        raise InputError(f"the model cannot be exported as PaliGemma: {wrong[0]} has no counterpart; {REGISTERED}")
    model.config.dtype = DTYPES[trained.settings.dtype]
    decoding = trained.decoding
    model.generation_config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty if decoding.num_beams > 1 else None,
        do_sample=decoding.temperature > 0,
        temperature=decoding.temperature or None,
        eos_token_id=sorted(trained.processor.end_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return model, library
