"""Adapters: small trainable matrices added to the frozen weights of a base model, which may be stored in 4 bits.

    y = W x  +  scale * B (A x)        LoRA (Hu et al. 2021); DoRA (Liu et al. 2024) also learns the norm of each row

The layers are peft's and bitsandbytes'. This module selects the linear layers, checks that these and no others were
changed, and reads and writes the folder of an adapter:

adapter_config.json, adapter_model.safetensors   peft's files; peft loads them over the same base
config.json                                      the base with its fingerprint, and the entries of `checkpoint.py`
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmvqa.config.compose import build_settings
from vlmvqa.errors import InputError, suggest
from vlmvqa.models.checkpoint import WEIGHTS as MODEL_WEIGHTS
from vlmvqa.models.interface import Model
from vlmvqa.training.optimizer import set_trainable

METHODS = ("lora", "dora")
NAME = "default"  # peft's name of the only adapter
WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."  # precedes the names of weights in peft's files
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSettings:
    """The `adapt` group; conf/adapt/lora.yaml documents its keys.

    4-bit weights: Dettmers et al. 2023. Double quantization saves 0.37 bits per weight.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: Sequence[str] = field(default_factory=lambda: [f"language.*.{name}" for name in ATTENTION + FEED_FORWARD])
    bits: int | None = None
    quantization: str = "nf4"
    double_quantization: bool = True
    compute_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("quantization", self.quantization, ("nf4", "fp4")),
            ("compute_dtype", self.compute_dtype, ("float32", "bfloat16", "float16")),
        ):
            if value not in known:
                raise InputError(
                    f"adapt.{name}={value} is unknown; use one of {', '.join(known)}{suggest(value, known)}"
                )
        if self.bits not in (None, 4):
            raise InputError(f"adapt.bits={self.bits} is unknown; use 4, or null for weights as they are")
        if self.rank < 1 or not 0 <= self.dropout < 1 or self.alpha <= 0:
            raise InputError("adapt: rank must be at least 1, alpha above 0, and dropout from 0 to below 1")
        if not self.targets:
            raise InputError("adapt.targets names no module; leave it out for the language model's linear layers")


def adapter_settings(values: Mapping[str, Any], given: Iterable[str] = ()) -> AdapterSettings:
    """Return the `adapt` group."""
    return build_settings(AdapterSettings, values, "adapt")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter's settings and base model.

    Attributes:
        base: a hub id or folder; one that begins with "." is relative to the adapter's folder.
        fingerprint: fingerprint of the base model's weights (`fingerprint.weights_in`).
    """

    settings: AdapterSettings
    base: str
    fingerprint: str


def prepare(
    model: Model,
    trainable: Mapping[str, str | int],
    settings: AdapterSettings | None,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Attach adapters, if there are `settings`, and set which parameters train; arguments and result as in `attach`.

    `trainable` has a choice per part (`optimizer.set_trainable`); with adapters, "all" trains a part as well.
    """
    paths = [] if settings is None else attach(model, settings, device)
    chosen = {part: choice for part, choice in trainable.items() if settings is None or choice == "all"}
    for part, choice in chosen.items():
        set_trainable(model.part(part), choice, part)
    if settings is not None:
        keep_float32(model, chosen)
    return paths


def attach(model: Model, settings: AdapterSettings, device: torch.device | str = "cpu") -> list[str]:
    """Freeze a model, quantize it if `settings.bits` is set, and attach adapters to the target modules.

    Args:
        device: device on which weights are quantized; the others are not moved.

    Returns:
        The paths of the modules that got an adapter.

    Raises:
        InputError: peft or bitsandbytes is not installed, a pattern matches nothing, or peft changed other modules.
    """
    peft = _imported("peft", "adapt")
    host = model.adapter_host
    paths = _chosen(model, settings.targets)
    model.requires_grad_(False)
    if settings.bits == 4:
        quantize(model, settings, device)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.method == "dora",
        target_modules=list(paths.values()),
        bias="none",
    )
    peft.inject_adapter_in_model(config, host)
    for name, parameter in host.named_parameters():
        if "lora_" in name:  # peft creates them in the base's type, which rounds small steps away
            parameter.data = parameter.data.float()
    got = {name for name, module in host.named_modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)}
    if wrong := sorted(got ^ set(paths.values())):
        raise InputError(
            f"adapt.targets: {wrong[0]} {'got' if wrong[0] in got else 'did not get'} an adapter, contrary "
            "to the config; please report it with the command"
        )
    return list(paths)


def keep_float32(model: Model, parts: Collection[str]) -> None:
    """Cast the parts that train entirely to float32, like the adapters, whatever the data type of the base."""
    for part in parts:
        for parameter in model.part(part).parameters:
            parameter.data = parameter.data.float()
    if parts and len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1:
        for module in (model.part("vision").module, model.part("projector").module):
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Cast a part's inputs to its own data type: transformers passes features in that of the part before it."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def describe(model: Model, settings: AdapterSettings, paths: Sequence[str]) -> str:
    """Return a summary: the modules with adapters, the number of their parameters, and the quantized layers."""
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    lines = [f"{settings.method} of rank {settings.rank}, alpha {settings.alpha:g}: {adapters:,} parameters on"]
    lines += [f"  {count:>4} x {kind}" for kind, count in Counter(map(_kind, paths)).items()]
    if settings.bits == 4:
        packed: list[Any] = [module for module in model.modules() if hasattr(module, "quant_storage")]
        numel = sum(module.in_features * module.out_features for module in packed)
        lines.append(f"  over {len(packed)} linear layers in {settings.quantization}, {numel:,} parameters of the base")
        host: Any = model.adapter_host
        unpacked = sorted({host.get_submodule(name).in_features for name in packable(model) if "lora_" not in name})
        if unpacked:
            widths = ", ".join(map(str, unpacked))
            lines.append(f"  layers of width {widths} are not quantized: this device cannot unpack them from 4 bits")
    return "\n".join(lines)


# ---- 4 bits


def quantize(model: Model, settings: AdapterSettings, device: torch.device | str = "cpu") -> None:
    """Replace the linear layers of all blocks by 4-bit layers, one at a time, so that little is in memory twice.

    A layer that cannot be dequantized correctly is left unchanged: on CPUs with AVX-512, bitsandbytes 0.50 mixes up
    the scales if the width is not a multiple of 64.
    """
    host = model.adapter_host
    for name in packable(model):
        linear: Any = host.get_submodule(name)
        weight = _packed(linear.weight, settings, device)
        if not _reads_back(weight):
            continue
        packed = _bitsandbytes().nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=getattr(torch, settings.compute_dtype),
            compress_statistics=settings.double_quantization,
            quant_type=settings.quantization,
            device="meta",
        )
        packed.weight, weight.module = weight, packed
        packed.bias = linear.bias
        # On some CPUs it would repack the weights in the first evaluation, in a format that training cannot read.
        packed.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(host.get_submodule(parent), last, packed.train(linear.training))


def packable(model: Model) -> list[str]:
    """Return the names, in the adapter host, of the layers that `quantize` replaces: the linear ones of all blocks."""
    inside = {id(module) for block in model.blocks for module in block.modules() if type(module) is nn.Linear}
    return [name for name, module in model.adapter_host.named_modules() if id(module) in inside]


def through_four_bits(weight: Tensor, settings: AdapterSettings) -> Tensor:
    """Return a weight quantized to 4 bits and dequantized: `[out, in]`, in the same type."""
    packed = _packed(weight, settings, weight.device)
    return dequantize(packed) if _reads_back(packed) else weight


def _packed(weight: Tensor, settings: AdapterSettings, device: torch.device | str) -> Any:
    """Return the weight of a 4-bit layer."""
    packed = _bitsandbytes().nn.Params4bit(
        weight.detach(),
        requires_grad=False,
        compress_statistics=settings.double_quantization,
        quant_type=settings.quantization,
    )
    return packed.to(device)  # which quantizes it


def _reads_back(packed: Any) -> bool:
    """Return whether a 4-bit weight is dequantized to the same values as a matrix and as a single row."""
    row = copy(packed.quant_state)
    row.shape = torch.Size((1, row.shape.numel()))
    flat = _bitsandbytes().functional.dequantize_4bit(packed.data, row)
    return torch.equal(dequantize(packed).flatten(), flat.flatten())


def dequantize(weight: Tensor) -> Tensor:
    """Return a 4-bit weight as `float[out, in]`; any other weight unchanged."""
    state = getattr(weight, "quant_state", None)
    return weight.detach() if state is None else _bitsandbytes().functional.dequantize_4bit(weight.data, state)


# ---- files


def save(folder: Path, model: Model, base: str, weights: Mapping[str, Tensor]) -> None:
    """Write peft's two files, with the trained `weights` by parameter name, unsharded."""
    named = {peft_name(model.saved_name(name)): weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS)
    host = model.adapter_host
    config = host.peft_config[NAME].to_dict()  # type: ignore[index, union-attr]
    modules = {model.saved_name(name).rpartition(".")[0] for name in weights if "lora_" not in name}
    # A module with weights of its own and submodules (Idefics2's resampler) is listed once, without the submodules.
    outermost = sorted(name for name in modules if not any(name.startswith(f"{other}.") for other in modules))
    config |= {
        "base_model_name_or_path": base,
        "target_modules": sorted(config["target_modules"]),
        "modules_to_save": outermost or None,
        "inference_mode": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, default=_plain) + "\n", encoding="utf-8")


def load(folder: Path, model: Model) -> None:
    """Load saved weights into a model with adapters of the same settings.

    Raises:
        InputError: the file is missing or broken, or belongs to another model.
    """
    path = weights_file(folder)
    try:
        saved = {peft_name(name): weight for name, weight in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy or save the adapter again") from error
    here = {peft_name(model.saved_name(name)): (name, parameter) for name, parameter in model.named_parameters()}
    missing = sorted(name for name in here if "lora_" in name and name not in saved)
    odd = sorted(saved.keys() - here.keys())
    if missing or odd:
        reason = f"it holds nothing for {missing[0]}" if missing else f"there is no {odd[0]} here"
        raise InputError(f"{path} is of another model: {reason}")
    keep_float32(model, {model.part_of(here[name][0]) for name in saved if "lora_" not in name})
    for name, weight in saved.items():
        parameter = here[name][1]
        if parameter.shape != weight.shape:
            raise InputError(
                f"{path} is of another model: {name} has shape {tuple(weight.shape)}, here {tuple(parameter.shape)}"
            )
        parameter.data = weight.to(parameter.device, parameter.dtype)


def _chosen(model: Model, patterns: Sequence[str]) -> dict[str, str]:
    """Return the linear layers that the patterns match: their paths, and their names in the adapter host.

    An output head that is tied to the input embedding is left out: its adapter could not be merged.
    """
    embedding: Any = model.get_input_embeddings()
    linears = {
        model.module_path(name): name
        for name, module in model.adapter_host.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not embedding.weight
    }
    chosen: dict[str, str] = {}
    for pattern in patterns:
        found = {path: name for path, name in linears.items() if fnmatchcase(path, pattern)}
        if not found:
            kinds = sorted(set(map(_kind, linears)))
            more = f" and {len(kinds) - 12} more kinds" if len(kinds) > 12 else ""
            raise InputError(
                f"adapt.targets: {pattern} matches no linear layer{suggest(pattern, kinds)}; "
                f"there are {', '.join(kinds[:12])}{more}"
            )
        chosen |= found
    return chosen


def _kind(path: str) -> str:
    """Return a module's path with `*` for the numbers of blocks."""
    return ".".join("*" if word.isdigit() else word for word in path.split("."))


def weights_file(folder: Path) -> Path:
    """Return the file of a saved adapter's weights: in a training checkpoint it has the name used for all models."""
    checkpoint = folder / MODEL_WEIGHTS
    return checkpoint if checkpoint.is_file() else folder / WEIGHTS


def peft_name(name: str) -> str:
    """Return a parameter's name in peft's file, given its name in a file of weights or in peft's file."""
    if name.startswith(PEFT_PREFIX):
        return name
    return PEFT_PREFIX + name.replace(f".{NAME}.", ".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _plain(value: Any) -> Any:
    """Convert a value of peft's config to JSON."""
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _imported(package: str, setting: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{setting} needs {package}; install it with: pip install 'vlmvqa[adapters]'") from error


def _bitsandbytes() -> Any:
    return _imported("bitsandbytes", "adapt.bits=4")
