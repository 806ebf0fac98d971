"""Config to objects: what every launch script builds the same way. The library itself never sees Hydra."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.batch import Processor
from vlmvqa.data.example import Example
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.tokenizer import load_tokenizer, train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.inference.predict import Predictor
from vlmvqa.models.generation import Decoding
from vlmvqa.models.vlm import ModelSettings, build
from vlmvqa.settings import build_settings


@dataclass(frozen=True)
class DataSettings:
    """The `data` group; its keys are explained in conf/data/vqav2.yaml."""

    source: str
    root: str
    options: Mapping[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "val"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    prompt: str = "answer en {question}\n"
    target: str = "most_common"
    resize: str = "squash"
    max_text_tokens: int | None = 64
    questions_per_row: int | None = None
    images_per_row: int = 1
    on_bad_record: str = "error"


def group(config: DictConfig, name: str) -> dict[str, Any]:
    """A resolved node of the config.

    Raises:
        InputError: a mandatory value (`???`) was not given.
    """
    missing = sorted(OmegaConf.missing_keys(config[name]))
    if missing:
        raise InputError(f"{name}.{missing[0]} must be given; add {name}.{missing[0]}=... to the command")
    node = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def data_settings(config: DictConfig) -> DataSettings:
    settings = build_settings(DataSettings, group(config, "data"), "data")
    rest = settings.prompt.split("{question}")
    if len(rest) != 2 or set("{}") & set("".join(rest)):
        raise InputError(f"data.prompt={settings.prompt!r} must hold {{question}} once, and no other braces")
    return settings


def read_examples(
    settings: DataSettings, split: str, max_samples: int | None, bad_records: BadRecords
) -> list[Example]:
    """A split of the source named by `data.source`, a module of `vlmvqa.data` with a function `read`."""
    return list(
        _source(settings.source).read(
            Path(settings.root).expanduser(),
            split,
            prompt=settings.prompt,
            max_samples=max_samples,
            bad_records=bad_records,
            **settings.options,
        )
    )


def build_predictor(config: DictConfig, data: DataSettings, train_examples: Sequence[Example]) -> Predictor:
    """The model with its tokenizer, image settings and prompt."""
    values = group(config, "model")
    tokenizer_name = values["language"].pop("tokenizer")
    settings = build_settings(ModelSettings, values, "model")
    model = build(settings)
    if tokenizer_name == "trained":
        tokenizer = train_tokenizer(train_examples, model.language.config.vocab_size)
    else:
        tokenizer = load_tokenizer(tokenizer_name or settings.language.name)
    known = model.vision.data_config
    images = ImageSettings(
        settings.vision.image_size, tuple(known["mean"]), tuple(known["std"]), known["interpolation"], data.resize
    )
    processor = Processor(tokenizer, images, model.vision.tokens, model.mode, data.max_text_tokens)
    decoding = build_settings(Decoding, group(config, "decoding"), "decoding")
    return Predictor(model, processor, data.prompt, settings, decoding)


def run_folder(config: DictConfig) -> Path:
    return Path(group(config, "run")["dir"]).expanduser()


def _source(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"vlmvqa.data.{name}")
    except ModuleNotFoundError as error:
        raise InputError(f"data.source={name}: there is no src/vlmvqa/data/{name}.py") from error


def training_answers(settings: DataSettings) -> list[Example] | str:
    """The training split, for the prior control; where it cannot be read, why."""
    try:
        return read_examples(settings, settings.train_split, settings.max_train_samples, BadRecords("skip"))
    except InputError as error:
        return f"the training split cannot be read ({error})"


def decoding(config: DictConfig, trained: Decoding) -> Decoding:
    """The decoding a model was trained and scored with, but for what the command line says."""
    given = [override.lstrip("+").partition("=")[0] for override in HydraConfig.get().overrides.task]
    keys = [key.removeprefix("decoding.") for key in given if key.startswith("decoding.")]
    values = group(config, "decoding")
    return replace(trained, **{key: values[key] for key in keys})
