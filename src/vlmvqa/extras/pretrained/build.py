"""A pretrained model with its processor, as a config describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from vlmvqa import fingerprint
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import prompts
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.hf_processor import ADDED_TOKENS, load_processor, random_processor
from vlmvqa.extras.pretrained.model import PretrainedSettings, build_pretrained, mode_of, pretrained_config
from vlmvqa.extras.pretrained.processor import PretrainedProcessor
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models import model_folder
from vlmvqa.models.generation import Decoding


def build_predictor(
    settings: PretrainedSettings, data: DataSettings, decoding: Decoding, train_examples: Sequence[Example]
) -> Predictor:
    """Build a pretrained model with its processor."""
    processor, known = pretrained_processor(settings, data, train_examples)
    started_from = None
    if settings.weights == "hub":
        folder = model_folder.find(settings.pretrained)
        started_from = {"model": _absolute(settings.pretrained), "weights": fingerprint.weights_in(folder)}
        model = build_pretrained(replace(settings, pretrained=str(folder)), known)
    else:
        model = build_pretrained(settings, known)
    return Predictor(model, processor, data.prompt, settings, decoding, prompts(data.tasks.values()), started_from)


def pretrained_processor(
    settings: PretrainedSettings, data: DataSettings, train_examples: Sequence[Example]
) -> tuple[PretrainedProcessor, PreTrainedConfig]:
    """Return the processor of a pretrained model and the config of its network; no weights are loaded."""
    if data.resize != "squash" or data.reduced_decoding:
        raise InputError(
            f"{settings.pretrained} resizes images as it was trained; leave data.resize and data.reduced_decoding out"
        )
    known = pretrained_config(settings)
    if settings.weights == "random":
        if settings.tokenizer != "trained":
            raise InputError("model.weights=random needs model.tokenizer=trained, which is made of the questions")
        text = train_tokenizer(train_examples, known.get_text_config().vocab_size - ADDED_TOKENS)
        library, known = random_processor(known, text, settings.image_splitting)
    else:
        library = load_processor(settings.pretrained, settings.image_splitting)
    return PretrainedProcessor.of(library, mode_of(known), data.max_text_tokens), known


def _absolute(pretrained: str) -> str:
    """Return a local folder as an absolute path, and a hub id as it is."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.exists() else pretrained
