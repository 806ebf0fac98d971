"""Whether models fit together, and what their merge is asked with: every refusal comes before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vlmvqa import fingerprint
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.merging.files import FLOATS, TYPES, Weights
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.hub import OWN_CODE
from vlmvqa.models import model_folder
from vlmvqa.models.checkpoint import OURS, base_of
from vlmvqa.models.vlm import DTYPES
from vlmvqa.settings import build_settings

# Of a config of transformers, what says nothing about how the model computes.
BESIDE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache", OURS)
# Of an image processor, what changes the pixels.
PIXELS = (
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("do_convert_rgb", "do_pad", "do_image_splitting", "do_center_crop", "crop_size", "image_seq_length"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """A saved model's `config.json`."""
    path = folder / model_folder.CONFIG
    if not path.exists():
        raise InputError(f"{folder} holds no {model_folder.CONFIG}; copy or save the model again")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config is ours: in one of transformers, an entry of it, or nothing."""
    return dict(config.get(OURS, {}) if "model_type" in config else config)


def adapter_settings(folder: Path) -> AdapterSettings | None:
    """Those of a saved adapter; None: the folder holds a full model."""
    config = read_config(folder)
    if "adapter" not in config:
        return None
    return build_settings(
        AdapterSettings, config["adapter"]["settings"], f"{folder / model_folder.CONFIG}: adapter.settings"
    )


# ---- of one base


def base_of_adapters(base: Path | None, folders: Sequence[Path]) -> Path | None:
    """What the adapters among these lie over; without any, the base that is given.

    Raises:
        InputError: it is not there, or they lie over different ones, or over another than is given.
    """
    recorded = {folder: config["adapter"] for folder in folders if "adapter" in (config := read_config(folder))}
    if not recorded:
        return base
    first, about = next(iter(recorded.items()))
    for folder, other in recorded.items():
        if other["fingerprint"] != about["fingerprint"]:
            one, two = (
                model_folder.kept_base(where, said["base"]) or said["base"]
                for where, said in ((folder, other), (first, about))
            )
            raise InputError(
                f"{folder} was trained over {one}, {first} over {two}, which holds other weights; "
                "merge adapters of one base"
            )
    if base is None:
        base = base_of(first, about)
    elif fingerprint.weights_in(base) != about["fingerprint"]:
        raise InputError(f"{first} was trained over other weights than {base} holds; leave base= out for its own")
    if "adapter" in read_config(base):
        raise InputError(
            f"{base} is an adapter itself; merge it into its base first, with launch/merge.py adapter={base} output=..."
        )
    return base


def refuse_other_bases(base: Path, models: Sequence[Path]) -> None:
    """Stop where a full model says that it was trained on from another one."""
    started = {folder: ours(read_config(folder)).get("started_from") for folder in models}
    if not any(started.values()):
        return
    own = fingerprint.weights_in(base)
    for folder, one in started.items():
        if one and one["weights"] != own:
            raise InputError(f"{folder} continues {one['model']}, not {base}; give that as base")


def refuse_quantised(model: Weights) -> None:
    """Stop where a full model holds tensors that cannot be merged."""
    for name, entry in model.entries.items():
        if entry.type not in TYPES:
            kind = f"{name} is of type {entry.type}, as quantised weights are"
            raise InputError(f"{model.folder}: {kind}; merge the dequantised model")


def refuse_different(base: Weights, other: Weights) -> None:
    """Stop unless two models have the same tensors."""
    differ = [_difference(base, other, name) for name in dict.fromkeys([*base.entries, *other.entries])]
    found = [one for one in differ if one]
    if found:
        more = f" (and {len(found) - 1} more differ)" if len(found) > 1 else ""
        raise InputError(
            f"{other.folder} and {base.folder} are not of one base: {found[0]}{more}; merge models tuned from the same"
        )


def _difference(base: Weights, other: Weights, name: str) -> str | None:
    """What tells the models apart in a tensor, besides its values."""
    one, two = base.entries.get(name), other.entries.get(name)
    if one is None or two is None:
        return f"{name} is in {(other if one is None else base).folder} alone"
    if one.shape != two.shape:
        return f"{name} is {list(one.shape)} in the one, {list(two.shape)} in the other"
    if (one.type in FLOATS) != (two.type in FLOATS):
        return f"{name} is of type {one.type} in the one, {two.type} in the other"
    if one.type not in FLOATS and not _equal(base, other, name):
        return f"{name} holds other whole numbers"
    return None


def _equal(base: Weights, other: Weights, name: str) -> bool:
    return all(torch.equal(one, two) for one, two in zip(base.pieces(name), other.pieces(name), strict=True))


# ---- what they are asked with


def merged_config(weights: Weights, models: Sequence[Path], started_from: Mapping[str, str] | None) -> dict[str, Any]:
    """The base's, with what the models have learned to be asked: the prompt of each source, the longest text.

    Args:
        weights: the base's, in whose types the merged ones are written.
        started_from: what a merged model says that it was trained on from.

    Raises:
        InputError: the models read images or words differently, or were asked differently for one source.
    """
    base = weights.folder
    config = read_config(base)
    known = [ours(read_config(folder)) for folder in models]
    if "model_type" in config:
        _refuse_other_networks(base, models)
        _refuse_other_processors(base, models)
        trained = next((one for one in (ours(config), *known) if "prompts" in one), None)
        if trained is None:  # another library's
            return config
        entry = {key: value for key, value in trained.items() if key != "adapter"}
    elif "prompts" not in config:  # another library's model
        return config
    else:
        _refuse_other_settings(base, models)
        entry = config
    model = {**entry["model"], "dtype": _dtype(weights)}
    entry = {**entry, "model": model, **_asked(base, models), "started_from": started_from}
    return {**config, OURS: entry} if "model_type" in config else entry


def _dtype(weights: Weights) -> str:
    """The type that a model's files hold; float32 where they hold several."""
    found = {FLOATS[entry.type] for entry in weights.entries.values() if entry.type in FLOATS}
    return next((name for name, dtype in DTYPES.items() if found == {dtype}), "float32")


def _asked(base: Path, models: Sequence[Path]) -> dict[str, Any]:
    known = {folder: ours(read_config(folder)) for folder in (base, *models)}
    prompts: dict[str, str] = {}
    for folder, one in known.items():
        for source, prompt in one.get("prompts", {}).items():
            if prompts.setdefault(source, prompt) != prompt:
                raise InputError(f"{folder} asks {source} with {prompt!r}, another with {prompts[source]!r}; which?")
    longest = [one["max_text_tokens"] for one in known.values() if "max_text_tokens" in one]
    return {"prompts": prompts, "max_text_tokens": None if None in longest else max(longest)}


def _refuse_other_settings(base: Path, models: Sequence[Path]) -> None:
    """Stop where our own models differ in their parts, their images or their words."""
    config = read_config(base)
    tokens = model_folder.TOKENIZER + "/tokenizer.json"
    for folder in models:
        other = read_config(folder)
        for key in ("model", "images"):
            if {**other[key], "dtype": None} != {**config[key], "dtype": None}:  # weights may be kept in another type
                raise InputError(
                    f"{folder} and {base} differ in the settings of their {key}; merge models alike in them"
                )
        if (folder / tokens).read_bytes() != (base / tokens).read_bytes():
            raise InputError(f"{folder} and {base} have different tokenizers; merge models tuned from the same")


def _refuse_other_networks(base: Path, models: Sequence[Path]) -> None:
    """Stop where pretrained models compute differently; an adapter computes as its base."""
    own = _plain(AutoConfig.from_pretrained(base, **OWN_CODE).to_dict())
    for folder in models:
        if "adapter" in read_config(folder):
            continue
        other = _plain(AutoConfig.from_pretrained(folder, **OWN_CODE).to_dict())
        differ = sorted(key for key in {**own, **other} if own.get(key) != other.get(key))
        if differ:
            raise InputError(f"{folder} and {base} differ in {differ[0]} of their configs; merge models alike in it")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in BESIDE
    }


def _refuse_other_processors(base: Path, models: Sequence[Path]) -> None:
    """Stop where pretrained models read other pixels, or have other numbers for words than the base has rows."""
    words = load_processor(str(base)).tokenizer.get_vocab()
    first = None
    for folder in models:
        library = load_processor(str(folder))
        if library.tokenizer.get_vocab() != words:
            raise InputError(f"{folder} and {base} have different tokenizers; merge models tuned from the same")
        pixels = {key: getattr(library.image_processor, key, None) for key in PIXELS}
        first = first or pixels
        differ = [key for key in PIXELS if str(pixels[key]) != str(first[key])]
        if differ:
            raise InputError(
                f"{folder} and {models[0]} differ in {differ[0]} of their image processors; merge models alike in it"
            )
