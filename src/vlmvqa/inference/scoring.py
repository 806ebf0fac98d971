"""Score a model on a task and write the results: the same after training and by launch/eval.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmvqa import fingerprint, ranks
from vlmvqa.code_state import code_state, versions
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example
from vlmvqa.data.tasks import source_module
from vlmvqa.errors import BadRecords, InputError, counted
from vlmvqa.inference.answer_log import AnswerLog
from vlmvqa.inference.evaluate import EvalSpec, evaluate, table
from vlmvqa.inference.predictor import Answer, Predictor
from vlmvqa.paths import replace_file


@dataclass(frozen=True)
class ScoredTask:
    """A task to score.

    Attributes:
        spec: questions, references and metric.
        split: the name of the split.
        name: the mixture's name for the task; "" for a single task.
    """

    spec: EvalSpec
    data: DataSettings
    split: str
    name: str = ""


@dataclass(frozen=True)
class Output:
    """Output folder of an evaluation, and the options of its report.

    Attributes:
        folder: the run's; the results of a mixture's task are written to a folder of its name in it.
        run_name: the title of the report.
        report: whether `report.html` is written.
        attributions: how many answers the report shows with attribution maps.
    """

    folder: Path
    run_name: str
    config_yaml: str
    report: bool = True
    attributions: int = 0


def score_and_report(
    predictor: Predictor,
    checkpoint: str,
    task: ScoredTask,
    output: Output,
    bad_records: BadRecords,
    *,
    batch_size: int,
    workers: int,
) -> dict[str, Any]:
    """Answer and score a task, all ranks together; rank 0 writes and prints. Return the content of `metrics.json`."""
    spec = task.spec
    assert predictor.folder is not None, "a model is scored after it was saved"
    made_by = {
        "checkpoint": checkpoint,
        "checkpoint_fingerprint": fingerprint.weights_in(predictor.folder),
        "dtype": predictor.dtype,
        "decoding": asdict(predictor.decoding),
    }
    depends = {
        **made_by,
        "data": fingerprint.examples(spec.examples),
        "image_files": fingerprint.image_files(spec.examples),
        "images": asdict(predictor.processor.images),
    }
    answer_log = AnswerLog(output.folder / task.name, depends)

    def answer(examples: Sequence[Example]) -> dict[int | str, Answer]:
        return predictor.answer_examples(
            examples,
            batch_size=batch_size,
            workers=workers,
            bad_records=bad_records,
            progress=True,
            answer_log=answer_log,
        )

    answers = answer(spec.examples)
    missing = [question.id for question in spec.questions if question.id not in answers]
    if missing and bad_records.policy == "error":
        raise InputError(
            f"{counted(len(missing), 'question')} without an answer (the first is {missing[0]}); start the same again"
        )
    found, predictions = evaluate(spec, answers, answer)
    maps: Any = ()
    if ranks.is_first() and output.report and output.attributions:
        from vlmvqa.extras.report.run_report import attributions

        maps = attributions(predictor, task.data.prompt, spec.examples, predictions, spec.metric, output.attributions)
    facts = {**made_by, "split": task.split, "prompt": task.data.prompt}
    metrics = write_results(task, output, facts, found, predictions, bad_records, maps)
    ranks.barrier()
    if ranks.is_first():
        answer_log.remove()
    return metrics


def write_results(
    task: ScoredTask,
    output: Output,
    facts: Mapping[str, Any],
    found: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    bad_records: BadRecords,
    maps: Any = (),
) -> dict[str, Any]:
    """Write `predictions.jsonl`, `submission.json`, `report.html` and `metrics.json`, and print the scores, on rank 0.

    Args:
        facts: which model answered, and how.
        found: what `evaluate` returned.
        maps: answers with their attribution maps, or the reason why there are none.

    Returns:
        the content of `metrics.json`, on every rank.
    """
    metrics = {
        **facts,
        "data": task.data.source,
        "max_samples": task.data.max_eval_samples,
        "data_fingerprint": fingerprint.examples(task.spec.examples),
        **found,
        "skipped": bad_records.listed(),
        "versions": versions(),
        "code": str(code_state()),
    }
    if not ranks.is_first():
        return metrics
    folder = output.folder / task.name
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in predictions)
    replace_file(folder / "predictions.jsonl", "".join(lines))
    answers = {record["question_id"]: record["answer"] for record in predictions}
    source_module(task.data.source).write_submission(folder / "submission.json", answers)
    if output.report:
        from vlmvqa.extras.report.run_report import write_run_report

        title = f"{output.run_name}: {task.name or task.data.source} {task.split}"
        examples = task.spec.examples
        write_run_report(output.folder, task.name, title, output.config_yaml, metrics, predictions, examples, maps)
    # Last: a folder that has it is complete.
    replace_file(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if task.name:
        print(f"\n{task.name} {task.split}")
    print(table(metrics))
    if metrics["skipped"]:
        print(f"left out {len(metrics['skipped'])} bad records, listed in {bad_records.listing}")
    print(f"report: {folder / 'report.html'}" if output.report else f"results: {folder / 'metrics.json'}")
    return metrics
