"""Find and load saved models (`checkpoint.py` writes them)."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from vlmvqa.config.compose import build_settings
from vlmvqa.data.processor import Processor
from vlmvqa.errors import InputError
from vlmvqa.models.checkpoint import CONFIG, FORMAT, OURS, ProcessingClass, family, family_of
from vlmvqa.models.interface import DTYPES, GenerationSettings, Model, Settings
from vlmvqa.models.trained_model import BARE, TrainedModel
from vlmvqa.paths import EXPECTED, is_hub_id, missing_model


def load_model(path_or_hub_id: str | Path, device: str = "cpu", dtype: str = "saved") -> TrainedModel:
    """Load a model from a run's folder, its `model/` folder, one of its checkpoints, or a hub id.

    Args:
        dtype: data type of the weights, as in `answering_dtype`.
    """
    folder = find(path_or_hub_id)
    model, settings, text, config = load(folder, device, dtype)
    decoding = build_settings(GenerationSettings, config.get("decoding", {}), "config.json: decoding")
    more = {"prompts": config.get("prompts", {}), "started_from": config.get("started_from"), "folder": folder}
    processor: Processor = family(settings.family).make_processor(text, model, config)
    if "adapter" in config:
        from vlmvqa.extras.adapters.peft_adapters import Adapter

        more["adapter"] = build_settings(Adapter, config["adapter"], "config.json: adapter")
    return TrainedModel(model, processor, config.get("prompt", BARE), settings, decoding, **more)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a saved model's `config.json`."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} is not readable JSON ({error}); save or copy the model again") from error
    return config


def read_settings(folder: Path) -> tuple[dict[str, Any], Settings]:
    """Return vlmvqa's entries of a saved model's `config.json`, and the settings that build the model.

    Raises:
        InputError: the file is neither vlmvqa's nor transformers'.
    """
    config = read_config(folder)
    if config.get("model_type", OURS) != OURS:
        return family("pretrained").saved_settings(folder, config)
    if config.get("format") != FORMAT:
        raise InputError(
            f"{folder / CONFIG} is neither of vlmvqa (format {FORMAT}) nor of a model of transformers (no model_type); "
            f"{EXPECTED}"
        )
    return family_of(config["model"]).saved_settings(folder, config)


def load(
    path_or_hub_id: str | Path, device: str = "cpu", dtype: str = "saved"
) -> tuple[Model, Settings, ProcessingClass, dict[str, Any]]:
    """Load a model.

    Args:
        path_or_hub_id: a folder, or a hub id if no such folder exists. Both may be of a model of transformers that was
            never trained here.
        dtype: data type of the weights, as in `answering_dtype`.

    Returns:
        The model, its settings, its tokenizer (or a pretrained model's processor), and vlmvqa's entries of config.json.

    Raises:
        InputError: no such folder or hub id, or the folder is not a complete saved model.
    """
    folder = find(path_or_hub_id)
    config, settings = read_settings(folder)
    own = family(settings.family)
    loaded_in = answering_dtype(dtype, settings.dtype, device)
    if "adapter" in config:
        from vlmvqa.extras.adapters.saved import load_adapter

        model = load_adapter(folder, config, device, loaded_in)
    else:
        model = own.load(folder, dataclasses.replace(settings, dtype=loaded_in), config)
    return model.to(device).eval(), settings, own.load_processing_class(folder), config


def stored_base(folder: Path, base: str) -> Path | None:
    """Return the folder of a base that is named relative to its adapter's folder; None for other names."""
    return (folder / base).resolve() if base.startswith(".") else None


def find(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a saved model: a run's `model/` (or newest checkpoint), the folder itself, or a download.

    Raises:
        InputError: there is no saved model.
    """
    folder = Path(path_or_hub_id).expanduser()
    for found in (folder / "model", folder):
        if (found / CONFIG).is_file():
            return found
    if folder.exists():
        return _newest_checkpoint(folder)
    if is_hub_id(str(path_or_hub_id)):
        from vlmvqa.hub import download

        return download(str(path_or_hub_id))
    raise InputError(f"{missing_model(folder.absolute())}; {EXPECTED}")


def _newest_checkpoint(folder: Path) -> Path:
    """Return the newest undamaged checkpoint of a run without `model/`, and print its name."""
    from vlmvqa import ranks
    from vlmvqa.training.checkpoints import newest_intact

    checkpoint, complaints = newest_intact(folder)
    if checkpoint is None or not (checkpoint / CONFIG).is_file():
        reason = f"no checkpoint is complete ({complaints[0]})" if complaints else _why_not(checkpoint or folder)
        raise InputError(f"{checkpoint or folder} is not a saved model: {reason}; {EXPECTED}")
    if ranks.is_first():
        print(*complaints, f"{folder} has no model/ yet: loading {checkpoint}", sep="\n", file=sys.stderr)
    return checkpoint


def _why_not(path: Path) -> str:
    """Return a clause that describes an existing path without `config.json`."""
    if path.is_file():
        return "it is a file"
    if not any(path.iterdir()):
        return "it is an empty folder"
    if (path / "files.json").is_file():
        return f"it is a checkpoint without {CONFIG}, of an older version; resume its run with resume=auto"
    if (path / "run.json").is_file():
        return "it is a run without model/ and without a checkpoint; resume it with resume=auto"
    return f"it holds no {CONFIG}"


def answering_dtype(choice: str, saved: str, device: str | torch.device) -> str:
    """Return the data type of the weights of a model that answers questions, a key of `DTYPES`.

    Args:
        choice: a key of `DTYPES`; "saved"; or "auto": bfloat16 for float32 weights on a GPU that computes in it, else
            `saved`.
        saved: data type in which the weights are saved or trained.
        device: where the model runs.

    Raises:
        InputError: unknown choice.
    """
    if choice in DTYPES:
        return choice
    if choice not in ("auto", "saved"):
        raise InputError(f"dtype={choice} is unknown; use auto, saved, {', '.join(DTYPES)}")
    if choice == "saved" or saved != "float32" or torch.device(device).type != "cuda":
        return saved
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else saved
