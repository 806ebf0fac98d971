"""A trained model as one folder, enough without the original weights.

config.json          settings of the model (the decoder's whole config with them), and `extra`
model.safetensors    every weight
tokenizer/           as transformers saves it; of a pretrained model, whose folder transformers reads too, its
                     processor's files lie beside the others
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights

from vlmvqa import fingerprint
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.extras.pretrained.model import (
    PREFIX,
    PretrainedSettings,
    PretrainedVLM,
    build_pretrained,
    pretrained_config,
)
from vlmvqa.hub import OWN_CODE, unread
from vlmvqa.models.language import LanguageModel
from vlmvqa.models.model_folder import CONFIG, TOKENIZER, WEIGHTS, find, kept_base
from vlmvqa.models.vision import VisionEncoder
from vlmvqa.models.vlm import DTYPES, VLM, ModelSettings, assemble, cast_parameters
from vlmvqa.paths import EXPECTED
from vlmvqa.settings import build_settings

FORMAT = 1
OURS = "vlmvqa"  # the entry of a transformers config that holds what we add to it

Model = VLM | PretrainedVLM
Settings = ModelSettings | PretrainedSettings
Text = Any  # PreTrainedTokenizerBase, or a pretrained model's ProcessorMixin


def save(
    folder: Path,
    model: Model,
    settings: Settings,
    text: Text,
    extra: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder; `config.json` comes last, so that a folder that has it is whole.

    Args:
        settings: what the model was built from.
        text: its tokenizer, or a pretrained model's processor.
        extra: what else goes into `config.json` (image settings, prompt).
        weights: these in place of the model's, by the same names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    named = dict(model.named_parameters()) if weights is None else weights
    save_file(
        {saved_name(name): weight.detach().contiguous() for name, weight in named.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    describe(folder, model, settings, text, extra)


def saved_name(name: str) -> str:
    """What a parameter is called in the file of weights: a pretrained model's as its library calls it."""
    return name.removeprefix(PREFIX)


@dataclass(frozen=True)
class Adapter:
    """What a saved adapter lies over.

    Attributes:
        settings: of the adapters.
        base: a hub id or folder; one that begins with "." is seen from the adapter's folder.
        fingerprint: of the base's weights (`fingerprint.weights_in`).
    """

    settings: AdapterSettings
    base: str
    fingerprint: str


def describe(
    folder: Path, model: Model, settings: Settings, text: Text, extra: dict[str, Any], adapter: Adapter | None = None
) -> None:
    """All of the folder but the weights, which are there already: a sharded model's come from its trainer.

    A pretrained model's folder is what transformers reads too: its own config, and ours as one entry of it. That of
    adapters is one that peft reads.
    """
    versions = {"torch": torch.__version__, "transformers": transformers_version}
    config = {"format": FORMAT, "model": dataclasses.asdict(settings), "versions": versions, **extra}
    text.save_pretrained(folder if isinstance(model, PretrainedVLM) else folder / TOKENIZER)
    if adapter is not None:
        config |= {"adapter": dataclasses.asdict(adapter)}
    elif isinstance(model, PretrainedVLM):
        model.net.generation_config.save_pretrained(folder)
        known = model.net.config.to_dict()
        # A cast leaves the config's own type as it was.
        own = {"architectures": [type(model.net).__name__], "dtype": settings.dtype}
        config = {**known, **own, OURS: config}
    else:
        config |= {"language_config": model.language.config.to_dict()}
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2, default=str) + "\n")
    partial.replace(folder / CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """A saved model's `config.json`."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} is not readable JSON ({error}); save or copy the model again") from error
    return config


def read_settings(folder: Path) -> tuple[dict[str, Any], Settings]:
    """What was saved with a model besides its weights, and what it is built from: a pretrained one from this folder."""
    config = read_config(folder)
    if "model_type" in config:
        known = config.get(OURS, {})
        where = f"{folder / CONFIG}: {OURS}.model"
        settings = build_settings(PretrainedSettings, known.get("model", {"pretrained": str(folder)}), where)
        return known, dataclasses.replace(
            settings, pretrained=str(folder), weights="hub", overrides={}, image_splitting=None
        )
    if config.get("format") != FORMAT:
        raise InputError(
            f"{folder / CONFIG} is neither of vlmvqa (format {FORMAT}) nor of a model of transformers (no model_type); "
            f"{EXPECTED}"
        )
    where = f"{folder / CONFIG}: model"
    if "pretrained" in config["model"]:
        return config, build_settings(PretrainedSettings, config["model"], where)
    return config, build_settings(ModelSettings, config["model"], where)


def blank_like(model: Model, settings: Settings) -> Model:
    """A model as this one was built, whose weights are still to be filled in."""
    if isinstance(model, PretrainedVLM):
        assert isinstance(settings, PretrainedSettings)
        with no_init_weights():
            return build_pretrained(settings, deepcopy(model.net.config), blank=True)
    assert isinstance(settings, ModelSettings)
    return blank(settings, deepcopy(model.language.config))


def blank(settings: ModelSettings, language_config: PreTrainedConfig) -> VLM:
    """Our own model, whose weights are still to be filled in."""
    with no_init_weights():
        vision = VisionEncoder(dataclasses.replace(settings.vision, weights="random"))
        causal_lm = AutoModelForCausalLM.from_config(language_config, dtype=DTYPES[settings.dtype])
    return assemble(vision, LanguageModel(causal_lm, settings.language.attention, settings.language.loss), settings)


def load(path_or_hub_id: str | Path, device: str = "cpu") -> tuple[Model, Settings, Text, dict[str, Any]]:
    """Model, its settings, its tokenizer (a pretrained model's processor) and what was saved with them.

    Args:
        path_or_hub_id: a folder, or a hub id where no such folder exists; of a model of transformers, also one that
            was never trained here, of which nothing is known besides.

    Raises:
        InputError: no such folder or hub id, or the folder is not a whole saved model.
    """
    folder = find(path_or_hub_id)
    config, settings = read_settings(folder)
    if "adapter" in config:
        model, text = _with_adapters(folder, config, device)
        return model, settings, text, config
    if isinstance(settings, PretrainedSettings):
        net = build_pretrained(settings, pretrained_config(settings))
        return net.to(device).eval(), settings, load_processor(str(folder)), config
    language_config = dict(config["language_config"])
    model = blank(settings, AutoConfig.for_model(language_config.pop("model_type"), **language_config))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder / WEIGHTS} does not hold this model's weights ({str(error).splitlines()[0]})"
        ) from error
    return model.to(device).eval(), settings, _tokenizer(folder), config


def base_of(folder: Path, adapter: Mapping[str, Any]) -> Path:
    """The folder of the base that a saved adapter lies over, checked to be the one it was trained on.

    Raises:
        InputError: it is not there, or it is another.
    """
    base = str(adapter["base"])
    where = find(str(kept_base(folder, base) or base))
    found, asked = fingerprint.weights_in(where), adapter["fingerprint"]
    if found != asked:
        raise InputError(
            f"{folder} was trained over other weights than {where} holds now ({asked[:12]}, "
            f"not {found[:12]}); put back the base it was trained on"
        )
    return where


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The one that was saved with a model of ours."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / TOKENIZER, **OWN_CODE)
    except (OSError, ValueError) as error:
        raise unread(f"the tokenizer of {folder}", error) from error
    return tokenizer


def _with_adapters(folder: Path, config: Mapping[str, Any], device: str) -> tuple[Model, Text]:
    """A base with the adapters that a folder holds."""
    base = base_of(folder, config["adapter"])
    model, settings, _, about = load(base)
    if "adapter" in about:
        raise InputError(f"{folder} lies over {base}, which is an adapter itself; merge that into its base first")
    here = build_settings(AdapterSettings, config["adapter"]["settings"], f"{folder / CONFIG}: adapter.settings")
    model = cast_parameters(model, DTYPES[config["model"]["dtype"]])
    peft_adapters.attach(model, here, device)
    peft_adapters.load(folder, model)
    pretrained = isinstance(settings, PretrainedSettings)
    text = load_processor(str(folder)) if pretrained else _tokenizer(folder)
    return model.to(device).eval(), text
