"""Tensor names: in a model's files, in the model, and as paths common to all model families."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.pretrained import family
from vlmvqa.extras.pretrained.build import build_pretrained, pretrained_config
from vlmvqa.extras.pretrained.model import PretrainedVLM
from vlmvqa.models import build, checkpoint, loading
from vlmvqa.models.interface import Model


@dataclass(frozen=True)
class TensorNames:
    """Maps the tensor names of a saved model.

    Attributes:
        folder: Folder of the saved model.
        model: The model without weights if its names need mapping; None if the names in its files are used as they are.
    """

    folder: Path
    model: PretrainedVLM | None

    @classmethod
    def read(cls, folder: Path) -> TensorNames:
        """Read the names of a saved model from its config."""
        config = loading.read_config(folder) if (folder / checkpoint.CONFIG).exists() else {}
        architecture = config.get("model_type")
        if architecture != checkpoint.OURS and architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            _, settings = family.saved_settings(folder, config)
            settings = replace(settings, attention=None)
            with torch.device("meta"), no_init_weights():
                return cls(folder, build_pretrained(settings, pretrained_config(settings), uninitialized=True))
        return cls(folder, None)

    def model_name(self, key: str) -> str | None:
        """Return a tensor's name in the model, or None if the model has no such parameter (or it is a tied weight).

        Published checkpoints may use names of older transformers versions; they are renamed as transformers does.

        Args:
            key: Name in the file.

        Raises:
            InputError: Loading would split the tensor or combine it with others.
        """
        if self.model is None:
            return key
        renamings = [one for one in self._transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in self._transforms if isinstance(one, WeightConverter)]
        known = self._parameters
        name, converted = rename_source_key(key, renamings, converters, self.model.net.base_model_prefix, known)
        if name not in known and key in known:
            name, converted = key, None
        if converted is not None:
            raise InputError(
                f"{self.folder} stores {key} in another layout than the model; save the model again and merge that"
            )
        return name if name in known else None

    @cached_property
    def _transforms(self) -> list[Any]:
        assert self.model is not None
        return list(get_model_conversion_mapping(self.model.net))

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        """Parameters by name; tied ones only once."""
        assert self.model is not None
        return dict(self.model.net.named_parameters())

    def path(self, name: str) -> str:
        """Return a tensor's path: part (vision, projector, language) and name in it, as in `adapt.targets`."""
        return name if self.model is None else self.model.module_path(name)

    def quantizable(self) -> set[str]:
        """Return the names of the weights that adapters over 4 bits quantize."""
        model: Model | None = self.model
        if model is None:  # a `VLM`
            config, settings = build.saved_settings(self.folder, loading.read_config(self.folder))
            with torch.device("meta"):
                model = build.uninitialized(settings, config)
        return {f"{name}.weight" for name in peft_adapters.packable(model)}
