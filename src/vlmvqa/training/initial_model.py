"""Training that continues from a saved model (`init_from`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlmvqa import fingerprint
from vlmvqa.config.schema import TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import DTYPES, cast_parameters
from vlmvqa.models.trained_model import TrainedModel, load_model


def with_saved_model(config: TrainConfig) -> TrainConfig:
    """Return the config with the model settings that the model of `init_from` was saved with.

    Raises:
        InputError: there is no such model, or the command chooses another or sets a key of it other than model.dtype.
    """
    assert config.init_from is not None
    for key in sorted(config.given):
        if key == "model":
            raise InputError(
                "model= cannot be set together with init_from=, whose model is as it was saved; leave it out, or "
                "choose the trainer's settings of a model with trainer=<its name>"
            )
        if key.startswith("model.") and key != "model.dtype":
            raise InputError(f"{key} cannot be set here: the model of init_from is as it was saved; leave it out")
    folder = checkpoint.find(config.init_from).resolve()
    _, settings = checkpoint.read_settings(folder)
    settings = checkpoint.family(settings.family).continued_settings(settings, folder)
    if config.adapt is not None or "model.dtype" in config.given:  # frozen weights may be kept in fewer bytes
        if config.model.dtype not in DTYPES:
            raise InputError(f"model.dtype={config.model.dtype} is unknown; use one of {', '.join(DTYPES)}")
        settings = replace(settings, dtype=config.model.dtype)
    # A hub id stays one: what is trained from it can then be loaded on another machine.
    init_from = str(folder) if Path(config.init_from).exists() else config.init_from
    return replace(config, model=settings, init_from=init_from)


def continue_from(config: TrainConfig) -> TrainedModel:
    """Load the model of `init_from`, with the data and decoding settings of this run."""
    assert config.init_from is not None
    data, folder = config.data, checkpoint.find(config.init_from)
    found = load_model(folder)
    processor = replace(found.processor, max_text_tokens=data.max_text_tokens)
    processor = processor.with_images(resize=data.resize, reduced=data.reduced_decoding, tiles=data.tiles)
    return replace(
        found,
        model=cast_parameters(found.model, DTYPES[config.model.dtype]),
        settings=replace(found.settings, dtype=config.model.dtype),
        processor=processor,
        prompt=data.prompt,
        prompts={**found.prompts, **data.prompts},
        decoding=config.decoding,
        started_from={"model": config.init_from, "weights": fingerprint.weights_in(folder)},
    )
