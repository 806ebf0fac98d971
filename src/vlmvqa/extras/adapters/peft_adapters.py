"""Adapters: small trained matrices beside the frozen ones of a base model, which may be kept in 4 bits.

    y = W x  +  scale * B (A x)        LoRA (Hu et al. 2021); DoRA (Liu et al. 2024) learns the norm of rows too

The layers are peft's and bitsandbytes'; what is ours is which modules get them, checked against what was asked for, and
the folder they leave:

adapter_config.json, adapter_model.safetensors   as peft reads them, over the same base
config.json                                      the base, with its fingerprint, and what `checkpoint.py` keeps
"""

from __future__ import annotations

import json
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

from vlmvqa.errors import InputError, suggest
from vlmvqa.extras.pretrained.model import PREFIX, PretrainedVLM
from vlmvqa.models.model_folder import WEIGHTS as MODEL_WEIGHTS
from vlmvqa.models.vlm import VLM, set_trainable
from vlmvqa.settings import build_settings

METHODS = ("lora", "dora")
NAME = "default"  # peft's name of the one adapter there is
WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."  # before the names of weights in peft's files
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSettings:
    """The `adapt` group.

    Attributes:
        method: "lora" or "dora".
        rank: columns of B, rows of A.
        alpha: what they are scaled by, over the rank.
        dropout: of what goes into A.
        targets: patterns of the linear layers that get adapters, as paths that begin with vision, projector or
            language; `*` stands for anything.
        bits: 4 to keep the linear layers of all blocks in 4 bits (null: as they are).
        quantization: of these, "nf4" or "fp4" (Dettmers et al. 2023).
        double_quantization: whether the scales are quantised too, 0.37 bits a weight.
        compute_dtype: what 4-bit weights are multiplied in.
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


def prepare(
    model: VLM | PretrainedVLM,
    trainable: Mapping[str, str | int],
    settings: AdapterSettings | None,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Let a model train as its run says: its parts as `trainable` does, or frozen beside adapters but for whole parts.

    Args:
        trainable: of each part, as `set_trainable` takes it.
        settings: of the adapters; None: there are none.
        device: where 4-bit weights are made.

    Returns:
        the paths of the modules that got an adapter.

    Raises:
        InputError: as `attach`.
    """
    paths = [] if settings is None else attach(model, settings, device)
    chosen = {part: choice for part, choice in trainable.items() if settings is None or choice == "all"}
    for part, choice in chosen.items():
        set_trainable(model.part(part), choice, part)
    if settings is not None:
        keep_float32(model, chosen)
    return paths


def attach(model: VLM | PretrainedVLM, settings: AdapterSettings, device: torch.device | str = "cpu") -> list[str]:
    """Freeze a model, quantise it where that is asked for, and give the modules that the targets name adapters.

    Args:
        device: where 4-bit weights are made; the others stay where they are.

    Returns:
        the paths of the modules that got one.

    Raises:
        InputError: peft or bitsandbytes is not installed, a pattern matches nothing, or something else got adapters.
    """
    peft = _peft()
    host = _host(model)
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
        if "lora_" in name:  # peft gives them the base's type, in which a small step is rounded away
            parameter.data = parameter.data.float()
    got = {name for name, module in host.named_modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)}
    wrong = sorted(got ^ set(paths.values()))
    if wrong:
        raise InputError(
            f"adapt.targets: {wrong[0]} {'got' if wrong[0] in got else 'did not get'} an adapter, which was "
            "not asked for; please report it with the command"
        )
    return list(paths)


def keep_float32(model: VLM | PretrainedVLM, parts: Collection[str]) -> None:
    """Keep parts that train whole beside adapters in float32, as these are, whatever type their base is of."""
    for part in parts:
        for parameter in model.part(part).parameters:
            parameter.data = parameter.data.float()
    if parts and len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1:
        for module in (model.vision, model.projector):
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _cast_inputs(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a part is given, in its own type: transformers hands features on in that of the part before it."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, given)), {name: cast(value) for name, value in named.items()}


def describe(model: VLM | PretrainedVLM, settings: AdapterSettings, paths: Sequence[str]) -> str:
    """Which modules got adapters, how many parameters these have, and what the base takes."""
    kinds: dict[str, int] = {}
    for path in paths:
        kind = ".".join("*" if piece.isdigit() else piece for piece in path.split("."))
        kinds[kind] = kinds.get(kind, 0) + 1
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    lines = [f"{settings.method} of rank {settings.rank}, alpha {settings.alpha:g}: {adapters:,} parameters beside"]
    lines += [f"  {count:>4} x {kind}" for kind, count in kinds.items()]
    if settings.bits == 4:
        packed: list[Any] = [module for module in model.modules() if hasattr(module, "quant_storage")]
        numel = sum(module.in_features * module.out_features for module in packed)
        lines.append(f"  over {len(packed)} linear layers in {settings.quantization}, {numel:,} parameters of the base")
        host: Any = _host(model)
        whole = sorted({host.get_submodule(name).in_features for name in packable(model) if "lora_" not in name})
        if whole:
            widths = ", ".join(map(str, whole))
            lines.append(f"  layers of width {widths} stay whole: 4 bits of them cannot be read back on this device")
    return "\n".join(lines)


# ---- 4 bits


def quantize(model: VLM | PretrainedVLM, settings: AdapterSettings, device: torch.device | str = "cpu") -> None:
    """Keep the linear layers of all blocks in 4 bits, in place: one at a time, so that little is there twice.

    What cannot be read back stays whole: bitsandbytes 0.50 mixes up the scales of a layer whose width is no multiple of
    64 on CPUs with AVX-512.
    """
    bitsandbytes = _bitsandbytes()
    dtype = getattr(torch, settings.compute_dtype)
    host = _host(model)
    for name in packable(model):
        linear: Any = host.get_submodule(name)
        weight = _packed(linear.weight, settings, None).to(device)
        if not _reads_back(weight):
            continue
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=settings.double_quantization,
            quant_type=settings.quantization,
            device="meta",
        )
        packed.weight, weight.module = weight, packed
        packed.bias = linear.bias
        # On some CPUs it would repack the weights at the first answer, in a way that training cannot read.
        packed.support_avx512bf16_for_cpu = False
        parent, _, last = name.rpartition(".")
        setattr(host.get_submodule(parent), last, packed.train(linear.training))


def packable(model: VLM | PretrainedVLM) -> list[str]:
    """The layers that are kept in 4 bits where any are, by their names in the base: the linear ones of all blocks."""
    inside = {id(module) for block in model.blocks for module in block.modules() if type(module) is nn.Linear}
    return [name for name, module in _host(model).named_modules() if id(module) in inside]


def through_four_bits(weight: Tensor, settings: AdapterSettings) -> Tensor:
    """What a weight is multiplied as once it is kept in 4 bits: `[out, in]`, of the same type."""
    packed = _packed(weight, settings, None).to(weight.device)
    return dequantize(packed) if _reads_back(packed) else weight


def _packed(weight: Tensor, settings: AdapterSettings, module: Any) -> Any:
    """The weight of a 4-bit layer, packed as soon as it is moved to a device."""
    return _bitsandbytes().nn.Params4bit(
        weight.detach(),
        requires_grad=False,
        compress_statistics=settings.double_quantization,
        quant_type=settings.quantization,
        module=module,
    )


def _reads_back(packed: Any) -> bool:
    """Whether a 4-bit weight comes out the same whether it is read as a matrix or as one row."""
    row = copy(packed.quant_state)
    row.shape = torch.Size((1, row.shape.numel()))
    flat = _bitsandbytes().functional.dequantize_4bit(packed.data, row)
    return torch.equal(dequantize(packed).flatten(), flat.flatten())


def dequantize(weight: Tensor) -> Tensor:
    """A 4-bit weight as it is multiplied with: `float[out, in]`; any other as it is."""
    state = getattr(weight, "quant_state", None)
    return weight.detach() if state is None else _bitsandbytes().functional.dequantize_4bit(weight.data, state)


# ---- files


def save(folder: Path, model: VLM | PretrainedVLM, base: str, weights: Mapping[str, Tensor]) -> None:
    """Write peft's two files.

    Args:
        base: the base's hub id or folder.
        weights: all that trains, whole, by their names in the model.
    """
    save_file({peft_name(name): weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
    host = _host(model)
    config = host.peft_config[NAME].to_dict()  # type: ignore[index, union-attr]
    whole = {name.removeprefix(PREFIX).rpartition(".")[0] for name in weights if "lora_" not in name}
    # A module that holds a weight of its own beside others (Idefics2's resampler) is saved with all that is in it.
    outermost = sorted(name for name in whole if not any(name.startswith(f"{other}.") for other in whole))
    config |= {
        "base_model_name_or_path": base,
        "target_modules": sorted(config["target_modules"]),
        "modules_to_save": outermost or None,
        "inference_mode": True,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, default=_plain) + "\n", encoding="utf-8")


def load(folder: Path, model: VLM | PretrainedVLM) -> None:
    """Put saved weights into a model that has adapters of the same settings.

    Raises:
        InputError: the file is missing or broken, or holds other weights than these.
    """
    path = weights_file(folder)
    try:
        saved = {peft_name(name): weight for name, weight in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy or save the adapter again") from error
    here = dict(model.named_parameters())
    expected = {peft_name(name): name for name in here if "lora_" in name}
    named = {peft_name(name): name for name in here}
    missing, odd = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - named.keys())
    if missing or odd:
        raise InputError(
            f"{path} is of another model: "
            + (f"it holds nothing for {missing[0]}" if missing else f"there is no {odd[0]} here")
        )
    keep_float32(model, {model.part_of(named[name]) for name in saved if "lora_" not in name})
    with torch.no_grad():
        for name, weight in saved.items():
            parameter = here[named[name]]
            if parameter.shape != weight.shape:
                raise InputError(
                    f"{path} is of another model: {name} has shape {tuple(weight.shape)}, here {tuple(parameter.shape)}"
                )
            parameter.data = weight.to(parameter.device, parameter.dtype)


def _chosen(model: VLM | PretrainedVLM, patterns: Sequence[str]) -> dict[str, str]:
    """The linear layers that the patterns name: their paths, and their names in the host.

    A head whose weight is the input embedding's is none of them: what it learns could not be merged.
    """
    embedding: Any = model.get_input_embeddings()
    linears = {
        path_of(model, name): name
        for name, module in _host(model).named_modules()
        if isinstance(module, nn.Linear) and module.weight is not embedding.weight
    }
    chosen: dict[str, str] = {}
    for pattern in patterns:
        found = {path: name for path, name in linears.items() if fnmatchcase(path, pattern)}
        if not found:
            kinds = sorted(
                {".".join("*" if piece.isdigit() else piece for piece in path.split(".")) for path in linears}
            )
            near = suggest(pattern, kinds)
            raise InputError(
                f"adapt.targets: {pattern} matches no linear layer{near}; there are {', '.join(kinds[:12])}"
                + (f" and {len(kinds) - 12} more kinds" if len(kinds) > 12 else "")
            )
        chosen |= found
    return chosen


def path_of(model: VLM | PretrainedVLM, name: str) -> str:
    """A module's path, the same for every model: its part, and its place in it."""
    if not isinstance(model, PretrainedVLM):
        return name
    for part in ("vision", "projector", "language"):
        inside = model.places[part] + "."
        if name.startswith(inside):
            return f"{part}.{name.removeprefix(inside)}"
    return f"language.{name}"


def _host(model: VLM | PretrainedVLM) -> nn.Module:
    """The module whose names peft's files use."""
    return model.net if isinstance(model, PretrainedVLM) else model


def weights_file(folder: Path) -> Path:
    """Return the file of a saved adapter's weights: a training checkpoint has one name for all models."""
    checkpoint = folder / MODEL_WEIGHTS
    return checkpoint if checkpoint.is_file() else folder / WEIGHTS


def peft_name(name: str) -> str:
    """Return a parameter's name in peft's file, of its name in the model, in a checkpoint or in that file."""
    if name.startswith(PEFT_PREFIX):
        return name
    return PEFT_PREFIX + name.removeprefix(PREFIX).replace(f".{NAME}.", ".").replace(
        "lora_magnitude_vector.weight", "lora_magnitude_vector"
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("adapt needs peft; install it with: pip install 'vlmvqa[adapters]'") from error
    return peft


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError("adapt.bits=4 needs bitsandbytes; install it with: pip install 'vlmvqa[adapters]'") from error
    return bitsandbytes
