"""A training run, top to bottom: check, read the data, build the model, train, save; `evaluation.py` scores it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from vlmvqa import ranks
from vlmvqa.config import compatibility
from vlmvqa.config.schema import MIXTURE, DistSettings, TrainConfig
from vlmvqa.data.tasks import Task, read_tasks
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.models.checkpoint import BASE, CONFIG, WEIGHTS
from vlmvqa.models.interface import Model
from vlmvqa.models.trained_model import TrainedModel, build_model
from vlmvqa.models.vlm import ModelSettings
from vlmvqa.training.checkpoint_state import full_weights, num_elements, save_weights
from vlmvqa.training.checkpoints import complete_checkpoints, step_of
from vlmvqa.training.log import SAMPLES, ProgressBar, parts_table, truncate
from vlmvqa.training.optimizer import optimizer_for, set_trainable
from vlmvqa.training.run_folder import STAGES, is_resumed, open_run, record_start, refuse_run
from vlmvqa.training.trainer import TrainerOptions, VqaTrainer

# Keys of the `trainer` group for `block_compilation.py`: the Trainer would compile the model as one graph.
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


@dataclass(frozen=True)
class Session:
    """State shared by the steps of a run.

    Attributes:
        config: the configuration, with the settings of a saved model where training continues from one.
        dist: the strategy.
        arguments: transformers' TrainingArguments.
        tasks: the training and evaluation data.
        bad_records: policy and list of unusable records.
        tracking: the loggers and sample answers (`extras/loggers`); None if the config enables neither.
    """

    config: TrainConfig
    dist: DistSettings
    arguments: TrainingArguments
    tasks: list[Task]
    bad_records: BadRecords
    tracking: Any

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.folder


def train(config: TrainConfig, callbacks: Sequence[TrainerCallback] = ()) -> bool:
    """Train, save and score; return whether a signal stopped it. A `ProgressBar` in `callbacks` replaces the run's."""
    if not config.stages and not (config.run.folder / STAGES).exists():
        return train_once(config, callbacks)
    from vlmvqa.extras.stages.run import train_stages

    return train_stages(config, callbacks)


def train_once(config: TrainConfig, callbacks: Sequence[TrainerCallback] = (), is_scored: bool = True) -> bool:
    """Train a run without stages, or one of its stages (`is_scored`: the last one)."""
    session = prepare(config)
    try:
        stopped_by = fit(session, callbacks)
        if not stopped_by and is_scored:
            from vlmvqa.training.evaluation import publish, score_tasks

            metrics = score_tasks(session)
            if ranks.is_first():
                publish(session, metrics)
            return False
    except BaseException:
        if session.tracking is not None:  # in a study, the next run opens its own loggers
            session.tracking.finish()
        raise
    if session.tracking is not None:
        session.tracking.finish()
    if not stopped_by:
        return False
    by, how = "Ctrl-C" if stopped_by == "SIGINT" else stopped_by, "the same command" if config.resume else "resume=auto"
    ranks.print_on_rank0(f"stopped by {by}, saved in {session.folder / 'latest'}; resume with {how}")
    if stopped_by == "SIGINT" and not ranks.is_distributed():  # a launcher would report a failed rank
        sys.exit(128 + signal.SIGINT)  # as a shell expects: `train && eval` stops here
    return True


def prepare(config: TrainConfig) -> Session:
    """Check the config and the run's folder, join the process group, and read the data."""
    if config.init_from is not None:
        from vlmvqa.training.initial_model import with_saved_model

        config = with_saved_model(config)
    dist = config.dist or DistSettings()
    compatibility.check(config, dist)
    if "RANK" in os.environ or dist.strategy != "ddp":
        from vlmvqa.training import distributed

        distributed.start(dist, bool(config.trainer.get("use_cpu")))
    ranks.broadcast_from_rank0(lambda: refuse_run(config.run.folder, config))
    if config.hub_id:
        from vlmvqa.extras.hub.upload import refuse_upload

        ranks.broadcast_from_rank0(lambda: refuse_upload(str(config.hub_id)))
    set_seed(config.seed)
    bad_records = BadRecords(config.data.on_bad_record)
    with ranks.local_main_first():  # synthetic data is generated at first use
        tasks = read_tasks(config.data, bad_records)
    arguments = training_arguments(config, dist)
    if not any(task.answered for task in tasks):
        if config.trainer.get("early_stopping_patience") is not None:
            raise InputError("trainer.early_stopping_patience needs a score, and no evaluated question has an answer")
        arguments.metric_for_best_model = None
    tracking = None
    if config.log_samples or config.trainer["report_to"] not in (None, "none"):
        from vlmvqa.extras.loggers.tracking import Tracking

        tracking = Tracking(config)
    return Session(config, dist, arguments, tasks, bad_records, tracking)


def training_arguments(config: TrainConfig, dist: DistSettings) -> TrainingArguments:
    """Return transformers' TrainingArguments: the `trainer` group, and the run's folder, seed and strategy.

    Raises:
        InputError: transformers rejects a value.
    """
    others = (*COMPILE_KEYS, "early_stopping_patience", "early_stopping_threshold")
    values = {key: value for key, value in config.trainer.items() if key not in others}
    values["optim"] = optimizer_for(values.get("optim", "adamw_torch"), dist)
    if values.get("report_to") in (None, "none"):
        values["report_to"] = "none"
    else:
        from vlmvqa.extras.loggers.tracking import chosen

        values["report_to"] = chosen(values["report_to"])[1] or "none"  # the Trainer does not know our loggers
    # A progress bar would fill a log file with its updates; log lines take its place.
    values["disable_tqdm"] = bool(values.get("disable_tqdm")) or not sys.stderr.isatty()
    defaults: dict[str, Any] = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # of copies to the GPU
        "use_cpu": not torch.cuda.is_available(),  # without a GPU, ranks communicate over gloo
        "ddp_find_unused_parameters": False,
        "metric_for_best_model": "mean" if config.data.source == MIXTURE else config.data.metric,
        "greater_is_better": True,
    }
    if dist.is_zero:
        from vlmvqa.training import zero

        defaults["deepspeed"] = zero.deepspeed_config(dist)
    try:
        arguments = TrainingArguments(
            output_dir=str(config.run.folder),
            seed=config.seed,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,  # a NaN is an error here, not smoothed away
            ddp_timeout=int(60 * dist.timeout_minutes),
            **{**defaults, **values},
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"trainer: {str(error).strip().splitlines()[0]}") from error
    if dist.is_zero:
        zero.correct_deepspeed()
    # One process drives one GPU: the Trainer's DataParallel would split a batch's rows from their images.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# ---- training


def fit(session: Session, callbacks: Sequence[TrainerCallback] = ()) -> str | None:
    """Train and write `model/`; return the signal that stopped the training before its end, if one did."""
    config, arguments, folder = session.config, session.arguments, session.folder
    trained, unsaved_base = build(session)

    def evaluate(model: Model) -> dict[str, float]:
        from vlmvqa.training.evaluation import score_now

        return score_now(session, replace(trained, model=model), trainer.state.global_step)

    options = trainer_options(session, trained, evaluate)
    # Before the weights are sharded, because cached features are checked against the encoder's weights.
    dataset = training_set(config, trained, session.tasks, session.bad_records)
    if session.dist.strategy == "fsdp":
        from vlmvqa.training import distributed

        compute_dtype = torch.bfloat16 if arguments.bf16 else None
        distributed.shard(trained.model, arguments.device, compute_dtype, session.dist)

    trainer = VqaTrainer(trained.model, arguments, dataset, trained.processor, options)
    table = parts_table(trained.model, trainer.parameter_groups())
    # Nothing is written or replaced before this line: all settings have been checked.
    checkpoint, messages = ranks.broadcast_from_rank0(
        lambda: open_run(folder, config, trainer.global_batch, ranks.world_size())
    )
    if session.tracking is not None:
        trainer.add_callback(session.tracking)
    for callback in callbacks:
        if isinstance(callback, ProgressBar) and trainer.pop_callback(ProgressBar) is None:
            continue  # trainer.disable_tqdm
        trainer.add_callback(callback)
    ranks.broadcast_from_rank0(lambda: _open_logs(session, checkpoint, trained.model))
    if trained.adapter is not None:
        from vlmvqa.extras.adapters.attach import settle_base

        trainer.base_fingerprint = settle_base(trained, unsaved_base, folder / BASE, checkpoint)
    if ranks.is_first():
        session.bad_records.list_in(folder / "skipped.jsonl")
    session.bad_records.listing = folder / "skipped.jsonl"
    if any(task.data.min_steps for task in session.tasks):
        from vlmvqa.training.small_data import repeat_small_data

        messages = [*messages, *repeat_small_data(trainer, config.given, session.tasks)]
    ranks.print_on_rank0("\n".join([*messages, table]))
    ranks.print_on_rank0("\n".join(map(str, session.tasks)) + f"; results in {folder}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stop_handler.stopped_by:
        return trainer.stop_handler.stopped_by
    save_model(folder / "model", trained, trainer)
    return None


def trainer_options(
    session: Session, trained: TrainedModel, score: Callable[[Model], dict[str, float]]
) -> TrainerOptions:
    """Return the trainer's options; compile the model's blocks if the config enables it."""
    config, compiled, early_stopping = session.config, None, None
    if any(config.trainer.get(key) for key in COMPILE_KEYS):
        from vlmvqa.training.block_compilation import compile_blocks

        compiled = compile_blocks(trained.model, *(config.trainer.get(key) for key in COMPILE_KEYS[1:]))
    patience = config.trainer.get("early_stopping_patience")
    if patience is not None:
        from vlmvqa.training.early_stopping import EarlyStopping

        early_stopping = EarlyStopping(patience, config.trainer.get("early_stopping_threshold") or 0.0)
    return TrainerOptions(
        dist=session.dist,
        learning_rates=config.learning_rates,
        clip_percentile=config.clip_percentile,
        score=score,
        settings=trained.settings,
        adapt=trained.adapter.settings if trained.adapter else None,
        compiled=compiled,
        describe=trained.describe,
        early_stopping=early_stopping,
    )


def build(session: Session) -> tuple[TrainedModel, Any]:
    """Build the configured model; set which of its parts train, or attach adapters.

    Returns:
        the model with its processor; and the base of its adapters, if that isn't stored anywhere yet.
    """
    config, saved_base = session.config, session.folder / BASE
    examples = [example for task in session.tasks for example in task.train]
    resumed = is_resumed(session.folder, config) and complete_checkpoints(session.folder)
    if resumed and (saved_base / CONFIG).is_file():  # the base of the adapters, saved at the start of this run
        from vlmvqa.models.loading import load_model

        trained = replace(load_model(saved_base), settings=config.model)
    elif config.init_from is not None:
        from vlmvqa.training.initial_model import initial_model

        trained = initial_model(config, examples)
    else:
        trained = build_model(config.model, config.data, config.decoding, examples)
    has_new_projector = not resumed and not {"model", "projector"} & set(config.init_from or ())
    if has_new_projector and isinstance(config.model, ModelSettings) and config.model.projector.scale_to_text:
        from vlmvqa.extras.vision.initial_scale import scale_to_text

        scale_to_text(trained, examples)
    if config.adapt is not None:
        from vlmvqa.extras.adapters.attach import attach_adapters

        return trained, attach_adapters(config, trained, session.arguments.device)
    for part, choice in config.trainable.items():
        set_trainable(trained.model.part(part), choice, part)
    return trained, None


def training_set(
    config: TrainConfig, trained: TrainedModel, tasks: Sequence[Task], bad_records: BadRecords
) -> TrainDataset:
    """Return the rows that the run trains on."""
    data, examples = config.data, [example for task in tasks for example in task.train]
    settings = row_settings(config, trained.model.shares_images)
    features = None
    if data.feature_cache is not None:
        from vlmvqa.extras.feature_cache.training import open_features

        features = open_features(data, trained, examples)
    repeats = [task.weight for task in tasks for _ in task.train]
    with ranks.local_main_first():  # texts are tokenized at first use
        return TrainDataset(examples, trained.processor, settings, bad_records, features=features, repeats=repeats)


def row_settings(config: TrainConfig, shares_images: bool) -> RowSettings:
    """Return the settings of the rows that a run trains on."""
    data = config.data
    most = data.questions_per_row if shares_images or config.copy_images else 1
    return RowSettings(
        data.target, config.seed, data.row_tokens, most, config.copy_images, data.length_window, config.loss_weighting
    )


def _open_logs(session: Session, checkpoint: Path | None, model: Model) -> None:
    """Open the loggers, record this start, and drop the samples of steps that are repeated."""
    folder, step = session.folder, step_of(checkpoint) if checkpoint else 0
    if session.tracking is not None:
        session.tracking.start(step)
    trained = sum(num_elements(weight) for weight in model.parameters() if weight.requires_grad)
    record_start(folder, step, {"total": sum(map(num_elements, model.parameters())), "trained": trained})
    if (folder / SAMPLES).exists():
        truncate(folder / SAMPLES, step)


def save_model(folder: Path, trained: TrainedModel, trainer: VqaTrainer) -> None:
    """Write `model/`, with the same files under every strategy; `vlmvqa.load` loads it on one CPU."""
    if ranks.is_first():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if trained.adapter is None:
        save_weights(trainer, folder / WEIGHTS)
    else:
        from vlmvqa.extras.adapters import peft_adapters

        weights = full_weights(trainer)
        if ranks.is_first():
            peft_adapters.save(folder, trained.model, trained.adapter.base, weights)
    ranks.broadcast_from_rank0(lambda: trained.describe(folder))  # no rank reads the folder before it is complete
