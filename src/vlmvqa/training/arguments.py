"""A training's part of the config to objects: its rows, its strategy, transformers' arguments.

Apart from `from_config`, which scripts that do not train start sooner with: the Trainer takes seconds to import.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import TrainingArguments

from from_config import run_folder
from vlmvqa import ranks
from vlmvqa.cli import LAUNCHER, given_keys, group
from vlmvqa.config.overrides import CONF
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import MIXTURE, DataSettings, Task, data_settings
from vlmvqa.data.train_dataset import TrainingSet
from vlmvqa.errors import InputError
from vlmvqa.extras.feature_cache.store import FeatureKey, FeatureStore, stored_dtype
from vlmvqa.inference.build import adapter_settings, model_settings
from vlmvqa.inference.predictor import Predictor
from vlmvqa.settings import build_settings
from vlmvqa.training import callbacks
from vlmvqa.training.distributed import DistSettings, correct_deepspeed, deepspeed_config
from vlmvqa.training.runtime_checks import Asked, optimizer_for

if TYPE_CHECKING:
    from vlmvqa.training.trainer import VqaTrainer


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
    with ranks.local_main_first():  # texts are tokenised at first use
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


def _cached_features(data: DataSettings, predictor: Predictor, examples: Sequence[Example]) -> FeatureStore | None:
    """The encoder's output in place of the training images, where `data.feature_cache` names it.

    Raises:
        InputError: it is not of this model's encoder and images.
    """
    if data.feature_cache is None:
        return None
    folder = Path(data.feature_cache).expanduser()
    key = FeatureKey.of(predictor.model.vision, predictor.processor.images, stored_dtype(folder))
    store = FeatureStore.open(folder, key)
    store.refuse_missing(example.image_id for example in examples)
    store.refuse_changed_images(examples)
    if data.on_bad_record == "error" and store.left_out:
        image, why = next(iter(store.left_out.items()))
        raise InputError(f"image {image} has no features in {folder}: {why.rstrip('.')}; set data.on_bad_record=skip")
    return store


def repeat_small_data(trainer: VqaTrainer, tasks: Sequence[Task]) -> str | None:
    """Raise the epochs of a small data set until they make `data.min_steps`; return the line that says so.

    The command's own `trainer.num_train_epochs` or `trainer.max_steps` stays as it is.
    """
    arguments, least = trainer.args, max(task.data.min_steps for task in tasks)
    epochs = math.ceil(least / (len(trainer.training_set) // trainer.global_batch))
    chosen = arguments.max_steps > 0 or "trainer.num_train_epochs" in given_keys()
    if chosen or epochs <= arguments.num_train_epochs:
        return None
    configured, arguments.num_train_epochs = arguments.num_train_epochs, float(epochs)
    return f"{epochs} epochs instead of {configured:g}, since a small data set makes few steps (data.min_steps={least})"


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
        config.data.feature_cache is not None,
        str(config.trainable.vision),
        gpu,
        torch.cuda.is_bf16_supported(including_emulation=False) if gpu else True,
        adapter_settings(config),
    )


def training_arguments(config: DictConfig, dist: DistSettings) -> TrainingArguments:
    """transformers' TrainingArguments; what a run is (its folder, seed and strategy) is set by us."""
    values = group(config, "trainer")
    values["optim"] = optimizer_for(values.get("optim", "adamw_torch"), dist)
    values["report_to"] = callbacks.chosen(values.get("report_to"))[1] or "none"  # ours are no business of its
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
