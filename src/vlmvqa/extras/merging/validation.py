"""Check that models can be merged and build the merged config, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vlmvqa import fingerprint
from vlmvqa.config.compose import build_settings
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.adapters.saved import base_of
from vlmvqa.extras.merging.files import DTYPES, FLOATS, Weights
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.hub import OWN_CODE
from vlmvqa.models import checkpoint, interface, loading
from vlmvqa.models.checkpoint import OURS
from vlmvqa.models.loading import read_config

# Keys of a transformers config that don't change what the model computes.
IGNORED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache", OURS)
# Settings of an image processor that change the pixels.
PIXELS = (
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("do_convert_rgb", "do_pad", "do_image_splitting", "do_center_crop", "crop_size", "image_seq_length"),
)


def own_config(folder: Path) -> dict[str, Any]:
    """Return our part of a saved config: all of it, or one entry of a transformers config, if it has one."""
    config = read_config(folder)
    return dict(config.get(OURS, config))


def adapter_settings(folder: Path) -> AdapterSettings | None:
    """Return the settings of a saved adapter, or None for a full model."""
    config = read_config(folder)
    if "adapter" not in config:
        return None
    return build_settings(
        AdapterSettings, config["adapter"]["settings"], f"{folder / checkpoint.CONFIG}: adapter.settings"
    )


# ---- same base


def resolve_base(base: Path | None, folders: Sequence[Path]) -> Path | None:
    """Return the base of the adapters among the models; without adapters, the given base.

    Raises:
        InputError: The base is missing, or the adapters have different bases or another one than given.
    """
    recorded = {folder: config["adapter"] for folder in folders if "adapter" in (config := read_config(folder))}
    if not recorded:
        return base
    first, first_adapter = next(iter(recorded.items()))
    for folder, adapter in recorded.items():
        if adapter["fingerprint"] != first_adapter["fingerprint"]:
            one, two = (
                loading.stored_base(path, entry["base"]) or entry["base"]
                for path, entry in ((folder, adapter), (first, first_adapter))
            )
            raise InputError(
                f"{folder} was trained over {one}, {first} over {two}, which has other weights; "
                "merge adapters of the same base"
            )
    if base is None:
        base = base_of(first, first_adapter)
    elif fingerprint.weights_in(base) != first_adapter["fingerprint"]:
        raise InputError(f"{first} was trained over other weights than those of {base}; remove base= to use its own")
    if "adapter" in read_config(base):
        raise InputError(
            f"{base} is an adapter; merge it into its base first, with launch/merge.py adapter={base} output=..."
        )
    return base


def check_started_from(base: Path, models: Sequence[Path]) -> None:
    """Raise InputError if a full model records that training started from another base."""
    recorded = {folder: own_config(folder).get("started_from") for folder in models}
    if not any(recorded.values()):
        return
    base_weights = fingerprint.weights_in(base)
    for folder, started_from in recorded.items():
        if started_from and started_from["weights"] != base_weights:
            raise InputError(f"{folder} was trained from {started_from['model']}, not {base}; set that as base")


def check_not_quantized(model: Weights) -> None:
    """Raise InputError if a full model has tensors of a dtype that cannot be merged."""
    for name, entry in model.entries.items():
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{model.folder}: {name} has dtype {entry.dtype}, as in quantized models; merge the dequantized model"
            )


def check_same_tensors(base: Weights, other: Weights) -> None:
    """Raise InputError unless two models have the same tensor names, shapes, kinds of dtype and integer tensors."""
    names = dict.fromkeys([*base.entries, *other.entries])
    if found := [difference for name in names if (difference := _difference(base, other, name))]:
        more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
        raise InputError(
            f"{other.folder} and {base.folder} don't have the same base: {found[0]}{more}; merge models fine-tuned "
            "from the same base"
        )


def _difference(base: Weights, other: Weights, name: str) -> str | None:
    """Describe how a tensor differs between two models, other than by trained values."""
    one, two = base.entries.get(name), other.entries.get(name)
    if one is None or two is None:
        return f"{name} is only in {(other if one is None else base).folder}"
    if one.shape != two.shape:
        return f"{name} has shape {list(two.shape)}, in the base {list(one.shape)}"
    if (one.dtype in FLOATS) != (two.dtype in FLOATS):
        return f"{name} has dtype {two.dtype}, in the base {one.dtype}"
    if one.dtype not in FLOATS and not all(map(torch.equal, base.chunks(name), other.chunks(name))):
        return f"{name} has other integer values"
    return None


# ---- merged config


def merged_config(weights: Weights, models: Sequence[Path], started_from: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the base's config with all models' prompts, the largest text limit and the base's `weights` as dtype.

    Raises:
        InputError: The models differ in image processing, tokenizer, or the prompt of a source.
    """
    base = weights.folder
    config = read_config(base)
    own_configs = {folder: own_config(folder) for folder in (base, *models)}
    pretrained = config.get("model_type", OURS) != OURS
    if not pretrained and "prompts" not in config:  # not our format
        return config
    if pretrained:
        _check_same_network([folder for folder in (base, *models) if "adapter" not in read_config(folder)])
    expected: dict[str, tuple[Path, Any]] = {}
    for folder in (base, *models):
        for what, value in (_pretrained_settings if pretrained else _settings)(folder).items():
            if pretrained and folder == base and what.endswith("image processors"):
                continue  # training may have changed them
            first, before = expected.setdefault(what, (folder, value))
            if value != before:
                raise InputError(
                    f"{folder} and {first} differ in {what}; merge models fine-tuned from the same base in the same way"
                )
    entry = next((one for one in own_configs.values() if "prompts" in one), None)
    if entry is None:  # published models that we haven't trained
        return config
    entry.pop("adapter", None)
    model = {**entry["model"], "dtype": _dtype(weights)}
    entry = {**entry, "model": model, **_text_settings(own_configs), "started_from": started_from}
    return {**config, OURS: entry} if pretrained else entry


def _dtype(weights: Weights) -> str:
    """Return the dtype of a model's files; float32 if they have several."""
    found = {FLOATS[entry.dtype] for entry in weights.entries.values() if entry.dtype in FLOATS}
    return next((name for name, dtype in interface.DTYPES.items() if found == {dtype}), "float32")


def _text_settings(own_configs: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    prompts: dict[str, str] = {}
    for folder, config in own_configs.items():
        for source, prompt in config.get("prompts", {}).items():
            if prompts.setdefault(source, prompt) != prompt:
                raise InputError(
                    f"{folder} has the prompt {prompt!r} for {source}, another model {prompts[source]!r}; merge models "
                    "with the same prompt"
                )
    limits = [config["max_text_tokens"] for config in own_configs.values() if "max_text_tokens" in config]
    return {"prompts": prompts, "max_text_tokens": None if None in limits else max(limits)}


def _settings(folder: Path) -> dict[str, Any]:
    """Return what must be the same in models of our architecture, by its name in errors."""
    config = read_config(folder)  # the stored dtype may differ
    own = {f"their {key} settings": {**config[key], "dtype": None} for key in ("model", "images")}
    return {**own, "their tokenizers": (folder / checkpoint.TOKENIZER / "tokenizer.json").read_bytes()}


def _pretrained_settings(folder: Path) -> dict[str, Any]:
    """Return what must be the same in pretrained models and adapters, by its name in errors."""
    processor = load_processor(str(folder))
    found = {f"{key} of their image processors": str(getattr(processor.image_processor, key, None)) for key in PIXELS}
    return {**found, "their tokenizers": processor.tokenizer.get_vocab()}


def _check_same_network(folders: Sequence[Path]) -> None:
    """Raise InputError if full pretrained models have different architectures."""
    first, *others = folders
    configs = {folder: _without_ignored(AutoConfig.from_pretrained(folder, **OWN_CODE).to_dict()) for folder in folders}
    for folder in others:
        names = sorted({**configs[first], **configs[folder]})
        differ = [name for name in names if configs[first].get(name) != configs[folder].get(name)]
        if differ:
            raise InputError(
                f"{folder} and {first} differ in {differ[0]} of their configs; merge models fine-tuned from the same "
                "base in the same way"
            )


def _without_ignored(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_ignored(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in IGNORED
    }
