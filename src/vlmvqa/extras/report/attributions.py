"""Attention maps over the images of a few right and wrong answers, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image

from vlmvqa.data import images
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.extras.report.attribution import draw, look
from vlmvqa.extras.report.gallery import Record, choose_gallery, evenly
from vlmvqa.inference.predictor import Predictor
from vlmvqa.progress import bar


def looked_at(
    predictor: Predictor, examples: Sequence[Example], predictions: Sequence[Record], name: str, most: int
) -> list[tuple[Record, Image]] | str:
    """Answers with their drawn pictures, as many right as wrong ones where there are; or why there are none.

    Args:
        predictor: with the prompt that these questions were put into.
        name: the metric, by which answers are right or wrong.
        most: how many answers at most (0: none); each costs a pass through the model.
    """
    if most < 1:
        return []
    right, wrong = choose_gallery(predictions, name)
    chosen = [record for group in (right, wrong) for record in evenly(group, -(-most // 2))][:most]
    asked = {question.id: (example, question) for example in examples for question in example.questions}
    drawn: list[tuple[Record, Image]] = []
    try:
        for record in bar(chosen, doing="where it looked", unit="answers"):
            example, question = asked[record["question_id"]]
            picture = images.decode(example.image, example.name)
            # A caption is asked for without a question: its prompt has no place for one.
            seen = look(predictor, picture, question.text or "caption", record["answer"])
            drawn.append((record, draw(picture, seen)))
    except InputError as error:
        return str(error).rstrip(".")
    except torch.OutOfMemoryError:  # the answers are there, and must not be lost for a picture
        return "the memory of the GPU is too small for its attention"
    return drawn
