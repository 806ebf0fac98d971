"""A trained model in one folder, which loads (`loading.py`) without the original weights.

config.json          settings of the model, the decoder's full config, and further entries (`extra`)
model.safetensors    every weight
tokenizer/           files of the tokenizer, as transformers saves it

The folder of a pretrained model is one that transformers reads too: its processor's files are next to the others, and
config.json is transformers' own, with an entry `vlmvqa`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import __version__ as transformers_version

from vlmvqa.config.compose import build_settings
from vlmvqa.models.interface import Model, Settings

if TYPE_CHECKING:
    from vlmvqa.config.schema import DataSettings
    from vlmvqa.data.example import Example
    from vlmvqa.data.processor import Processor
    from vlmvqa.extras.adapters.peft_adapters import Adapter


CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
BASE = "base"  # a run's folder of the base model, if the base isn't stored elsewhere
FORMAT = 1
OURS = "vlmvqa"  # the entry that vlmvqa adds to a config.json of transformers, and the model_type of a `VLM`
# Modules are imported on first use: a model of one family never loads the other.
FAMILIES = {"vlm": "vlmvqa.models.build", "pretrained": "vlmvqa.extras.pretrained.family"}

ProcessingClass = Any  # PreTrainedTokenizerBase, or a pretrained model's ProcessorMixin


class Family(Protocol):
    """The contents of a module in `FAMILIES`.

    Attributes:
        SETTINGS: the family's settings class.
    """

    SETTINGS: type[Any]

    def saved_settings(self, folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Settings]:
        """Return vlmvqa's entries of a `config.json`, and the settings that build the saved model."""

    def continued_settings(self, settings: Any, folder: Path) -> Settings:
        """Return the settings of a run that continues to train the saved model of a folder."""

    def load(self, folder: Path, settings: Any, config: Mapping[str, Any]) -> Model:
        """Load a saved model with its weights."""

    def load_processing_class(self, folder: Path) -> ProcessingClass:
        """Load the tokenizer or processor of a saved model."""

    def uninitialized_like(self, model: Any, settings: Any) -> Model:
        """Build a model with the architecture of `model`; the caller sets its weights."""

    def make_processor(self, processing_class: ProcessingClass, model: Any, config: Mapping[str, Any]) -> Processor:
        """Return the processor of a saved model."""

    def compose(
        self, settings: Any, data: DataSettings, examples: Sequence[Example]
    ) -> tuple[Model, Processor, Mapping[str, str] | None]:
        """Build a new model for a run; return it, its processor, and the saved model that training starts from."""

    def compose_processor(self, settings: Any, data: DataSettings, examples: Sequence[Example]) -> Processor:
        """Return the processor of a new model without loading weights."""


def family(name: str) -> Family:
    """Return a family's module."""
    module: Any = importlib.import_module(FAMILIES[name])
    found: Family = module
    return found


def family_of(model_config: Mapping[str, Any]) -> Family:
    """Return the family of a `model` config group: pretrained models have a key of that name."""
    return family("pretrained" if "pretrained" in model_config else "vlm")


def model_settings(values: Mapping[str, Any], given: Iterable[str] = ()) -> Settings:
    """Return the `model` group."""
    settings: Settings = build_settings(family_of(values).SETTINGS, values, "model")
    return settings


def save(
    folder: Path,
    model: Model,
    settings: Settings,
    processing_class: ProcessingClass,
    extra: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's folder. `config.json` is written last, so that a folder that has one is complete.

    Args:
        settings: the settings the model was built from.
        processing_class: its tokenizer, or a pretrained model's processor.
        extra: further entries of `config.json` (image settings, prompt).
        weights: weights by parameter name, saved instead of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    named = dict(model.named_parameters()) if weights is None else weights
    save_file(
        {model.saved_name(name): weight.detach().contiguous() for name, weight in named.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    describe(folder, model, settings, processing_class, extra)


def describe(
    folder: Path,
    model: Model,
    settings: Settings,
    processing_class: ProcessingClass,
    extra: dict[str, Any],
    adapter: Adapter | None = None,
) -> None:
    """Write all files of the folder except the weights, which a sharded model's trainer has written."""
    versions = {"torch": torch.__version__, "transformers": transformers_version}
    config = {"format": FORMAT, "model": dataclasses.asdict(settings), "versions": versions, **extra}
    processing_class.save_pretrained(folder / model.text_folder)
    if adapter is not None:
        config |= {"adapter": dataclasses.asdict(adapter)}
    else:
        model.save_extras(folder)
        config = model.saved_config(config)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2, default=str) + "\n")
    partial.replace(folder / CONFIG)


def uninitialized_like(model: Model, settings: Settings) -> Model:
    """Build a model with the architecture of `model` from its settings; the caller sets its weights."""
    return family(settings.family).uninitialized_like(model, settings)
