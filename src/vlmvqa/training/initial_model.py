"""Training that starts from saved models (`init_from`): from one model, or from parts of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from vlmvqa import fingerprint
from vlmvqa.config.schema import TrainConfig
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError, suggest
from vlmvqa.models import checkpoint, loading
from vlmvqa.models.interface import DTYPES, PARTS, Model, cast_parameters
from vlmvqa.models.trained_model import TrainedModel, build_model
from vlmvqa.models.vlm import VLM, ModelSettings

MODEL = "model"


def named_sources(value: str | Mapping[str, str | None], given: Iterable[str] = ()) -> dict[str, str] | None:
    """Return the saved models of `init_from` by `model` or part; a plain value is `model`.

    Args:
        given: the keys that the command line sets.

    Raises:
        InputError: there is no such part, or the model is given twice.
    """
    if "init_from" in given and (parts := [key for key in given if key.startswith("init_from.")]):
        raise InputError(f"init_from= cannot be set together with {parts[0]}=; write the first as init_from.model=")
    named = value if isinstance(value, Mapping) else {MODEL: value}
    for name in named:
        if name not in (MODEL, *PARTS):
            known = (MODEL, *PARTS)
            raise InputError(f"init_from has no key '{name}'{suggest(name, known)} (known: {', '.join(known)})")
    return {name: str(source) for name, source in named.items() if source is not None} or None


def with_saved_model(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute paths, and with the model settings that the model of `init_from` was saved with.

    Raises:
        InputError: there is no such model, or the command chooses another or sets a key of it other than model.dtype.
    """
    assert config.init_from is not None
    folders = {name: loading.find(source).resolve() for name, source in config.init_from.items()}
    settings = config.model
    if MODEL in folders:
        for key in sorted(config.given):
            if key.split("/")[0] == "model":
                raise InputError(
                    f"{key}= cannot be set together with init_from=, whose model is as it was saved; leave it out, or "
                    "choose the trainer's settings of a model with trainer=<its name>"
                )
            if key.startswith("model.") and key != "model.dtype":
                raise InputError(f"{key} cannot be set here: the model of init_from is as it was saved; leave it out")
        _, settings = loading.read_settings(folders[MODEL])
        settings = checkpoint.family(settings.family).continued_settings(settings, folders[MODEL])
        if config.adapt is not None or "model.dtype" in config.given:  # frozen weights may be kept in fewer bytes
            if config.model.dtype not in DTYPES:
                raise InputError(f"model.dtype={config.model.dtype} is unknown; use one of {', '.join(DTYPES)}")
            settings = replace(settings, dtype=config.model.dtype)
    parts = [folder for name, folder in folders.items() if name != MODEL]
    models = [settings, *(loading.read_settings(folder)[1] for folder in parts)] if parts else []
    if not all(isinstance(one, ModelSettings) for one in models):
        raise InputError("init_from: a pretrained model has no parts to replace or to take; give init_from.model alone")
    if "language" in folders:  # with its tokenizer
        settings = checkpoint.family(settings.family).continued_settings(settings, folders["language"])
    # A hub id stays one: what is trained from it can then be loaded on another machine.
    named = {name: str(folders[name]) if Path(source).exists() else source for name, source in config.init_from.items()}
    return replace(config, model=settings, init_from=named)


def initial_model(config: TrainConfig, examples: Sequence[Example]) -> TrainedModel:
    """Load the model of `init_from`, or build the configured one; then load the parts of other models into it.

    Args:
        examples: the texts that a tokenizer is trained on, if the settings ask for one.

    Raises:
        InputError: a saved model is an adapter, or a part does not fit.
    """
    assert config.init_from is not None
    sources = dict(config.init_from)
    if MODEL in sources:
        trained = _continue_from(config, sources.pop(MODEL))
    else:
        trained = build_model(config.model, config.data, config.decoding, examples)
    if not sources:
        return trained
    started_from = {MODEL: trained.started_from} if trained.started_from else {}
    for part, source in sources.items():
        folder = loading.find(source)
        _load_part(trained.model, part, source, folder)
        started_from[part] = {"model": source, "weights": fingerprint.weights_in(folder)}
        if part == "language":
            tokenizer = checkpoint.family(config.model.family).load_processing_class(folder)
            trained = replace(trained, processor=replace(trained.processor, tokenizer=tokenizer))
    # No saved model holds these weights, so adapters cannot name one as their base.
    return replace(trained, started_from=None, parts_from=started_from)


def _continue_from(config: TrainConfig, source: str) -> TrainedModel:
    """Load a saved model, with the data and decoding settings of this run."""
    data, folder = config.data, loading.find(source)
    found = loading.load_model(folder)
    _refuse_adapter(MODEL, source, found.adapter is not None)
    processor = replace(found.processor, max_text_tokens=data.max_text_tokens)
    processor = processor.with_images(resize=data.resize, reduced=data.reduced_decoding, tiles=data.tiles)
    if data.resize == "letterbox" and isinstance(found.model, VLM):
        from vlmvqa.extras.vision.letterbox import check

        check(found.model)
    return replace(
        found,
        model=cast_parameters(found.model, DTYPES[config.model.dtype]),
        settings=replace(found.settings, dtype=config.model.dtype),
        processor=processor,
        prompt=data.prompt,
        prompts={**found.prompts, **data.prompts},
        decoding=config.decoding,
        started_from={"model": source, "weights": fingerprint.weights_in(folder)},
    )


def _load_part(model: Model, part: str, source: str, folder: Path) -> None:
    """Copy the weights of a part from a saved model.

    Raises:
        InputError: its tensors are not those of the model's own part; names the first one.
    """
    _refuse_adapter(part, source, "adapter" in loading.read_config(folder))
    parameters = {name: weight for name, weight in model.named_parameters() if model.part_of(name) == part}
    with safe_open(folder / checkpoint.WEIGHTS, "pt") as file:
        names = [name for name in list(file.keys()) if model.part_of(name) == part]
        saved = {name: list(file.get_slice(name).get_shape()) for name in names}
        for name in [*parameters, *sorted(saved.keys() - parameters.keys())]:
            here = list(parameters[name].shape) if name in parameters else "missing"
            if saved.get(name, "missing") != here:
                raise InputError(
                    f"init_from.{part}={source} does not fit: {name} is {saved.get(name, 'missing')} there and {here} "
                    f"in this model; choose the model.{part} that it was trained with"
                )
        for name, weight in parameters.items():
            weight.data.copy_(file.get_tensor(name))


def _refuse_adapter(part: str, source: str, is_adapter: bool) -> None:
    if is_adapter:
        key = "init_from" if part == MODEL else f"init_from.{part}"
        raise InputError(
            f"{key}={source} is an adapter; merge it into its base first, with launch/merge.py adapter={source} "
            "output=..."
        )
