"""transformers' processors of pretrained models: published ones, and new ones for random weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoProcessor,
    Idefics2ImageProcessor,
    Idefics2Processor,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipImageProcessor,
)

from vlmvqa.errors import InputError
from vlmvqa.hub import OWN_CODE, hub_or_cache, unread

ADDED_TOKENS = 1160  # most tokens that a processor adds: PaliGemma's locations and segments


def load_processor(name: str, image_splitting: bool | None = None) -> ProcessorMixin:
    """Load the processor of a hub id or local folder.

    Raises:
        InputError: it cannot be read, or does not support `image_splitting`.
    """
    try:
        with hub_or_cache(name):
            library: ProcessorMixin = AutoProcessor.from_pretrained(name, **OWN_CODE)
    except (OSError, ValueError, ImportError) as error:
        raise unread(f"the processor of {name}", error) from error
    if not hasattr(library, "image_processor") or not hasattr(library, "tokenizer"):
        raise InputError(f"{name} has no processor for images and text; name a vision-language model")
    _set_splitting(library, image_splitting)
    return library


def _set_splitting(library: ProcessorMixin, image_splitting: bool | None) -> None:
    if image_splitting is None:
        return
    if not hasattr(library.image_processor, "do_image_splitting"):
        raise InputError(
            f"model.image_splitting={image_splitting}: {type(library).__name__} does not split images; leave it out"
        )
    library.image_processor.do_image_splitting = image_splitting


# Chat templates for random weights: those that are published with the trained ones.
TEMPLATES = {
    "idefics2": "{% for turn in messages %}{{ turn.role.capitalize() }}:{% if turn.content[0].type != 'image' %} "
    "{% endif %}{% for part in turn.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
}


def random_processor(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, image_splitting: bool | None = None
) -> tuple[ProcessorMixin, PreTrainedConfig]:
    """Return a processor for an architecture with random weights, and the config with the added tokens.

    Args:
        tokenizer: a tokenizer without the processor's tokens.

    Raises:
        InputError: an unsupported architecture, or a vocabulary that is too small.
    """
    vision = config.vision_config
    if config.model_type == "paligemma":
        patches = (vision.image_size // vision.patch_size) ** 2
        side = {"height": vision.image_size, "width": vision.image_size}
        images: Any = SiglipImageProcessor(size=side, image_seq_length=patches)
        library: Any = PaliGemmaProcessor(images, tokenizer)
    elif config.model_type == "idefics2":
        images = Idefics2ImageProcessor(size={"longest_edge": vision.image_size, "shortest_edge": vision.image_size})
        images.do_image_splitting = False
        latents = config.perceiver_config.resampler_n_latents
        library = Idefics2Processor(images, tokenizer, image_seq_len=latents, chat_template=TEMPLATES["idefics2"])
    else:
        raise InputError(
            f"model.pretrained={config.model_type}: no processor is made here for random weights of it; use "
            "paligemma or idefics2, or name trained weights"
        )
    _set_splitting(library, image_splitting)
    text = config.get_text_config()
    if len(tokenizer) > text.vocab_size:
        raise InputError(
            f"model.overrides.text_config.vocab_size={text.vocab_size} is less than the {len(tokenizer)} tokens that "
            "the tokenizer has with the processor's own; raise it"
        )
    config.image_token_id = library.image_token_id
    for known in (config, text):
        known.pad_token_id, known.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        known.eos_token_id = tokenizer.eos_token_id
    return library, config
