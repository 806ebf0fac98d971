"""Scale a new projector's output to the text embeddings, before training.

A language model reads image embeddings among text embeddings. Gemma 2 multiplies its text embeddings by the square root
of its width; other models do not, and a default linear layer over DINOv2's features starts several times too large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import cast

import torch

from vlmvqa import ranks
from vlmvqa.data.example import Example, NoImage
from vlmvqa.data.processor import Processor
from vlmvqa.errors import InputError
from vlmvqa.models.trained_model import TrainedModel
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import NO_IMAGE, PADDING, Document

IMAGES = 16  # measured on


@torch.no_grad()
def scale_to_text(trained: TrainedModel, examples: Sequence[Example]) -> None:
    """Scale a new `VLM`'s projector so that its output has the standard deviation of the text embeddings.

    Both are measured on the first training images that can be read and their questions, the same ones on every rank.
    The last layer's weight and bias are multiplied, in which the output of every kind of projector is linear.

    Raises:
        InputError: no image can be read.
    """
    model, processor = cast(VLM, trained.model), trained.processor
    model.eval()
    documents = list(islice(_documents(processor, examples), IMAGES))
    if not documents:
        raise InputError("model.projector.scale_to_text=true: no training image can be read to measure it on")
    batch = processor.collate([[document] for document in documents])
    index = batch["image_index"][batch["image_index"] != NO_IMAGE]  # without patches of padding
    image = model.image_embeddings(batch)[index].float().std().item()
    is_text = (batch["image_index"] == NO_IMAGE) & (batch["document"] != PADDING)
    text = model.language.embed(batch["input_ids"][is_text]).float().std().item()
    model.train()
    factor = text / image
    *_, last = (module for module in model.projector.modules() if getattr(module, "weight", None) is not None)
    for parameter in last.parameters(recurse=False):
        parameter.mul_(factor)
    ranks.print_on_rank0(
        f"projector: output scaled by {factor:.3g}, from a standard deviation of {image:.3g} to that of the text "
        f"embeddings, {text:.3g}"
    )


def _documents(processor: Processor, examples: Sequence[Example]) -> Iterator[Document]:
    for example in examples:
        if isinstance(example.image, NoImage):
            continue
        with suppress(InputError):  # listed where training reads it
            yield processor.encode(example.with_questions(0, 1), [None])
