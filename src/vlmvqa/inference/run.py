"""An evaluation run: score a saved model on a split, score a file of answers, or compare two results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlmvqa import ranks
from vlmvqa.config.compose import refuse_overrides, to_yaml
from vlmvqa.config.inference_schema import EvalConfig, override_decoding
from vlmvqa.config.schema import DataSettings, DistSettings
from vlmvqa.data.example import Example, all_answered
from vlmvqa.data.tasks import metric_options, read_examples, source_module
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.inference.evaluate import EvalSpec, evaluate
from vlmvqa.inference.predictor import load
from vlmvqa.inference.scoring import Output, ScoredTask, score_and_report, write_results
from vlmvqa.metrics.registry import check_scorable
from vlmvqa.training import distributed

# Settings of the data that belong to the model: it must read images and prompts as in training.
TRAINED_WITH = ("data.prompt", "data.resize", "data.reduced_decoding", "data.tiles", "data.max_text_tokens")


def evaluate_run(config: EvalConfig) -> None:
    """Run launch/eval.py's command."""
    if config.compare is not None:
        _compare(config)
        return
    distributed.start(DistSettings(), cpu=False)
    ranks.broadcast_from_rank0(lambda: _refuse_results(config))
    if config.predictions is not None:
        metrics = _score_predictions(config, config.predictions)
    else:
        metrics = _score_checkpoint(config)
    if config.expected is not None:
        overall = metrics["metrics"].get(metrics["metric"], {}).get("overall")
        ranks.print_on_rank0(config.expected.compare(overall))


def _score_checkpoint(config: EvalConfig) -> dict[str, Any]:
    """Load a model, answer the split, score; return the content of `metrics.json`."""
    refuse_overrides(config.given, "the checkpoint's own, as it was trained", *TRAINED_WITH)
    data = _data(config)
    device = f"cuda:{ranks.local_rank()}" if torch.cuda.is_available() else "cpu"
    predictor = load(str(config.checkpoint), device, config.dtype)
    predictor.decoding = override_decoding(predictor.decoding, config.decoding, config.given)
    prompt = predictor.prompt_for(data.source, data.prompt)
    if predictor.prompts and data.source not in predictor.prompts:  # a model that was saved before has none
        ranks.print_on_rank0(f"the model was not trained on {data.source}; the prompt is {prompt!r}")
    predictor.prompt = prompt
    images = predictor.processor.images
    data = replace(
        data,
        prompt=prompt,
        resize=images.resize,
        reduced_decoding=images.reduced,
        tiles=images.tiles,
        max_text_tokens=predictor.processor.max_text_tokens,
    )
    config = replace(config, decoding=predictor.decoding, data=data)  # recorded as it runs
    examples, bad_records = _read(config, data)
    return score_and_report(
        predictor,
        str(config.checkpoint),
        _task(config, data, examples),
        _output(config),
        bad_records,
        batch_size=config.batch_size,
        workers=config.workers,
    )


def _score_predictions(config: EvalConfig, path: str) -> dict[str, Any]:
    """Score answers that another program wrote, without a model; return the content of `metrics.json`."""
    from vlmvqa.inference.answer_file import read_answers

    data = _data(config)
    examples, bad_records = _read(config, data)
    task, none = _task(config, data, examples), "no model was loaded, only its answers"
    submission_name = getattr(source_module(data.source), "submission_name", lambda key: key)
    answers = read_answers(Path(path).expanduser(), task.spec.questions, submission_name)
    found, predictions = evaluate(task.spec, answers, none)
    facts = {"predictions": path, "split": task.split}
    return write_results(task, _output(config), facts, found, predictions, bad_records, none)


def _compare(config: EvalConfig) -> None:
    """Compare two results on the same questions."""
    from vlmvqa.extras.report import compare

    if ranks.world_size() > 1:
        raise InputError("two results are compared by one process; start it with python, without a launcher")
    assert config.compare is not None
    first, second = (Path(folder).expanduser() for folder in config.compare)
    found = compare.compare_runs(first, second, seed=config.seed)
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(compare.table(found))
    print(f"all of them: {folder / 'compare.json'}")


def _data(config: EvalConfig) -> DataSettings:
    assert config.data is not None  # refused before PyTorch was imported
    return config.data.single


def _task(config: EvalConfig, data: DataSettings, examples: list[Example]) -> ScoredTask:
    answered, split = all_answered(examples), str(config.split)
    if answered:
        check_scorable(data.metric, examples)
        for name, more in data.extra.items():
            check_scorable(name, examples, **more)
    train = training_answers(data) if answered else "the split has no answers"
    spec = EvalSpec(
        examples,
        train,
        data.metric,
        config.seed,
        config.blank_images,
        config.variants,
        metric_options(data, split),
        data.extra,
    )
    return ScoredTask(spec, data, split)


def _output(config: EvalConfig) -> Output:
    name = str(config.run.name)
    return Output(config.run.folder, name, to_yaml(config), config.report, config.attributions)


def _read(config: EvalConfig, data: DataSettings) -> tuple[list[Example], BadRecords]:
    """Read the split; skipped records are listed in the run's folder."""
    folder, bad_records = config.run.folder, BadRecords(data.on_bad_record)
    with ranks.local_main_first():  # synthetic data is generated at first use
        examples = read_examples(data, str(config.split), data.max_eval_samples, bad_records)
    if ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "skipped.jsonl").unlink(missing_ok=True)  # of the results that are overwritten
        bad_records.list_in(folder / "skipped.jsonl")
    bad_records.listing = folder / "skipped.jsonl"
    return examples, bad_records


def _refuse_results(config: EvalConfig) -> None:
    folder = config.run.folder
    if (folder / "metrics.json").exists() and not config.run.overwrite:
        raise InputError(f"{folder} already holds results; choose another run.name or set run.overwrite=true")


def training_answers(settings: DataSettings) -> list[Example] | str:
    """Return the training split, for the prior control; or the reason why it cannot be read."""
    if settings.hub is not None and settings.streaming:
        return "the training split is streamed, and would all have to be fetched"
    try:
        return read_examples(settings, settings.train_split, settings.max_train_samples, BadRecords("skip"))
    except InputError as error:
        return f"the training split cannot be read ({error})"
