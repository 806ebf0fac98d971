"""A model together with its processor, prompts, generation settings and adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example
from vlmvqa.data.processor import Processor
from vlmvqa.errors import InputError
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import GenerationSettings, Model, Settings

if TYPE_CHECKING:
    from vlmvqa.extras.adapters.peft_adapters import Adapter

BARE = "{question}"  # the prompt of a model that was saved without one


@dataclass
class TrainedModel:
    """A model with its processor, prompt and generation settings.

    Attributes:
        prompt: the template of a question, which contains `{question}`.
        prompts: the template of each source that the model was trained on.
        started_from: the saved model that training started from: its name, and the fingerprint of its weights file.
        parts_from: the saved models that its parts came from in training, if there were several; as `started_from`.
        adapter: the adapter's settings and its base model; None without adapters.
        folder: the folder of the saved model; None if it was not loaded.
    """

    model: Model
    processor: Processor
    prompt: str
    settings: Settings
    decoding: GenerationSettings = field(default_factory=GenerationSettings)
    prompts: Mapping[str, str] = field(default_factory=dict)
    started_from: Mapping[str, str] | None = None
    parts_from: Mapping[str, Mapping[str, str]] | None = None
    adapter: Adapter | None = None
    folder: Path | None = None

    @property
    def dtype(self) -> str:
        """Data type of the weights."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return str(dtype).removeprefix("torch.")

    def prompt_for(self, source: str, otherwise: str) -> str:
        """Return the prompt template for a source: the one used to train on it, or else the model's `prompt`.

        Args:
            otherwise: the source's own template, used if the model was never trained here, or if only one of `prompt`
                and `otherwise` has a `{question}`.
        """
        if self.prompt == BARE and not self.prompts:  # never trained here
            return otherwise
        fitting = ("{question}" in self.prompt) == ("{question}" in otherwise)
        return self.prompts.get(source, self.prompt if fitting else otherwise)

    def save(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Save model, tokenizer, image settings and prompt to a folder that `vlmvqa.load` reads.

        Args:
            weights: weights to save instead of the model's, by the same names.
        """
        if self.adapter is not None:
            raise InputError("this model has adapters; merge them first (launch/merge.py), or copy their folder")
        if weights is None and self.dtype != self.settings.dtype:
            raise InputError(
                f"the weights were saved in {self.settings.dtype} and loaded in {self.dtype}; load the model with "
                "dtype='saved' to save it"
            )
        own = self.processor.processing_class
        checkpoint.save(Path(folder), self.model, self.settings, own, self._extra(), weights)

    def describe(self, folder: Path) -> None:
        """Save everything except the weights, which the folder already holds."""
        own = self.processor.processing_class
        checkpoint.describe(folder, self.model, self.settings, own, self._extra(), self.adapter)

    def _extra(self) -> dict[str, Any]:
        return {
            "images": dataclasses.asdict(self.processor.images),
            "prompt": self.prompt,
            "prompts": dict(self.prompts),
            "started_from": self.started_from,
            **({"parts_from": self.parts_from} if self.parts_from else {}),
            "max_text_tokens": self.processor.max_text_tokens,
            "decoding": dataclasses.asdict(self.decoding),
            "end_token_ids": sorted(self.processor.end_token_ids),
        }


def build_model(
    settings: Settings, data: DataSettings, decoding: GenerationSettings, train_examples: Sequence[Example]
) -> TrainedModel:
    """Build a model with its tokenizer, image settings and prompt.

    Args:
        train_examples: the texts that a tokenizer is trained on, if the settings select "trained".
    """
    model, processor, started_from = checkpoint.family(settings.family).compose(settings, data, train_examples)
    return TrainedModel(model, processor, data.prompt, settings, decoding, data.prompts, started_from)
