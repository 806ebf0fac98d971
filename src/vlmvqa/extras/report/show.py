"""One sample as the model reads it: its tokens, its images, and a drawing of the row and its attention mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from vlmvqa.config.schema import AnyModelSettings, DataSettings, RunSettings
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.packing import split_questions
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.report.row_drawing import describe, draw
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import GenerationSettings

GAP = 4  # pixels between inputs


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
    """Print a sample's tokens; write `row.png`, and `inputs.png` for several images or tiles, to the run's folder.

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
    pixels = batch["pixel_values"]
    if len(pixels) > 1:
        save_inputs(pixels, processor.images, folder / "inputs.png")
        print(f"the encoder's inputs: {folder / 'inputs.png'}")


def save_inputs(pixels: Tensor, settings: ImageSettings, path: Path) -> None:
    """Save the (first) encoder's inputs `float[I, 3, H, H]`, with the normalisation undone, side by side."""
    pixels = pixels[:, :3, : settings.size, : settings.size]
    std, mean = (torch.tensor(values)[:, None, None] for values in (settings.std, settings.mean))
    levels = ((pixels * std + mean) * 255).round().clamp(0, 255).byte()
    Image.fromarray(rearrange(F.pad(levels, (0, GAP), value=255), "i c h w -> h (i w) c").numpy()).save(path)
