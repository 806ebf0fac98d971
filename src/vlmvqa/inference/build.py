"""The model of a config: built, pretrained or saved before, with its tokenizer, processor and adapters."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict
from transformers import PreTrainedConfig

from vlmvqa import fingerprint, ranks
from vlmvqa.cli import given_keys, group
from vlmvqa.data.example import Example
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tasks import DataSettings, prompts
from vlmvqa.data.tokenizer import load_tokenizer, train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.pretrained.hf_processor import ADDED_TOKENS, load_processor, random_processor
from vlmvqa.extras.pretrained.model import PretrainedSettings, build_pretrained, mode_of, pretrained_config
from vlmvqa.extras.pretrained.processor import PretrainedProcessor
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.models import model_folder
from vlmvqa.models.checkpoint import Adapter, read_settings
from vlmvqa.models.generation import Decoding
from vlmvqa.models.vlm import DTYPES, PARTS, ModelSettings, build, cast_parameters
from vlmvqa.settings import build_settings


def take_saved_model(config: DictConfig) -> None:
    """Under `init_from`, take the settings that the model was saved with.

    Raises:
        InputError: there is no such model, or the command chooses another or sets a key of it other than model.dtype.
    """
    if config.init_from is None:
        return
    for key in given_keys():
        if key == "model":
            raise InputError(
                "model= cannot be set together with init_from=, whose model is as it was saved; leave it out, or "
                "choose the trainer's settings of a model with trainer=<its name>"
            )
        if key.startswith("model.") and key != "model.dtype":
            raise InputError(f"{key} cannot be set here: the model of init_from is as it was saved; leave it out")
    folder = model_folder.find(config.init_from).resolve()
    _, settings = read_settings(folder)
    known = asdict(settings)
    if isinstance(settings, ModelSettings):
        known["language"]["tokenizer"] = str(folder / model_folder.TOKENIZER)
    if config.get("adapt") is not None or "model.dtype" in given_keys():  # frozen weights may be kept in fewer bytes
        known["dtype"] = config.model.dtype
    if known["dtype"] not in DTYPES:
        raise InputError(f"model.dtype={known['dtype']} is unknown; use one of {', '.join(DTYPES)}")
    with open_dict(config):  # what trains, for the record and for all who ask the config
        config.model = known
        if Path(config.init_from).exists():  # a hub id stays one: what is made of it can be loaded elsewhere
            config.init_from = str(folder)


def build_predictor(
    config: DictConfig, data: DataSettings, train_examples: Sequence[Example], base: Path | None = None
) -> Predictor:
    """The model with its tokenizer, image settings and prompt; the saved one under `init_from`.

    Args:
        base: a folder that it was saved in before it got adapters, when the run began.
    """
    decoding = build_settings(Decoding, group(config, "decoding"), "decoding")
    if base is not None:
        return replace(load(base, "cpu"), settings=model_settings(config)[0])
    if config.get("init_from") is not None:
        folder = model_folder.find(config.init_from)
        found = load(folder, "cpu")
        processor = replace(found.processor, max_text_tokens=data.max_text_tokens)
        if not isinstance(found.settings, PretrainedSettings):
            images = replace(processor.images, resize=data.resize, reduced=data.reduced_decoding)
            processor = replace(processor, images=images)
        return replace(
            found,
            model=cast_parameters(found.model, DTYPES[config.model.dtype]),
            settings=replace(found.settings, dtype=config.model.dtype),
            processor=processor,
            prompt=data.prompt,
            prompts={**found.prompts, **prompts(data.tasks.values())},
            decoding=decoding,
            started_from={"model": config.init_from, "weights": fingerprint.weights_in(folder)},
        )
    settings, tokenizer_name = model_settings(config)
    if isinstance(settings, PretrainedSettings):
        return _pretrained(settings, tokenizer_name, data, decoding, train_examples)
    model = build(settings)
    if tokenizer_name == "trained":
        tokenizer = train_tokenizer(train_examples, model.language.config.vocab_size)
    else:
        tokenizer = load_tokenizer(tokenizer_name or settings.language.name)
    known = model.vision.data_config
    images = ImageSettings(
        settings.vision.image_size,
        tuple(known["mean"]),
        tuple(known["std"]),
        known["interpolation"],
        data.resize,
        data.reduced_decoding,
    )
    processor = Processor(tokenizer, images, model.vision.tokens, model.mode, data.max_text_tokens)
    return Predictor(model, processor, data.prompt, settings, decoding, prompts(data.tasks.values()))


def model_settings(config: DictConfig) -> tuple[ModelSettings | PretrainedSettings, str | None]:
    """The `model` group, and the tokenizer it names (None: the model's own)."""
    values = group(config, "model")
    if "pretrained" in values:
        values.pop("resolution", None)  # a part of some names
        tokenizer = values.pop("tokenizer", None)
        return build_settings(PretrainedSettings, values, "model"), tokenizer
    tokenizer = values["language"].pop("tokenizer")
    return build_settings(ModelSettings, values, "model"), tokenizer


def _pretrained(
    settings: PretrainedSettings,
    tokenizer_name: str | None,
    data: DataSettings,
    decoding: Decoding,
    train_examples: Sequence[Example],
) -> Predictor:
    """A pretrained model with its processor."""
    processor, known = pretrained_processor(settings, tokenizer_name, data, train_examples)
    started_from = None
    if settings.weights == "hub":
        folder = model_folder.find(settings.pretrained)
        started_from = {"model": _named(settings.pretrained), "weights": fingerprint.weights_in(folder)}
        model = build_pretrained(replace(settings, pretrained=str(folder)), known)
    else:
        model = build_pretrained(settings, known)
    return Predictor(model, processor, data.prompt, settings, decoding, prompts(data.tasks.values()), started_from)


def pretrained_processor(
    settings: PretrainedSettings, tokenizer_name: str | None, data: DataSettings, train_examples: Sequence[Example]
) -> tuple[PretrainedProcessor, PreTrainedConfig]:
    """The processor of a pretrained model, and the config of its network; no weights are read."""
    if data.resize != "squash" or data.reduced_decoding:
        raise InputError(
            f"{settings.pretrained} resizes images as it was trained; leave data.resize and data.reduced_decoding out"
        )
    known = pretrained_config(settings)
    if settings.weights == "random":
        if tokenizer_name != "trained":
            raise InputError("model.weights=random needs model.tokenizer=trained, which is made of the questions")
        text = train_tokenizer(train_examples, known.get_text_config().vocab_size - ADDED_TOKENS)
        library, known = random_processor(known, text, settings.image_splitting)
    else:
        library = load_processor(settings.pretrained, settings.image_splitting)
    return PretrainedProcessor.of(library, mode_of(known), data.max_text_tokens), known


def _named(pretrained: str) -> str:
    """A hub id as it is; a folder, so that it is found from elsewhere too."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.exists() else pretrained


def adapter_settings(config: DictConfig) -> AdapterSettings | None:
    """The `adapt` group, where there are adapters."""
    return None if config.get("adapt") is None else build_settings(AdapterSettings, group(config, "adapt"), "adapt")


def attach_adapters(config: DictConfig, predictor: Predictor, device: torch.device) -> Base | None:
    """Let train what `trainable` says, and give the model the adapters that the config asks for.

    Returns:
        the base of the adapters, where it lies nowhere yet.
    """
    settings = adapter_settings(config)
    if predictor.adapter is not None:
        raise InputError(
            f"init_from={config.init_from} is an adapter; merge it into its base first, with launch/merge.py "
            f"adapter={config.init_from} output=..."
        )
    if settings is None:
        peft_adapters.prepare(predictor.model, config.trainable, None)
        return None
    _refuse_trained_beside(config, settings)
    unwritten = None
    if predictor.started_from is not None:
        base, known = predictor.started_from["model"], predictor.started_from["weights"]
    else:  # of parts, or random: it lies nowhere as a whole
        base, known = f"../{model_folder.BASE}", ""
        unwritten = Base(predictor)
    predictor.adapter = Adapter(settings, base, known)
    paths = peft_adapters.prepare(predictor.model, config.trainable, settings, device)
    ranks.say(peft_adapters.describe(predictor.model, settings, paths))
    return unwritten


def _refuse_trained_beside(config: DictConfig, settings: AdapterSettings) -> None:
    for part in PARTS:
        choice = config.trainable[part]
        if choice == "none":
            continue
        if part == "language" or choice != "all":
            raise InputError(
                f"trainable.{part}={choice}: adapt={settings.method} leaves the model frozen beside its adapters, but "
                "for trainable.vision=all or trainable.projector=all; set none"
            )
        if any(target.startswith((f"{part}.", "*")) for target in settings.targets) or (
            settings.bits and part == "vision"
        ):
            raise InputError(
                f"trainable.{part}=all: its weights would have adapters, or be in 4 bits, and train too; set none"
            )


class Base:
    """A model without adapters, kept (by the first rank) to be written beside them once the run's folder is there."""

    def __init__(self, predictor: Predictor) -> None:
        named = predictor.model.named_parameters() if ranks.is_first() else ()
        self.predictor, self.weights = replace(predictor), {name: weight.detach().clone() for name, weight in named}

    def write(self, folder: Path, resumed: bool) -> str:
        """Write it as `vlmvqa.load` reads it, unless a resumed run has done so before; its fingerprint, on every rank.

        What lies there else is of a run that ended before its first checkpoint, perhaps of another seed.
        """
        if not resumed:
            ranks.broadcast_from_rank0(lambda: self._replace(folder))
        return fingerprint.weights_in(folder)

    def _replace(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.predictor.save(folder, self.weights)
