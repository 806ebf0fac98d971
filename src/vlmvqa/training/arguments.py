"""transformers' TrainingArguments of a training run."""

from __future__ import annotations

import sys

import torch
from transformers import TrainingArguments

from vlmvqa.config.schema import MIXTURE, DistSettings, TrainConfig
from vlmvqa.errors import InputError
from vlmvqa.training import callbacks
from vlmvqa.training.distributed import correct_deepspeed, deepspeed_config
from vlmvqa.training.optimizer import optimizer_for


def training_arguments(config: TrainConfig, dist: DistSettings) -> TrainingArguments:
    """Return the arguments: the `trainer` group, and the run's folder, seed and strategy.

    Raises:
        InputError: transformers rejects a value.
    """
    values = dict(config.trainer)
    values["optim"] = optimizer_for(values.get("optim", "adamw_torch"), dist)
    values["report_to"] = callbacks.chosen(values.get("report_to"))[1] or "none"  # the Trainer ignores our loggers
    # A progress bar would fill a log file with its updates; log lines take its place.
    values["disable_tqdm"] = bool(values.get("disable_tqdm")) or not sys.stderr.isatty()
    defaults = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),  # without a GPU, ranks over gloo
        "ddp_find_unused_parameters": False,
        "metric_for_best_model": "mean" if config.data.source == MIXTURE else config.data.metric,
        "greater_is_better": True,
    }
    try:
        arguments = TrainingArguments(
            output_dir=str(config.run.folder),
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
