"""Score answers on a split; on all GPUs of a machine with `accelerate launch launch/eval.py ...`.

python launch/eval.py checkpoint=runs/demo data=shapes split=val
python launch/eval.py checkpoint=runs/vqa data=vqav2 data.root=/data/vqav2 split=val[:10%] decoding.beams=3
python launch/eval.py predictions=answers.jsonl data=gqa data.root=/data/gqa split=testdev
python launch/eval.py compare=[runs/eval-one,runs/eval-two]

The same command resumes a run that was killed.
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

import from_config
from vlmvqa import ranks
from vlmvqa.cli import refuse_overrides, run
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, all_answered
from vlmvqa.data.tasks import DataSettings, one_task, read_examples, scoring, submission_name, training_answers
from vlmvqa.errors import InputError
from vlmvqa.extras.report import compare
from vlmvqa.inference.evaluate import Asked, evaluate, read_answers
from vlmvqa.inference.predictor import load
from vlmvqa.inference.scoring import report, score_and_report
from vlmvqa.metrics.registry import check_scorable
from vlmvqa.training import distributed


def main(config: DictConfig) -> None:
    if config.compare is not None:
        compare_two(config)
        return
    distributed.start(distributed.DistSettings(), cpu=False)
    ranks.broadcast_from_rank0(lambda: _refuse_results(config))
    if config.predictions is not None:
        score_predictions(config)
    else:
        score_checkpoint(config)


def score_checkpoint(config: DictConfig) -> None:
    """Load a model, answer the split, score."""
    own = ("prompt", "resize", "reduced_decoding", "max_text_tokens")
    refuse_overrides("the checkpoint's own, as it was trained", *(f"data.{name}" for name in own))
    data = one_task(config)
    predictor = load(config.checkpoint, f"cuda:{ranks.local_rank()}" if torch.cuda.is_available() else "cpu")
    predictor.decoding = from_config.decoding(config, predictor.decoding)
    prompt = predictor.prompt_for(data.source, data.prompt)
    if predictor.prompts and data.source not in predictor.prompts:  # a model that was saved before has none
        ranks.say(f"the model was not trained on {data.source}; it is asked with the prompt {prompt!r}")
    predictor.prompt, data = prompt, replace(data, prompt=prompt)
    with open_dict(config):  # what ran, for the record: the checkpoint's own
        config.decoding = asdict(predictor.decoding)
        config.data.prompt, config.data.resize = prompt, predictor.processor.images.resize
        config.data.reduced_decoding = predictor.processor.images.reduced
        config.data.max_text_tokens = predictor.processor.max_text_tokens
    examples, bad_records = _read(config, data)
    score_and_report(
        config,
        from_config.run_folder(config),
        predictor,
        _asked(config, data, examples),
        data,
        checkpoint=str(config.checkpoint),
        split=config.split,
        batch_size=config.batch_size,
        workers=config.workers,
        bad_records=bad_records,
    )


def score_predictions(config: DictConfig) -> None:
    """Score answers that something else wrote; no model is loaded."""
    data = one_task(config)
    examples, bad_records = _read(config, data)
    asked, none = _asked(config, data, examples), "no model was loaded, only its answers"
    answers = read_answers(Path(config.predictions).expanduser(), asked.questions, submission_name(data.source))
    found, predictions = evaluate(asked, answers, none)
    facts = {"predictions": str(config.predictions), "split": config.split}
    report(
        config, from_config.run_folder(config), asked, data, facts, found, predictions, bad_records, attributions=none
    )


def compare_two(config: DictConfig) -> None:
    """Two results on the same questions."""
    if ranks.world_size() > 1:
        raise InputError("two results are compared by one process; start it with python, without a launcher")
    found = compare.compare_runs(*(Path(folder).expanduser() for folder in config.compare), seed=config.seed)
    folder = from_config.run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(compare.table(found))
    print(f"all of them: {folder / 'compare.json'}")


def _asked(config: DictConfig, data: DataSettings, examples: list[Example]) -> Asked:
    answered = all_answered(examples)
    if answered:
        check_scorable(data.metric, examples)
        for name, more in data.extra.items():
            check_scorable(name, examples, **more)
    train = training_answers(data) if answered else "the split has no answers"
    options = scoring(data, config.split)
    return Asked(examples, train, data.metric, config.seed, config.blank_images, config.variants, options, data.extra)


def _read(config: DictConfig, data: DataSettings) -> tuple[list[Example], BadRecords]:
    """The split; what is left out of it is listed in the run's folder."""
    folder, bad_records = from_config.run_folder(config), BadRecords(data.on_bad_record)
    with ranks.local_main_first():  # shapes are drawn at first use
        examples = read_examples(data, config.split, data.max_eval_samples, bad_records)
    if ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        (folder / "skipped.jsonl").unlink(missing_ok=True)  # of the results that are overwritten
        bad_records.list_in(folder / "skipped.jsonl")
    bad_records.listing = folder / "skipped.jsonl"
    return examples, bad_records


def _refuse_results(config: DictConfig) -> None:
    folder = from_config.run_folder(config)
    if (folder / "metrics.json").exists() and not config.run.overwrite:
        raise InputError(f"{folder} already holds results; choose another run.name or set run.overwrite=true")


if __name__ == "__main__":
    run(main, "eval")
