"""Tiny pretrained models of the real classes, saved by transformers itself and read by `from_pretrained`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor

from vlmvqa.data.example import Example, Question
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.extras.pretrained.build import build_pretrained, pretrained_config
from vlmvqa.extras.pretrained.hf_processor import ADDED_TOKENS, load_processor, random_processor
from vlmvqa.extras.pretrained.model import PretrainedSettings, PretrainedVLM
from vlmvqa.extras.pretrained.processor import PretrainedProcessor

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
WORDS = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size": 400 + ADDED_TOKENS}
# Weights ten times the usual, so that scores reach the softcaps and masks matter.
WORDS |= {"initializer_range": 0.2}
VISION = {**SIZES, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}
OVERRIDES: dict[str, dict[str, Any]] = {
    "paligemma": {
        "projection_dim": 64,
        "vision_config": {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        "text_config": {"model_type": "gemma", **WORDS, "head_dim": 16},
    },
    "idefics2": {
        "vision_config": {"model_type": "idefics2_vision", **VISION},
        "perceiver_config": {
            "model_type": "idefics2_perceiver",
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        "text_config": {"model_type": "mistral", **WORDS, "head_dim": 16},
    },
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 64},
        "text_config": {"model_type": "llama", **WORDS},
        "image_seq_length": 16,
    },
}
# PaliGemma 2: a window shorter than a row, so that local layers differ from global ones.
GEMMA2 = {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}
OVERRIDES["paligemma2"] = {**OVERRIDES["paligemma"], "text_config": {**WORDS, **GEMMA2, "attn_logit_softcapping": 5.0}}
FAMILIES = ("paligemma", "paligemma2", "idefics2", "idefics2-split", "llava")
LLAVAS = (
    "<bos>{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}"
    "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}"
    "{{ '<eos>' if turn.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

ASKED = (
    ("what colour is it?", "red", ("red",)),
    ("how many are there in this very small picture of a thing?", "two", ("two",)),
    ("is it a dog?", "no, it is not", ("no",)),
)


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Noise: another picture for each number, and not of the model's size."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def examples(count: int = 4) -> list[Example]:
    """Pictures of different sizes with one to three questions each."""
    found = []
    for number in range(count):
        asked = [
            Question(10 * number + place, text, f"answer en {text}\n", target, answers)
            for place, (text, target, answers) in enumerate(ASKED[: 1 + number % 3])
        ]
        found.append(Example(picture(number, (40 + 9 * number, 30)), number, tuple(asked)))
    return found


def apart(given: Sequence[Example]) -> list[Example]:
    """A question each."""
    return [one.with_questions(place, place + 1) for one in given for place in range(len(one.questions))]


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """A random model with its processor, as they are published."""
    torch.manual_seed(seed)
    kind, _, split = family.partition("-")
    architecture = "paligemma" if kind == "paligemma2" else kind
    settings = PretrainedSettings(architecture, "random", OVERRIDES[kind], image_splitting=bool(split) or None)
    config = pretrained_config(settings)
    tokenizer = train_tokenizer(examples(), 400)
    library: Any
    if kind == "llava":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)  # added to every text, as Llama's is
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
        side = {"height": 28, "width": 28}
        images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side)
        library = LlavaProcessor(
            images,
            tokenizer,
            patch_size=7,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=LLAVAS,
        )
        config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    else:
        library, config = random_processor(config, tokenizer, settings.image_splitting)
    net = AutoModelForImageTextToText.from_config(config)
    net.save_pretrained(folder)
    library.save_pretrained(folder)
    return folder


def load(folder: Path, max_text_tokens: int | None = None) -> tuple[PretrainedVLM, PretrainedProcessor]:
    """The model of a folder and its processor."""
    settings = PretrainedSettings(str(folder))
    model = build_pretrained(settings, pretrained_config(settings)).eval()
    return model, PretrainedProcessor.of(load_processor(str(folder)), model.attention_pattern, max_text_tokens)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains of a model with adapters, which is what a run saves."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_by_peft(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the base with the adapters merged in by peft, in place."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    return {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
