"""Config to objects: what every launch script builds the same way. The library itself never sees Hydra."""

from __future__ import annotations

import vlmvqa  # noqa: F401 - first: it quietens what transformers' imports would say

# isort: split
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import PreTrainedConfig, TrainingArguments

from command_line import CONF, LAUNCHER, given_keys, group
from data_from_config import MIXTURE, DataSettings, Task, data_settings, prompts
from vlmvqa import fingerprint, ranks
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.batch import Processor
from vlmvqa.data.example import Example
from vlmvqa.data.features import FeatureKey, FeatureStore, stored_dtype
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.pretrained import PretrainedProcessor
from vlmvqa.data.tokenizer import load_tokenizer, train_tokenizer
from vlmvqa.data.training_set import TrainingSet
from vlmvqa.errors import InputError, suggest
from vlmvqa.inference.predict import Predictor, load
from vlmvqa.models import adapters, saved
from vlmvqa.models.adapters import AdapterSettings
from vlmvqa.models.checkpoint import Adapter, read_settings
from vlmvqa.models.generation import Decoding
from vlmvqa.models.pretrained import PretrainedSettings, build_pretrained, mode_of, pretrained_config
from vlmvqa.models.processors import ADDED_TOKENS, load_processor, random_processor
from vlmvqa.models.vlm import DTYPES, ModelSettings, build, cast_parameters
from vlmvqa.sequence.masks import SHAREABLE
from vlmvqa.settings import build_settings
from vlmvqa.training import tracking
from vlmvqa.training.parallel import DistSettings, correct_deepspeed, deepspeed_config
from vlmvqa.training.preflight import Asked, optimizer_for
from vlmvqa.training.trainer import PARTS


def refuse_counts(config: DictConfig) -> None:
    """Stop at numbers of shown answers that are none, before anything is computed."""
    for key in ("samples", "looks"):
        count = config.get(key, 0)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise InputError(f"{key}={count} is no number of answers; use 0 for none, or more")


def take_saved_model(config: DictConfig) -> None:
    """Under `start_from` the model's settings are those it was saved with; `model=` has chosen the trainer's.

    Raises:
        InputError: there is no such model, or the command sets a key of it other than model.dtype.
    """
    if config.start_from is None:
        return
    for key in given_keys():
        if key.startswith("model.") and key != "model.dtype":
            raise InputError(f"{key} cannot be set here: the model of start_from is as it was saved; leave it out")
    folder = saved.find(config.start_from).resolve()
    _, settings = read_settings(folder)
    known = asdict(settings)
    if isinstance(settings, ModelSettings):
        known["language"]["tokenizer"] = str(folder / saved.TOKENIZER)
    if config.get("adapt") is not None or "model.dtype" in given_keys():  # frozen weights may be kept in fewer bytes
        known["dtype"] = config.model.dtype
    if known["dtype"] not in DTYPES:
        raise InputError(f"model.dtype={known['dtype']} is unknown; use one of {', '.join(DTYPES)}")
    with open_dict(config):  # what trains, for the record and for all who ask the config
        config.model = known
        if Path(config.start_from).exists():  # a hub id stays one: what is made of it can be loaded elsewhere
            config.start_from = str(folder)


def build_predictor(
    config: DictConfig, data: DataSettings, train_examples: Sequence[Example], base: Path | None = None
) -> Predictor:
    """The model with its tokenizer, image settings and prompt; the saved one under `start_from`.

    Args:
        base: a folder that it was saved in before it got adapters, when the run began.
    """
    decoding = build_settings(Decoding, group(config, "decoding"), "decoding")
    if base is not None:
        return replace(load(base, "cpu"), settings=model_settings(config)[0])
    if config.get("start_from") is not None:
        folder = saved.find(config.start_from)
        found = load(folder, "cpu")
        processor = replace(found.processor, max_text_tokens=data.max_text_tokens)
        if not isinstance(found.settings, PretrainedSettings):
            images = replace(processor.images, resize=data.resize, reduced=data.reduced_decoding)
            processor = replace(processor, images=images)
        return replace(
            found,
            model=cast_parameters(found.model, DTYPES[config.model.dtype]),
            settings=replace(found.settings, dtype=config.model.dtype),
            processor=processor,
            prompt=data.prompt,
            prompts={**found.prompts, **prompts(data.tasks.values())},
            decoding=decoding,
            started_from={"model": config.start_from, "weights": fingerprint.weights_in(folder)},
        )
    settings, tokenizer_name = model_settings(config)
    if isinstance(settings, PretrainedSettings):
        return _pretrained(settings, tokenizer_name, data, decoding, train_examples)
    model = build(settings)
    if tokenizer_name == "trained":
        tokenizer = train_tokenizer(train_examples, model.language.config.vocab_size)
    else:
        tokenizer = load_tokenizer(tokenizer_name or settings.language.name)
    known = model.vision.data_config
    images = ImageSettings(
        settings.vision.image_size,
        tuple(known["mean"]),
        tuple(known["std"]),
        known["interpolation"],
        data.resize,
        data.reduced_decoding,
    )
    processor = Processor(tokenizer, images, model.vision.tokens, model.mode, data.max_text_tokens)
    return Predictor(model, processor, data.prompt, settings, decoding, prompts(data.tasks.values()))


def model_settings(config: DictConfig) -> tuple[ModelSettings | PretrainedSettings, str | None]:
    """The `model` group, and the tokenizer it names (None: the model's own)."""
    values = group(config, "model")
    if "pretrained" in values:
        values.pop("resolution", None)  # a part of some names
        tokenizer = values.pop("tokenizer", None)
        return build_settings(PretrainedSettings, values, "model"), tokenizer
    tokenizer = values["language"].pop("tokenizer")
    return build_settings(ModelSettings, values, "model"), tokenizer


def _pretrained(
    settings: PretrainedSettings,
    tokenizer_name: str | None,
    data: DataSettings,
    decoding: Decoding,
    train_examples: Sequence[Example],
) -> Predictor:
    """A pretrained model with its processor."""
    processor, known = pretrained_processor(settings, tokenizer_name, data, train_examples)
    started_from = None
    if settings.weights == "hub":
        folder = saved.find(settings.pretrained)
        started_from = {"model": _named(settings.pretrained), "weights": fingerprint.weights_in(folder)}
        model = build_pretrained(replace(settings, pretrained=str(folder)), known)
    else:
        model = build_pretrained(settings, known)
    return Predictor(model, processor, data.prompt, settings, decoding, prompts(data.tasks.values()), started_from)


def pretrained_processor(
    settings: PretrainedSettings, tokenizer_name: str | None, data: DataSettings, train_examples: Sequence[Example]
) -> tuple[PretrainedProcessor, PreTrainedConfig]:
    """The processor of a pretrained model, and the config of its network; no weights are read."""
    if data.resize != "squash" or data.reduced_decoding:
        raise InputError(
            f"{settings.pretrained} resizes images as it was trained; leave data.resize and data.reduced_decoding out"
        )
    known = pretrained_config(settings)
    if settings.weights == "random":
        if tokenizer_name != "trained":
            raise InputError("model.weights=random needs model.tokenizer=trained, which is made of the questions")
        text = train_tokenizer(train_examples, known.get_text_config().vocab_size - ADDED_TOKENS)
        library, known = random_processor(known, text, settings.image_splitting)
    else:
        library = load_processor(settings.pretrained, settings.image_splitting)
    return PretrainedProcessor.of(library, mode_of(known), data.max_text_tokens), known


def _named(pretrained: str) -> str:
    """A hub id as it is; a folder, so that it is found from elsewhere too."""
    folder = Path(pretrained).expanduser()
    return str(folder.resolve()) if folder.exists() else pretrained


def adapter_settings(config: DictConfig) -> AdapterSettings | None:
    """The `adapt` group, where there are adapters."""
    return None if config.get("adapt") is None else build_settings(AdapterSettings, group(config, "adapt"), "adapt")


def attach_adapters(config: DictConfig, predictor: Predictor, device: torch.device) -> Base | None:
    """Let train what `trainable` says, and give the model the adapters that the config asks for.

    Returns:
        the base of the adapters, where it lies nowhere yet.
    """
    settings = adapter_settings(config)
    if predictor.adapter is not None:
        raise InputError(
            f"start_from={config.start_from} is an adapter; merge it into its base first, with launch/merge.py "
            f"adapter={config.start_from} output=..."
        )
    if settings is None:
        adapters.prepare(predictor.model, config.trainable, None)
        return None
    _refuse_trained_beside(config, settings)
    unwritten = None
    if predictor.started_from is not None:
        base, known = predictor.started_from["model"], predictor.started_from["weights"]
    else:  # of parts, or random: it lies nowhere as a whole
        base, known = f"../{saved.BASE}", ""
        unwritten = Base(predictor)
    predictor.adapter = Adapter(settings, base, known)
    paths = adapters.prepare(predictor.model, config.trainable, settings, device)
    ranks.say(adapters.describe(predictor.model, settings, paths))
    return unwritten


def _refuse_trained_beside(config: DictConfig, settings: AdapterSettings) -> None:
    for part in PARTS:
        choice = config.trainable[part]
        if choice == "none":
            continue
        if part == "language" or choice != "all":
            raise InputError(
                f"trainable.{part}={choice}: adapt={settings.method} leaves the model frozen beside its adapters, but "
                "for trainable.vision=all or trainable.projector=all; set none"
            )
        if any(target.startswith((f"{part}.", "*")) for target in settings.targets) or (
            settings.bits and part == "vision"
        ):
            raise InputError(
                f"trainable.{part}=all: its weights would have adapters, or be in 4 bits, and train too; set none"
            )


class Base:
    """A model without adapters, kept (by the first rank) to be written beside them once the run's folder is there."""

    def __init__(self, predictor: Predictor) -> None:
        named = predictor.model.named_parameters() if ranks.is_first() else ()
        self.predictor, self.weights = replace(predictor), {name: weight.detach().clone() for name, weight in named}

    def write(self, folder: Path, resumed: bool) -> str:
        """Write it as `vlmvqa.load` reads it, unless a resumed run has done so before; its fingerprint, on every rank.

        What lies there else is of a run that ended before its first checkpoint, perhaps of another seed.
        """
        if not resumed:
            ranks.share(lambda: self._replace(folder))
        return fingerprint.weights_in(folder)

    def _replace(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.predictor.save(folder, self.weights)


def training_set(
    config: DictConfig,
    data: DataSettings,
    predictor: Predictor,
    tasks: Sequence[Task],
    bad_records: BadRecords,
) -> TrainingSet:
    """The rows that a run trains on."""
    examples = [example for task in tasks for example in task.train]
    features = _cached_features(data, predictor, examples)
    with ranks.first_here_first():  # texts are tokenised at first use
        return TrainingSet(
            examples,
            predictor.processor,
            data.target,
            config.seed,
            bad_records,
            row_tokens=data.row_tokens,
            questions_per_row=data.questions_per_row if predictor.model.shares_images else 1,
            weighting=config.loss_weighting,
            features=features,
            repeats=[task.weight for task in tasks for _ in task.train],
        )


def most_questions(data: DataSettings, mode: str) -> int | None:
    """Questions that may share a row: one where the image sees its question."""
    return data.questions_per_row if mode in SHAREABLE else 1


def _cached_features(data: DataSettings, predictor: Predictor, examples: Sequence[Example]) -> FeatureStore | None:
    """The encoder's output in place of the training images, where `data.features` names it.

    Raises:
        InputError: it is not of this model's encoder and images.
    """
    if data.features is None:
        return None
    folder = Path(data.features).expanduser()
    key = FeatureKey.of(predictor.model.vision, predictor.processor.images, stored_dtype(folder))
    store = FeatureStore.open(folder, key)
    store.refuse_missing(example.image_id for example in examples)
    store.refuse_other_pictures(examples)
    if data.on_bad_record == "error" and store.left_out:
        image, why = next(iter(store.left_out.items()))
        raise InputError(f"image {image} has no features in {folder}: {why.rstrip('.')}; set data.on_bad_record=skip")
    return store


def dist_settings(config: DictConfig) -> DistSettings:
    """The strategy: what `dist=...` says, or what the launcher implies; the config then holds it.

    Raises:
        InputError: they contradict each other.
    """
    if LAUNCHER is not None:
        choice, launcher = LAUNCHER
        if config.get("dist") is None:
            path = CONF / "dist" / f"{choice}.yaml"
            if not path.exists():
                raise InputError(f"{launcher} asks for {choice}, which is not in conf/dist; change it, or add dist=...")
            with open_dict(config):
                config.dist = OmegaConf.load(path)
        given = group(config, "dist")
        named = given["strategy"] + ("_offload" if given["offload"] else "")
        if launcher != "the deepspeed launcher" and named != choice:
            raise InputError(f"{launcher} asks for {choice}, the command for {named}; change one of them")
    if config.get("dist") is None:
        return DistSettings()
    return build_settings(DistSettings, group(config, "dist"), "dist")


def asked(config: DictConfig, dist: DistSettings) -> Asked:
    """What the command asks for, as `preflight.refuse` wants to know it."""
    gpu = torch.cuda.is_available() and not config.trainer.get("use_cpu")
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if config.trainer.get("bf16") else "fp16" if config.trainer.get("fp16") else "no"
    if mixed not in ("no", ours):
        raise InputError(f"accelerate's config file asks for {mixed}, the run for {ours}; add trainer.{mixed}=true")
    settings, _ = model_settings(config)
    return Asked(
        dist,
        group(config, "trainer"),
        settings,
        config.data.questions_per_row,
        config.data.row_tokens,
        config.data.features is not None,
        str(config.trainable.vision),
        gpu,
        torch.cuda.is_bf16_supported(including_emulation=False) if gpu else True,
        adapter_settings(config),
    )


def training_arguments(config: DictConfig, dist: DistSettings) -> TrainingArguments:
    """transformers' TrainingArguments; what a run is (its folder, seed and strategy) is set by us."""
    values = group(config, "trainer")
    kinds = get_type_hints(TrainingArguments)
    known = [field.name for field in fields(TrainingArguments)]
    for key, value in values.items():
        if key not in known:
            raise InputError(f"trainer has no key '{key}'{suggest(key, known)}")
        # TrainingArguments takes any text for a number or a yes, and stumbles over it later or never.
        wanted = set(get_args(kinds[key]) or [kinds[key]]) - {type(None)}
        if isinstance(value, str) and wanted <= {int, float, bool}:
            names = " or ".join(sorted(kind.__name__ for kind in wanted))
            raise InputError(f"trainer.{key}={value} should be of type {names}")
    values["optim"] = optimizer_for(values.get("optim", "adamw_torch"), dist)
    values["report_to"] = tracking.chosen(values.get("report_to"))[1] or "none"  # ours are no business of its
    # Lines in a log file, which a bar would fill with thousands of itself.
    values["disable_tqdm"] = bool(values.get("disable_tqdm")) or not sys.stderr.isatty()
    defaults = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),  # where there is no GPU, ranks over gloo
        "ddp_find_unused_parameters": False,
        "metric_for_best_model": "mean" if config.data.source == MIXTURE else data_settings(config).metric,
        "greater_is_better": True,
    }
    try:
        arguments = TrainingArguments(
            output_dir=str(run_folder(config)),
            seed=config.seed,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,  # a NaN is an error here, not smoothed away
            deepspeed=deepspeed_config(dist) if dist.is_zero else None,
            ddp_timeout=int(60 * dist.timeout_minutes),
            **{**defaults, **values},
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"trainer: {str(error).strip().splitlines()[0]}") from error
    if dist.is_zero:
        correct_deepspeed()
    # One process drives one GPU: the Trainer's DataParallel would split a batch's rows from their images.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def run_folder(config: DictConfig) -> Path:
    return Path(group(config, "run")["dir"]).expanduser()


def decoding(config: DictConfig, trained: Decoding) -> Decoding:
    """The decoding a model was trained and scored with, but for what the command line says."""
    keys = [key.removeprefix("decoding.") for key in given_keys() if key.startswith("decoding.")]
    values = group(config, "decoding")
    return replace(trained, **{key: values[key] for key in keys})
