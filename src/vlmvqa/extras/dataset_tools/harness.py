"""Files by which evaluation harnesses read a split: a task of lmms-eval, or a table for VLMEvalKit.

    lmms_eval     vlmvqa_<source>_<split>.parquet, a question per row with its image; utils.py; two tasks:
                  vlmvqa_<source>_<split>.yaml generates answers, ..._loglikelihood.yaml scores the target
    vlmevalkit    vlmvqa_<source>_<split>.tsv, whose name selects VLMEvalKit's metric

The prompt is the question alone, because the model's own template is applied to it.
"""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example, Question, all_answered
from vlmvqa.errors import BadRecords, InputError, suggest
from vlmvqa.extras.hub.parquet import require
from vlmvqa.extras.shards.shards import image_bytes
from vlmvqa.paths import replace_file

# By metric: the scoring of lmms-eval's own task of the benchmark, and the part of the name by which VLMEvalKit selects
# a metric (`evaluate_heuristic` in vlmeval/dataset/image_vqa.py; without one it is VQA accuracy).
METRICS = {
    "vqa_accuracy": ("process_results: !function utils.vqa_accuracy\n", "exact_match", ""),
    "anls": ("", "anls", "_DocVQA"),
    "gqa_accuracy": ("", "exact_match\n    ignore_case: true\n    ignore_punctuation: true", "_GQA"),
    "exact_match": ("", "exact_match", "_OCRVQA"),
}
TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files: {{{split}: {file}}}
test_split: {split}
output_type: {output_type}
doc_to_visual: !function utils.image
doc_to_text: question
doc_to_target: {target}
{scoring}metric_list:
  - aggregation: mean
    higher_is_better: true
    metric: {metric}
lmms_eval_specific_kwargs:
  default: {{pre_prompt: "", post_prompt: ""}}
metadata:
  - version: 1.0
"""
UTILS = '''\
"""Functions of the tasks in this folder."""

from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val


def image(doc):
    return [doc["image"]]


def vqa_accuracy(doc, results):
    """Score as lmms-eval's own task vqav2_val."""
    answers = [{"answer": answer, "answer_id": number} for number, answer in enumerate(doc["answers"])]
    return vqav2_process_results_val({**doc, "answers": answers}, results)


def log_likelihood(doc, results):
    log_probability, is_greedy = results[0]
    return {"log_likelihood": log_probability, "is_greedy": float(is_greedy)}
'''


def write(
    format: str, folder: Path, data: DataSettings, split: str, examples: Sequence[Example], bad_records: BadRecords
) -> str:
    """Write a split in a harness's format; return the name of the task or dataset.

    Args:
        format: `lmms_eval` or `vlmevalkit`.

    Raises:
        InputError: the format is unknown, the harness has no equivalent of the metric, the split has no answers, or the
            folder cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"harness.format={format} is unknown{suggest(format, FORMATS)}; use {' or '.join(FORMATS)}")
    if data.metric not in METRICS:
        raise InputError(f"data.metric={data.metric} has no equivalent in {format}; only {', '.join(METRICS)} have one")
    if not all_answered(examples):
        raise InputError(f"{data.source} {split}: some questions have no answers to score against; use another split")
    name = re.sub(r"\W+", "_", f"vlmvqa_{data.source}_{split}").strip("_")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FORMATS[format](folder, name, data.metric, split, _readable(examples, bad_records))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}); free space, or choose another harness.dir"
        ) from None


def _readable(examples: Sequence[Example], bad_records: BadRecords) -> Iterator[tuple[bytes, tuple[Question, ...]]]:
    for example in examples:
        if (content := image_bytes(example, bad_records)) is not None:
            yield content, example.questions


def _lmms_eval(
    folder: Path, name: str, metric: str, split: str, examples: Iterator[tuple[bytes, tuple[Question, ...]]]
) -> str:
    _write_parquet(folder / f"{name}.parquet", examples)
    scoring, theirs, _ = METRICS[metric]
    split = re.sub(r"\W.*", "", split)  # `datasets` would take a slice of a split for its own
    about = {"file": f"{name}.parquet", "split": split}
    target = "answers" if metric in ("anls", "exact_match") else "target"
    generate = TASK.format(
        name=name, output_type="generate_until", target=target, scoring=scoring, metric=theirs, **about
    )
    likelihood = TASK.format(
        name=f"{name}_loglikelihood",
        output_type="loglikelihood",
        target="target",
        scoring="process_results: !function utils.log_likelihood\n",
        metric="log_likelihood",
        **about,
    )
    replace_file(folder / "utils.py", UTILS)
    replace_file(folder / f"{name}.yaml", generate)
    replace_file(folder / f"{name}_loglikelihood.yaml", likelihood)
    return name


def _write_parquet(path: Path, examples: Iterator[tuple[bytes, tuple[Question, ...]]]) -> None:
    """Write a row per question; the schema's metadata marks the image for the library `datasets`."""
    datasets, arrow = require("datasets", "harness"), require("pyarrow", "harness")
    parquet, text = require("pyarrow.parquet", "harness"), datasets.Value("string")
    features = {"question_id": text, "question": text, "answers": [text], "target": text, "image": datasets.Image()}
    schema = datasets.Features(features).arrow_schema
    with parquet.ParquetWriter(path, schema) as writer:
        for content, questions in examples:
            rows = [
                {
                    "question_id": str(question.id),
                    "question": question.text,
                    "answers": list(question.answers),
                    "target": question.target or question.answers[0],
                    "image": {"bytes": content, "path": None},
                }
                for question in questions
            ]
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))


def _vlmevalkit(
    folder: Path, name: str, metric: str, split: str, examples: Iterator[tuple[bytes, tuple[Question, ...]]]
) -> str:
    name += METRICS[metric][2]
    with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(("index", "question_id", "question", "answer", "image"))
        number = 0
        for content, questions in examples:
            image: Any = base64.b64encode(content).decode()
            for question in questions:
                # As JSON and as a list, because pandas would read 007 as a number and None as missing.
                row = (number, json.dumps(question.id), question.text, str(list(question.answers)), image)
                table.writerow(row)
                if len(str(image)) > MOST_REFERENCE:
                    image = number  # later questions refer to the row with the image
                number += 1
    return name


MOST_REFERENCE = 64  # VLMEvalKit takes a shorter text for the index of a row
FORMATS = {"lmms_eval": _lmms_eval, "vlmevalkit": _vlmevalkit}
