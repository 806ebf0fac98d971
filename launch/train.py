"""Train, score, report.

python launch/train.py                                             the tiny model on shapes
python launch/train.py model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2
accelerate launch launch/train.py +dist=fsdp                       on all GPUs of the machine
deepspeed launch/train.py                                          the same under ZeRO-2
python launch/train.py resume=auto                                 go on where the run stood
"""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

import from_config
from command_line import run
from from_config import group
from results import score_and_report
from run_folder import open_run, refuse_run
from vlmvqa import ranks
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, count_questions
from vlmvqa.inference.card import refuse_upload, upload, write_card
from vlmvqa.inference.evaluate import score
from vlmvqa.inference.predict import Predictor, load
from vlmvqa.models.vlm import VLM, set_trainable
from vlmvqa.training import parallel, preflight
from vlmvqa.training.banner import banner
from vlmvqa.training.state import WEIGHTS, write_weights
from vlmvqa.training.trainer import PARTS, VqaTrainer


def main(config: DictConfig) -> None:
    dist = from_config.dist_settings(config)
    preflight.refuse(from_config.asked(config, dist))
    folder = from_config.run_folder(config)
    parallel.start(dist, bool(config.trainer.get("use_cpu")))
    ranks.share(lambda: refuse_run(folder, config))
    if config.hub_id:
        ranks.share(lambda: refuse_upload(config.hub_id))
    set_seed(config.seed)
    data = from_config.data_settings(config)
    bad_records = BadRecords(data.on_bad_record)
    with ranks.first_here_first():  # shapes are drawn at first use
        train_examples = from_config.read_examples(data, data.train_split, data.max_train_samples, bad_records)
        eval_examples = from_config.read_examples(data, data.eval_split, data.max_eval_samples, bad_records)
    arguments = from_config.training_arguments(config, dist)
    if not _answered(eval_examples):
        arguments.metric_for_best_model = None

    stopped_by = train(config, dist, folder, arguments, train_examples, eval_examples, bad_records)
    if stopped_by:
        ranks.say(f"stopped by {stopped_by}, saved in {folder / 'latest'}; go on with resume=auto")
        return
    gc.collect()  # what trained makes room for what is scored: the model that was saved
    torch.cuda.empty_cache()
    metrics = score_and_report(
        config,
        folder,
        load(folder / "model", str(arguments.device)),
        eval_examples,
        train_examples,
        checkpoint=str(folder / "model"),
        split=data.eval_split,
        batch_size=arguments.per_device_eval_batch_size,
        workers=arguments.dataloader_num_workers,
        bad_records=bad_records,
    )
    if ranks.is_first():
        write_card(folder / "model", config.hub_id or config.run.name, metrics, OmegaConf.to_yaml(config, resolve=True))
        print(f"model:  {folder / 'model'}")
        if config.hub_id:
            print(f"hub:    {upload(folder / 'model', config.hub_id)}")


def train(
    config: DictConfig,
    dist: parallel.DistSettings,
    folder: Path,
    arguments: TrainingArguments,
    train_examples: list[Example],
    eval_examples: list[Example],
    bad_records: BadRecords,
) -> str | None:
    """Train and write `model/`; the signal that stopped it before its end, if one did."""
    data = from_config.data_settings(config)
    predictor = from_config.build_predictor(config, data, train_examples)
    for part in PARTS:
        set_trainable(getattr(predictor.model, part), config.trainable[part], part)
    # Before weights are sharded, which cached features are of.
    training_set = from_config.training_set(config, data, predictor, train_examples, bad_records)
    if dist.strategy == "fsdp":
        computed_in = torch.bfloat16 if arguments.bf16 else None
        parallel.shard(predictor.model, arguments.device, computed_in, dist.offload)

    def score_now(model: VLM) -> dict[str, float]:
        if not _answered(eval_examples):
            return {}  # a test split
        answers = replace(predictor, model=model).answer_examples(
            eval_examples,
            batch_size=arguments.per_device_eval_batch_size,
            workers=arguments.dataloader_num_workers,
            bad_records=bad_records,
        )
        return {"vqa_accuracy": score(eval_examples, {name: answer.text for name, answer in answers.items()}).overall}

    trainer = VqaTrainer(
        predictor.model,
        arguments,
        training_set,
        predictor.processor,
        learning_rates=group(config, "learning_rates"),
        score=score_now,
        dist=dist,
        settings=predictor.settings,
        clip_percentile=config.clip_percentile,
    )
    groups = trainer.parameter_groups()
    # Only now, when all that the command says has been understood, is anything written or replaced.
    checkpoint, told = ranks.share(lambda: open_run(folder, config, trainer.global_batch, ranks.world_size()))
    if ranks.is_first():
        bad_records.list_in(folder / "skipped.jsonl")
    bad_records.listing = folder / "skipped.jsonl"
    ranks.say("\n".join([*told, banner(predictor.model, groups)]))
    asked = f"{count_questions(train_examples):,} questions on {len(train_examples):,} images to train on, "
    ranks.say(
        f"{asked}{count_questions(eval_examples):,} on {len(eval_examples):,} to evaluate on; results in {folder}"
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.watch.stopped_by:
        return trainer.watch.stopped_by
    _write_model(folder / "model", predictor, trainer)
    return None


def _write_model(folder: Path, predictor: Predictor, trainer: VqaTrainer) -> None:
    """The same folder whatever trained it, enough for `vlmvqa.load` on one CPU."""
    if ranks.is_first():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    write_weights(trainer, folder / WEIGHTS)
    if ranks.is_first():
        predictor.describe(folder)
    ranks.barrier()


def _answered(examples: list[Example]) -> bool:
    return all(question.answers for example in examples for question in example.questions)


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    run(main, "train")
