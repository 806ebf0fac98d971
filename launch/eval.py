"""Score a trained model on a split; on all GPUs of a machine with `accelerate launch launch/eval.py ...`.

python launch/eval.py checkpoint=runs/demo data=shapes split=val
python launch/eval.py checkpoint=runs/vqa data=vqav2 data.root=/data/vqav2 split=val[:10%] decoding.beams=3
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

import from_config
from command_line import refuse_overrides, run
from results import score_and_report
from vlmvqa import ranks
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.errors import InputError
from vlmvqa.inference.predict import load
from vlmvqa.training import parallel


def main(config: DictConfig) -> None:
    folder = from_config.run_folder(config)
    parallel.start(parallel.DistSettings(), cpu=False)
    own = ("prompt", "resize", "reduced_decoding", "max_text_tokens")
    refuse_overrides("the checkpoint's own, as it was trained", *(f"data.{name}" for name in own))
    ranks.share(lambda: _refuse_results(config))
    data = from_config.data_settings(config)
    predictor = load(config.checkpoint, f"cuda:{ranks.local_rank()}" if torch.cuda.is_available() else "cpu")
    predictor.decoding = from_config.decoding(config, predictor.decoding)
    data = replace(data, prompt=predictor.prompt)
    bad_records = BadRecords(data.on_bad_record)
    with ranks.first_here_first():  # shapes are drawn at first use
        examples = from_config.read_examples(data, config.split, data.max_eval_samples, bad_records)

    with open_dict(config):  # what ran, for the record: the checkpoint's own
        config.decoding = asdict(predictor.decoding)
        config.data.prompt, config.data.resize = predictor.prompt, predictor.processor.images.resize
        config.data.reduced_decoding = predictor.processor.images.reduced
        config.data.max_text_tokens = predictor.processor.max_text_tokens
    if ranks.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        (folder / "skipped.jsonl").unlink(missing_ok=True)  # of the results that are overwritten
        bad_records.list_in(folder / "skipped.jsonl")
    bad_records.listing = folder / "skipped.jsonl"
    score_and_report(
        config,
        folder,
        predictor,
        examples,
        from_config.training_answers(data),
        checkpoint=str(config.checkpoint),
        split=config.split,
        batch_size=config.batch_size,
        workers=config.workers,
        bad_records=bad_records,
    )


def _refuse_results(config: DictConfig) -> None:
    folder = from_config.run_folder(config)
    if (folder / "metrics.json").exists() and not config.run.overwrite:
        raise InputError(f"{folder} already holds results; choose another run.name or set run.overwrite=true")


if __name__ == "__main__":
    run(main, "eval")
