"""Score a trained model on a split.

python launch/eval.py checkpoint=runs/demo data=shapes split=val
python launch/eval.py checkpoint=runs/vqa data=vqav2 data.root=/data/vqav2 split=val[:10%] decoding.beams=3
"""

from __future__ import annotations

from dataclasses import asdict, replace

from omegaconf import DictConfig, OmegaConf, open_dict

import from_config
from command_line import refuse_overrides, run
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.errors import InputError
from vlmvqa.inference.evaluate import evaluate, table, write_results
from vlmvqa.inference.predict import load


def main(config: DictConfig) -> None:
    folder = from_config.run_folder(config)
    if (folder / "metrics.json").exists() and not config.run.overwrite:
        raise InputError(f"{folder} already holds results; choose another run.name or set run.overwrite=true")
    refuse_overrides("the checkpoint's own, as it was trained", "data.prompt", "data.resize", "data.max_text_tokens")
    data = from_config.data_settings(config)
    predictor = load(config.checkpoint)
    predictor.decoding = from_config.decoding(config, predictor.decoding)
    data = replace(data, prompt=predictor.prompt)
    bad_records = BadRecords(data.on_bad_record)
    examples = from_config.read_examples(data, config.split, data.max_eval_samples, bad_records)

    with open_dict(config):  # what ran, for the record: the checkpoint's own
        config.decoding = asdict(predictor.decoding)
        config.data.prompt, config.data.resize = predictor.prompt, predictor.processor.images.resize
        config.data.max_text_tokens = predictor.processor.max_text_tokens
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    (folder / "skipped.jsonl").unlink(missing_ok=True)  # of the results that are overwritten
    bad_records.list_in(folder / "skipped.jsonl")
    facts = {"checkpoint": str(config.checkpoint), "split": config.split, "data": data.source, "prompt": data.prompt}
    metrics, predictions = evaluate(
        predictor,
        examples,
        from_config.training_answers(data),
        facts | {"decoding": asdict(predictor.decoding)},
        batch_size=config.batch_size,
        workers=config.workers,
        seed=config.seed,
        bad_records=bad_records,
    )
    write_results(
        folder,
        metrics,
        predictions,
        examples,
        title=f"{config.checkpoint}: {data.source} {config.split}",
        log=[],
        config_yaml=OmegaConf.to_yaml(config, resolve=True),
    )
    print(table(metrics))
    if metrics["skipped"]:
        print(f"left out {len(metrics['skipped'])} bad records, listed in {bad_records.listing}")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run(main, "eval")
