"""Look at one sample as the model reads it: tokens, roles, supervision, positions, and who sees whom.

python launch/show.py sample=3
python launch/show.py model.mode=causal data=vqav2 data.root=/data/vqav2
python launch/show.py model=tiny_paligemma data.row_tokens=null
"""

from __future__ import annotations

import usage  # noqa: F401 - first: it answers -h without PyTorch

import torch
from omegaconf import DictConfig, open_dict

import from_config
from vlmvqa.cli import run
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example
from vlmvqa.data.packing import split
from vlmvqa.data.processor import Processor
from vlmvqa.data.tasks import DataSettings, one_task, read_examples
from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.extras.report.row_drawing import describe, draw
from vlmvqa.inference import build


def main(config: DictConfig) -> None:
    folder = from_config.run_folder(config)
    data = one_task(config)
    bad_records = BadRecords(data.on_bad_record, folder / "skipped.jsonl")
    examples = read_examples(data, config.split, None, bad_records)
    processor, most = _processor(config, data, examples)
    parts = [one.part(*ends) for one in examples for ends in split([0] * len(one.questions), None, most)]
    if not 0 <= config.sample < len(parts):
        raise InputError(f"sample={config.sample}: {config.split} has samples 0 to {len(parts) - 1}")
    example = parts[config.sample]
    batch = processor.collate([[processor.encode(example, [question.target for question in example.questions])]])
    folder.mkdir(parents=True, exist_ok=True)
    print(example.name)
    print(describe(batch, processor))
    draw(batch, processor, folder / "row.png", title=example.name)
    print(f"picture: {folder / 'row.png'}")


def _processor(config: DictConfig, data: DataSettings, examples: list[Example]) -> tuple[Processor, int | None]:
    """What lays the rows out, and how many questions may share one; sizes and the tokenizer are enough, no weights."""
    settings, tokenizer = build.model_settings(config)
    if isinstance(settings, PretrainedSettings):
        return build.pretrained_processor(settings, tokenizer, data, examples)[0], 1
    with open_dict(config), torch.device("meta"):
        config.model.vision.weights = config.model.language.weights = "random"
        processor = build.build_predictor(config, data, examples).processor
    return processor, from_config.most_questions(data, processor.mode)


if __name__ == "__main__":
    run(main, "show")
