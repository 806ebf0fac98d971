"""One sample as the model reads it: its tokens, and a drawing of the row and its attention mask."""

from __future__ import annotations

from dataclasses import dataclass

from vlmvqa.config.schema import AnyModelSettings, DataSettings, RunSettings
from vlmvqa.data.packing import split_questions
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.report.row_drawing import describe, draw
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import GenerationSettings


@dataclass(frozen=True)
class ShowConfig:
    """Config of launch/show.py; conf/show.yaml documents its keys."""

    run: RunSettings
    data: DataSettings
    model: AnyModelSettings
    decoding: GenerationSettings
    split: str = "train"
    sample: int = 0
    given: frozenset[str] = frozenset()


def show(config: ShowConfig) -> None:
    """Print the tokens of a sample, and write `row.png` to the run's folder.

    Raises:
        InputError: the split has no such sample.
    """
    folder, data = config.run.folder, config.data.single
    bad_records = BadRecords(data.on_bad_record, folder / "skipped.jsonl")
    examples = read_examples(data, config.split, None, bad_records)
    processor = checkpoint.family(config.model.family).compose_processor(
        config.model, data, examples
    )  # loads no weights
    most = data.questions_per_row if processor.shares_images else 1
    parts = [
        one.with_questions(*span) for one in examples for span in split_questions([0] * len(one.questions), None, most)
    ]
    if not 0 <= config.sample < len(parts):
        raise InputError(f"sample={config.sample}: {config.split} has samples 0 to {len(parts) - 1}")
    example = parts[config.sample]
    batch = processor.collate([[processor.encode(example, [question.target for question in example.questions])]])
    folder.mkdir(parents=True, exist_ok=True)
    print(example.name)
    print(describe(batch, processor))
    draw(batch, processor, folder / "row.png", title=example.name)
    print(f"image: {folder / 'row.png'}")
