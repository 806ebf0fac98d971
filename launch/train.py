"""Train, score, report.

python launch/train.py                                             the tiny model on shapes
python launch/train.py model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2
accelerate launch launch/train.py +dist=fsdp                       on all GPUs of the machine
deepspeed launch/train.py                                          the same under ZeRO-2
python launch/train.py resume=auto                                 resume a stopped run
python launch/train.py -m trainer.learning_rate=1e-3,1e-4          a run for each value, and a table of their scores
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import gc
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import TrainingArguments, set_seed

import from_config
from vlmvqa import ranks
from vlmvqa.cli import group, run
from vlmvqa.code_state import code_state
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.tasks import Task, data_settings, read_tasks
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.hub.upload import refuse_upload, upload
from vlmvqa.extras.report.model_card import write_card
from vlmvqa.inference import build
from vlmvqa.inference.evaluate import Asked
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.inference.scoring import score_and_report
from vlmvqa.metrics.registry import score
from vlmvqa.models.checkpoint import Model
from vlmvqa.models.model_folder import BASE, CONFIG
from vlmvqa.training import arguments, distributed, runtime_checks, samples
from vlmvqa.training.banner import banner
from vlmvqa.training.callbacks import RunInfo, Tracking, chosen
from vlmvqa.training.checkpoint_state import WEIGHTS, whole_weights, write_weights
from vlmvqa.training.checkpoints import step_of, whole_checkpoints
from vlmvqa.training.log import cut
from vlmvqa.training.run_folder import going_on, open_run, record_start, refuse_other_base, refuse_run
from vlmvqa.training.throughput import rounded
from vlmvqa.training.trainer import VqaTrainer


def main(config: DictConfig) -> bool:
    """Train, save and score; return whether a signal stopped the training before its end."""
    build.take_saved_model(config)
    dist = arguments.dist_settings(config)
    runtime_checks.refuse(arguments.asked(config, dist))
    folder = from_config.run_folder(config)
    distributed.start(dist, bool(config.trainer.get("use_cpu")))
    ranks.broadcast_from_rank0(lambda: refuse_run(folder, config))
    if config.hub_id:
        ranks.broadcast_from_rank0(lambda: refuse_upload(config.hub_id))
    set_seed(config.seed)
    data = data_settings(config)
    bad_records = BadRecords(data.on_bad_record)
    with ranks.local_main_first():  # shapes are drawn at first use
        tasks = read_tasks(data, bad_records)
    arguments = arguments.training_arguments(config, dist)
    if not any(task.answered for task in tasks):
        arguments.metric_for_best_model = None

    tracking = Tracking(chosen(config.trainer.report_to)[0])
    stopped_by = train(config, dist, folder, arguments, tasks, bad_records, tracking)
    if stopped_by:
        tracking.finish()
        by = "Ctrl-C" if stopped_by == "SIGINT" else stopped_by
        ranks.say(f"stopped by {by}, saved in {folder / 'latest'}; resume with resume=auto")
        if (
            stopped_by == "SIGINT" and not ranks.is_distributed()
        ):  # else the launcher would take it for a rank that failed
            sys.exit(128 + signal.SIGINT)  # what a shell expects: `train && eval` goes no further
        return True
    metrics = score_tasks(config, folder, arguments, tasks, bad_records)
    if ranks.is_first():
        tracking.finish(
            {
                f"{task.name or one['data']}_{name}": of["overall"]
                for task, one in zip(tasks, metrics, strict=True)
                for name, of in one["metrics"].items()
            }
        )
        write_card(folder / "model", config.hub_id or config.run.dir, metrics, OmegaConf.to_yaml(config, resolve=True))
        print(f"model:  {folder / 'model'}")
        if config.hub_id:
            print(f"hub:    {upload(folder / 'model', config.hub_id)}")
    return False


def score_tasks(
    config: DictConfig, folder: Path, arguments: TrainingArguments, tasks: list[Task], bad_records: BadRecords
) -> list[dict[str, Any]]:
    """Score the saved model on each task, and report; `metrics.json`'s content of each."""
    gc.collect()  # what trained makes room for what is scored: the model that was saved
    torch.cuda.empty_cache()
    predictor = load(folder / "model", str(arguments.device))
    return [
        score_and_report(
            config,
            folder,
            predictor,
            Asked(
                task.evaluated,
                task.train,
                task.data.metric,
                config.seed,
                options=task.scoring,
                also=task.data.extra,
            ),
            task.data,
            name=task.name,
            checkpoint=str(folder / "model"),
            split=task.data.eval_split,
            batch_size=arguments.per_device_eval_batch_size,
            workers=arguments.dataloader_num_workers,
            bad_records=bad_records,
        )
        for task in tasks
    ]


def train(
    config: DictConfig,
    dist: distributed.DistSettings,
    folder: Path,
    arguments: TrainingArguments,
    tasks: list[Task],
    bad_records: BadRecords,
    tracking: Tracking,
) -> str | None:
    """Train and write `model/`; the signal that stopped it before its end, if one did."""
    data = data_settings(config)
    kept = folder / BASE  # of adapters that this run has begun with
    before = kept if going_on(folder, config) and whole_checkpoints(folder) and (kept / CONFIG).is_file() else None
    examples = [example for task in tasks for example in task.train]
    predictor = build.build_predictor(config, data, examples, before)
    base = build.attach_adapters(config, predictor, arguments.device)
    # Before weights are sharded, which cached features are of.
    training_set = arguments.training_set(config, data, predictor, tasks, bad_records)
    if dist.strategy == "fsdp":
        computed_in = torch.bfloat16 if arguments.bf16 else None
        distributed.shard(predictor.model, arguments.device, computed_in, dist.offload)
    shown = [samples.Shown.of(task.evaluated, config.log_samples, config.seed, task.name) for task in tasks]

    def evaluate(model: Model) -> dict[str, float]:
        answering = replace(predictor, model=model)
        numbers, seen = score_now(answering, arguments, tasks, bad_records, shown, tracking.shows_samples)
        if ranks.is_first() and seen:
            samples.write(folder, seen, trainer.state.global_step)
            tracking.samples(seen, trainer.state.global_step)
        return numbers

    trainer = VqaTrainer(
        predictor.model,
        arguments,
        training_set,
        predictor.processor,
        learning_rates=group(config, "learning_rates"),
        score=evaluate,
        dist=dist,
        settings=predictor.settings,
        clip_percentile=config.clip_percentile,
        adapt=predictor.adapter.settings if predictor.adapter else None,
        describe=predictor.describe,
    )
    groups = trainer.parameter_groups()
    # Only now, when all that the command says has been understood, is anything written or replaced.
    checkpoint, told = ranks.broadcast_from_rank0(
        lambda: open_run(folder, config, trainer.global_batch, ranks.world_size())
    )
    trainer.add_callback(tracking)
    ranks.broadcast_from_rank0(lambda: _open(tracking, config, folder, checkpoint))
    if base is not None and predictor.adapter is not None:
        written = base.write(kept, resumed=checkpoint is not None)
        predictor.adapter = replace(predictor.adapter, fingerprint=written)
    if predictor.adapter is not None:
        trainer.base = predictor.adapter.fingerprint
        refuse_other_base(checkpoint, predictor.adapter)
    if ranks.is_first():
        bad_records.list_in(folder / "skipped.jsonl")
    bad_records.listing = folder / "skipped.jsonl"
    repeated = arguments.repeat_small_data(trainer, tasks)
    ranks.say("\n".join([*told, *([repeated] if repeated else []), banner(predictor.model, groups)]))
    ranks.say("\n".join(map(str, tasks)) + f"; results in {folder}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.watch.stopped_by:
        return trainer.watch.stopped_by
    _write_model(folder / "model", predictor, trainer)
    return None


def _open(tracking: Tracking, config: DictConfig, folder: Path, checkpoint: Path | None) -> None:
    """Open the loggers, and write down what starts here; the samples of steps that are made again are cut."""
    step = step_of(checkpoint) if checkpoint else 0
    resolved, text = OmegaConf.to_container(config, resolve=True), OmegaConf.to_yaml(config, resolve=True)
    assert isinstance(resolved, dict)
    named = {str(key): value for key, value in resolved.items()}
    tracking.start(RunInfo(folder, config.run.name, named, text, str(code_state()), step))
    record_start(folder, step)
    if (folder / samples.FILE).exists():
        cut(folder / samples.FILE, step)


def score_now(
    predictor: Predictor,
    arguments: TrainingArguments,
    tasks: list[Task],
    bad_records: BadRecords,
    shown: list[samples.Shown],
    pictures: bool,
) -> tuple[dict[str, float], list[samples.Sample]]:
    """Each task's score while it trains, their mean where there are several, how fast it went; and answers to look at.

    Args:
        shown: of each task, the questions whose answers are looked at.
        pictures: whether these bring their pictures.
    """
    found: dict[str, float] = {}
    seen: list[samples.Sample] = []
    asked, began = 0, time.perf_counter()
    for task, looked_at in zip(tasks, shown, strict=True):
        if not task.answered:
            continue
        answers = predictor.answer_examples(
            task.evaluated,
            batch_size=arguments.per_device_eval_batch_size,
            workers=arguments.dataloader_num_workers,
            bad_records=bad_records,
            progress=True,
        )
        asked += len(answers)
        texts = {name: answer.text for name, answer in answers.items()}
        scored = score(task.evaluated, texts, task.data.metric, **task.scoring)
        if scored.overall is not None:
            found[f"{task.prefix}{task.data.metric}"] = scored.overall
        if ranks.is_first():
            seen += looked_at.samples(answers, scored.per_question, pictures)
    if len(tasks) > 1 and found:
        found["mean"] = sum(found.values()) / len(found)
    if asked:
        found["questions_per_second"] = rounded(asked / (time.perf_counter() - began))
    return found, seen


def _write_model(folder: Path, predictor: Predictor, trainer: VqaTrainer) -> None:
    """The same folder whatever trained it, enough for `vlmvqa.load` on one CPU."""
    if ranks.is_first():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if predictor.adapter is None:
        write_weights(trainer, folder / WEIGHTS)
    else:
        weights, adapter = whole_weights(trainer), predictor.adapter
        if ranks.is_first():
            peft_adapters.save(folder, predictor.model, adapter.base, weights)
    if ranks.is_first():
        predictor.describe(folder)
    ranks.barrier()


if __name__ == "__main__":
    run(main, "train")
