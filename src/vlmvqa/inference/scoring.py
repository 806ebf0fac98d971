"""What a scored model leaves in its run's folder and on the screen: the same after training and by launch/eval.py."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL.Image import Image

import vlmvqa
from vlmvqa import fingerprint, ranks
from vlmvqa.code_state import code_state
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import DataSettings, submission_writer
from vlmvqa.errors import InputError, counted
from vlmvqa.extras.report.attribution import report_attributions
from vlmvqa.extras.report.gallery import Record
from vlmvqa.inference.answer_log import Journal
from vlmvqa.inference.evaluate import Asked, evaluate, table, write_results
from vlmvqa.inference.predictor import Answer, Predictor
from vlmvqa.training.log import read_log
from vlmvqa.training.samples import FILE as SAMPLES

PACKAGES = ("torch", "transformers", "timm", "tokenizers", "pillow", "rapidfuzz", "pycocoevalcap")


def score_and_report(
    config: DictConfig,
    folder: Path,
    predictor: Predictor,
    asked: Asked,
    data: DataSettings,
    *,
    name: str = "",
    checkpoint: str,
    split: str,
    batch_size: int,
    workers: int,
    bad_records: BadRecords,
) -> dict[str, Any]:
    """Score the model on a split, all ranks together; rank 0 writes and prints. Returns `metrics.json`'s content.

    Args:
        folder: the run's; the results of a mixture's task lie below it, in a folder of its `name`.
    """
    decoding = asdict(predictor.decoding)
    made_by = {
        "checkpoint": checkpoint,
        "checkpoint_fingerprint": fingerprint.weights(predictor.model),
        "decoding": decoding,
    }
    asked_for = {"data": fingerprint.examples(asked.examples), "pictures": fingerprint.pictures(asked.examples)}
    journal = Journal(folder / name, {**made_by, **asked_for, "images": asdict(predictor.processor.images)})

    def answer(examples: Sequence[Example]) -> dict[int | str, Answer]:
        return predictor.answer_examples(
            examples,
            batch_size=batch_size,
            workers=workers,
            bad_records=bad_records,
            progress=True,
            journal=journal,
        )

    answers = answer(asked.examples)
    missing = [question.id for question in asked.questions if question.id not in answers]
    if missing and bad_records.policy == "error":
        raise InputError(
            f"{counted(len(missing), 'question')} without an answer (the first is {missing[0]}); start the same again"
        )
    found, predictions = evaluate(asked, answers, answer)
    facts = {**made_by, "split": split, "prompt": data.prompt}
    attributions: Sequence[tuple[Record, Image]] | str = ()
    if ranks.is_first():
        asks_so = replace(predictor, prompt=data.prompt)  # of a mixture's tasks each has its own
        attributions = report_attributions(asks_so, asked.examples, predictions, asked.metric, config.attributions)
    metrics = report(config, folder, asked, data, facts, found, predictions, bad_records, name, attributions)
    ranks.barrier()
    if ranks.is_first():
        journal.remove()
    return metrics


def versions() -> dict[str, str]:
    """Of Python and of the packages that answer and score, as far as they are installed."""
    found = {"vlmvqa": vlmvqa.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def report(
    config: DictConfig,
    folder: Path,
    asked: Asked,
    data: DataSettings,
    facts: Mapping[str, Any],
    found: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    bad_records: BadRecords,
    name: str = "",
    attributions: Sequence[tuple[Record, Image]] | str = (),
) -> dict[str, Any]:
    """Leave the results in the folder and print them, on rank 0.

    Args:
        facts: who answered, and how.
        found: what `evaluate` found.
        attributions: answers with where the model looked, for the report; or why there are none.
    """
    metrics = {
        **facts,
        "data": data.source,
        "max_samples": data.max_eval_samples,
        "data_fingerprint": fingerprint.examples(asked.examples),
        **found,
        "skipped": bad_records.listed(),
        "versions": versions(),
        "code": str(code_state()),
    }
    if not ranks.is_first():
        return metrics
    prefix = f"eval_{name}_" if name else "eval_"
    log = [
        {key.replace(prefix, "eval_", 1): value for key, value in record.items()}
        for record in read_log(folder / "log.jsonl")
    ]
    samples = [record for record in read_log(folder / SAMPLES) if record["task"] == name]
    folder = folder / name
    write_results(
        folder,
        metrics,
        predictions,
        asked.examples,
        submission_writer(data.source),
        title=f"{config.run.name}: {name or data.source} {facts['split']}",
        log=log,
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
        samples=samples,
        attributions=attributions,
    )
    if name:
        print(f"\n{name} {facts['split']}")
    print(table(metrics))
    if metrics["skipped"]:
        print(f"left out {len(metrics['skipped'])} bad records, listed in {bad_records.listing}")
    print(f"report: {folder / 'report.html'}")
    return metrics
