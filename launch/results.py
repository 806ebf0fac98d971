"""What a scored model leaves in its run's folder and on the screen: the same after training and by launch/eval.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlmvqa import ranks
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.inference.evaluate import evaluate, table, write_results
from vlmvqa.inference.predict import Predictor
from vlmvqa.training.log import read_log


def score_and_report(
    config: DictConfig,
    folder: Path,
    predictor: Predictor,
    examples: Sequence[Example],
    train: Sequence[Example] | str,
    *,
    checkpoint: str,
    split: str,
    batch_size: int,
    workers: int,
    bad_records: BadRecords,
) -> dict[str, Any]:
    """Score the model on a split, all ranks together; rank 0 writes and prints. Returns `metrics.json`'s content.

    Args:
        train: the training split, for the prior control; or the reason why there is none.
    """
    facts = {"checkpoint": checkpoint, "split": split, "data": config.data.source, "prompt": predictor.prompt}
    metrics, predictions = evaluate(
        predictor,
        examples,
        train,
        facts | {"decoding": asdict(predictor.decoding)},
        batch_size=batch_size,
        workers=workers,
        seed=config.seed,
        bad_records=bad_records,
    )
    if not ranks.is_first():
        return metrics
    write_results(
        folder,
        metrics,
        predictions,
        examples,
        title=f"{config.run.name}: {config.data.source} {split}",
        log=read_log(folder / "log.jsonl"),
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
    )
    print(table(metrics))
    if metrics["skipped"]:
        print(f"left out {len(metrics['skipped'])} bad records, listed in {bad_records.listing}")
    print(f"report: {folder / 'report.html'}")
    return metrics
