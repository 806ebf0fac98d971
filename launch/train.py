"""Train, score, report.

python launch/train.py                                             the tiny model on shapes
python launch/train.py model=dinov2_gemma2_2b data=vqav2 data.root=/data/vqav2
python launch/train.py resume=auto                                 go on where the run stood
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

import from_config
from command_line import run
from from_config import group
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.batch import TrainingSet, split_questions
from vlmvqa.data.example import count_questions
from vlmvqa.errors import InputError, suggest
from vlmvqa.inference.evaluate import evaluate, score, table, write_results
from vlmvqa.models.vlm import set_trainable
from vlmvqa.sequence.masks import SHAREABLE
from vlmvqa.training.banner import banner
from vlmvqa.training.checkpoints import remove_unfinished, whole_checkpoints
from vlmvqa.training.trainer import PARTS, VqaTrainer, read_log


def train(config: DictConfig) -> None:
    folder = from_config.run_folder(config)
    refuse_run(folder, config.resume, config.run.overwrite)
    set_seed(config.seed)
    data = from_config.data_settings(config)
    bad_records = BadRecords(data.on_bad_record)
    train_examples = from_config.read_examples(data, data.train_split, data.max_train_samples, bad_records)
    eval_examples = from_config.read_examples(data, data.eval_split, data.max_eval_samples, bad_records)

    predictor = from_config.build_predictor(config, data, train_examples)
    for part in PARTS:
        set_trainable(getattr(predictor.model, part), config.trainable[part], part)
    questions_per_row = data.questions_per_row if predictor.model.mode in SHAREABLE else 1
    training_set = TrainingSet(
        split_questions(train_examples, questions_per_row), predictor.processor, data.target, config.seed, bad_records
    )
    arguments = training_arguments(group(config, "trainer"), folder, config.seed)

    def score_now() -> dict[str, float]:
        if not all(question.answers for example in eval_examples for question in example.questions):
            return {}  # a test split
        answers = predictor.answer_examples(
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
        images_per_row=data.images_per_row,
        learning_rates=group(config, "learning_rates"),
        score=score_now,
    )
    # Only now, when all that the command says has been understood, is anything written or replaced.
    checkpoint = open_run(folder, config.resume)
    if checkpoint is not None:
        refuse_changes(folder, config)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    bad_records.list_in(folder / "skipped.jsonl")
    print(banner(predictor.model, trainer.parameter_groups()))
    print(f"{count_questions(train_examples):,} questions on {len(train_examples):,} images to train on, ", end="")
    print(f"{count_questions(eval_examples):,} on {len(eval_examples):,} to evaluate on; all results in {folder}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    predictor.save(folder / "model")

    facts = {"checkpoint": str(folder / "model"), "split": data.eval_split, "data": data.source, "prompt": data.prompt}
    metrics, predictions = evaluate(
        predictor,
        eval_examples,
        train_examples,
        facts | {"decoding": group(config, "decoding")},
        batch_size=arguments.per_device_eval_batch_size,
        workers=arguments.dataloader_num_workers,
        bad_records=bad_records,
    )
    write_results(
        folder,
        metrics,
        predictions,
        eval_examples,
        title=f"{config.run.name}: {data.source} {data.eval_split}",
        log=read_log(folder / "log.jsonl"),
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
    )
    print(table(metrics))
    if metrics["skipped"]:
        print(f"left out {len(metrics['skipped'])} bad records, listed in {bad_records.listing}")
    print(f"report: {folder / 'report.html'}\nmodel:  {folder / 'model'}")


def refuse_run(folder: Path, resume: str | None, overwrite: bool) -> None:
    """Stop where the folder holds a run that is neither to go on nor to be replaced."""
    if resume not in (None, "auto"):
        raise InputError(f"resume={resume} is unknown; use resume=auto, or leave it out to start anew")
    if resume is None and (folder / "log.jsonl").exists() and not overwrite:
        raise InputError(
            f"{folder} already holds a run; go on with resume=auto, choose another run.name, "
            "or replace it with run.overwrite=true"
        )


def open_run(folder: Path, resume: str | None) -> Path | None:
    """Make the run's folder, empty if the run starts anew; the checkpoint to go on from, if any."""
    if resume is None and (folder / "log.jsonl").exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if resume is None:
        (folder / "skipped.jsonl").unlink(missing_ok=True)  # of a run that ended before its first step
    checkpoints = whole_checkpoints(folder)
    for unfinished in remove_unfinished(folder):
        print(f"{unfinished} was cut short while it was written and is removed")
    return checkpoints[-1] if resume == "auto" and checkpoints else None


def refuse_changes(folder: Path, config: DictConfig) -> None:
    """Stop a resumed run whose model, data, seed or trained parts are not those of its checkpoint."""
    before, now = OmegaConf.load(folder / "config.yaml"), OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    free = ("data.eval_split", "data.max_eval_samples", "data.on_bad_record", "model.language.attention")
    for node in ("model", "data", "seed", "trainable"):
        values = [_flat(OmegaConf.to_container(c).get(node), node) for c in (before, now)]
        for key in sorted(values[0] | values[1]):
            if values[0].get(key) != values[1].get(key) and key not in free:
                raise InputError(
                    f"{folder} was trained with {key}={values[0].get(key)}, now it is {values[1].get(key)}: "
                    "give it as it was, or start another run.name"
                )


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}.{part}").items()}


def training_arguments(values: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """transformers' TrainingArguments; what a run is (its folder and seed) is set by us."""
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
    values = {"dataloader_pin_memory": torch.cuda.is_available(), **values}
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,  # a NaN is an error here, not smoothed away
            **values,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"trainer: {str(error).strip().splitlines()[0]}") from error
    # One process drives one GPU: the Trainer's DataParallel would split a batch's rows from their images.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    run(train, "train")
