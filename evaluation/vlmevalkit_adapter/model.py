"""The model class that VLMEvalKit runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

import vlmvqa
from vlmvqa.errors import InputError

OWN = "vlmvqa_"  # name of the tables that launch/prepare.py writes


class VlmVqa(BaseModel):
    """A model that answers one question about one image per call, as VLMEvalKit asks.

    Args:
        checkpoint: a run's folder, its `model/` folder, or a hub id.
        device, dtype: as in `vlmvqa.load`.
        source: the dataset (`data.source`) whose prompt template is used, if the model was trained on several.

    Raises:
        InputError: the model cannot be loaded.
    """

    INTERLEAVE = False

    def __init__(
        self, checkpoint: str, device: str | None = None, dtype: str = "auto", source: str | None = None
    ) -> None:
        super().__init__()
        self.predictor = vlmvqa.load(checkpoint, device, dtype)
        if source:
            self.predictor.prompt = self.predictor.prompt_for(source, self.predictor.prompt)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Return whether the model is asked the question alone: VLMEvalKit adds instructions to it."""
        return dataset.startswith(OWN) or DATASET_TYPE(dataset) == "VQA"

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
        """Return the image and the question without VLMEvalKit's instructions."""
        images = self.dump_image(line, dataset)
        return [{"type": "image", "value": path} for path in images] + [{"type": "text", "value": line["question"]}]

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Return the answer to a question; the model's prompt template is applied to it.

        Raises:
            InputError: the message is not one image with text.
        """
        images = [part["value"] for part in message if part["type"] == "image"]
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        if len(images) != 1 or len(message) == len(images):
            raise InputError(
                f"{dataset}: a message has {len(images)} images and {len(message) - len(images)} texts; this model "
                "answers questions about one image"
            )
        return self.predictor.answer(images[0], text).text
