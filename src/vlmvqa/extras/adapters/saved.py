"""Load saved adapters with their base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmvqa import fingerprint
from vlmvqa.config.compose import build_settings
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.models import checkpoint, loading
from vlmvqa.models.interface import DTYPES, Model, cast_parameters


def base_of(folder: Path, adapter: Mapping[str, Any]) -> Path:
    """Return the folder of a saved adapter's base model.

    Raises:
        InputError: the base model is missing, or its weights differ from those the adapter was trained on.
    """
    base = str(adapter["base"])
    where = loading.find(str(loading.stored_base(folder, base) or base))
    found, expected = fingerprint.weights_in(where), adapter["fingerprint"]
    if found != expected:
        raise InputError(
            f"{folder} was trained over other weights than {where} holds now ({expected[:12]}, "
            f"not {found[:12]}); put back the base it was trained on"
        )
    return where


def load_adapter(folder: Path, config: Mapping[str, Any], device: str, dtype: str) -> Model:
    """Load a base model with the adapters of a folder.

    Args:
        dtype: data type of all weights; adapters over a base that was trained in this type, or over 4-bit weights, keep
            theirs.
    """
    base, trained_in = base_of(folder, config["adapter"]), config["model"]["dtype"]
    model, _, _, entries = loading.load(base)
    if "adapter" in entries:
        raise InputError(f"the base of {folder} is {base}, which is an adapter itself; merge that into its base first")
    settings = build_settings(
        peft_adapters.AdapterSettings, config["adapter"]["settings"], f"{folder / checkpoint.CONFIG}: adapter.settings"
    )
    if settings.bits:  # the compute dtype of 4-bit layers is a setting of its own
        dtype = trained_in
    model = cast_parameters(model, DTYPES[dtype])
    peft_adapters.attach(model, settings, device)
    peft_adapters.load(folder, model)
    return model if dtype == trained_in else cast_parameters(model, DTYPES[dtype])
