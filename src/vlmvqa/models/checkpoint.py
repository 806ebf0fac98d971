"""A trained model as one folder, enough without the original weights.

config.json          settings of the model (the decoder's whole config with them), and `extra`
model.safetensors    every weight
tokenizer/           as transformers saves it
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights

from vlmvqa.errors import InputError
from vlmvqa.models.language import LanguageModel
from vlmvqa.models.saved import CONFIG, TOKENIZER, WEIGHTS, find
from vlmvqa.models.vision import VisionEncoder
from vlmvqa.models.vlm import DTYPES, VLM, ModelSettings, assemble
from vlmvqa.settings import build_settings

FORMAT = 1


def save(
    folder: Path, model: VLM, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, extra: dict[str, Any]
) -> None:
    """Write the folder; `config.json` comes last, so that a folder that has it is whole.

    Args:
        settings: what the model was built from.
        extra: what else goes into `config.json` (image settings, prompt).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    save_file(model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    describe(folder, model.language.config, settings, tokenizer, extra)


def describe(
    folder: Path,
    language_config: PreTrainedConfig,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    extra: dict[str, Any],
) -> None:
    """All of the folder but the weights, which are there already: a sharded model's come from its trainer."""
    tokenizer.save_pretrained(folder / TOKENIZER)
    config = {
        "format": FORMAT,
        "model": dataclasses.asdict(settings),
        "language_config": language_config.to_dict(),
        "versions": {"torch": torch.__version__, "transformers": transformers_version},
        **extra,
    }
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2, default=str) + "\n")
    partial.replace(folder / CONFIG)


def blank(settings: ModelSettings, language_config: PreTrainedConfig) -> VLM:
    """A model whose weights are still to be filled in."""
    with no_init_weights():
        vision = VisionEncoder(dataclasses.replace(settings.vision, weights="random"))
        causal_lm = AutoModelForCausalLM.from_config(language_config, dtype=DTYPES[settings.dtype])
    return assemble(vision, LanguageModel(causal_lm, settings.language.attention, settings.language.loss), settings)


def load(
    path_or_hub_id: str | Path, device: str = "cpu"
) -> tuple[VLM, ModelSettings, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model, its settings, tokenizer and `config.json` from a folder, or from a hub id where no such folder exists.

    Raises:
        InputError: no such folder or hub id, or the folder is not a whole saved model.
    """
    folder = find(path_or_hub_id)
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} is not readable JSON ({error}); save or copy the model again") from error
    if config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG}: not a config of vlmvqa, format {FORMAT}; name the model/ folder of a run")
    settings = build_settings(ModelSettings, config["model"], f"{folder / CONFIG}: model")
    language_config = dict(config["language_config"])
    model = blank(settings, AutoConfig.for_model(language_config.pop("model_type"), **language_config))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder / WEIGHTS} does not hold this model's weights ({str(error).splitlines()[0]})"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    return model.to(device).eval(), settings, tokenizer, config
