"""The processor: images and questions to the columns of our rows, by the names and calls of transformers.

A row holds an image and its questions. It is padded on the left, and image tokens have the padding token's id, so that
a decoded row is its text.

Legend: B rows, T tokens, I images and tiles, N image tokens, H image height and width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

from vlmvqa.config.compose import build_settings
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.errors import InputError
from vlmvqa.extras.hf.config import VlmvqaConfig
from vlmvqa.extras.vision.segments import masks
from vlmvqa.hub import OWN_CODE
from vlmvqa.models.build import build_projector, build_vision_encoder, random_weights
from vlmvqa.models.checkpoint import CONFIG, TOKENIZER
from vlmvqa.sequence.rows import NO_IMAGE, PADDING, Document, build_row, pad_rows

# One question about one image; the processor adds the model's own prompt.
CHAT_TEMPLATE = """\
{%- set ask = "ask with one message of the user that holds one image and one text" -%}
{%- if messages | length != 1 or messages[0].role != "user" or messages[0].content is string -%}
{{- raise_exception("this model answers one question and has no conversations; " + ask) -}}
{%- endif -%}
{%- set texts = messages[0].content | selectattr("type", "equalto", "text") | list -%}
{%- set images = messages[0].content | selectattr("type", "equalto", "image") | list -%}
{%- if texts | length != 1 or images | length != 1 or messages[0].content | length != 2 -%}
{{- raise_exception("a message has " ~ images | length ~ " images and " ~ texts | length ~ " texts; " + ask) -}}
{%- endif -%}
{{- texts[0].text -}}
"""
# Options of transformers' processors that our rows already comply with.
IMPLIED = ("padding", "padding_side", "add_special_tokens", "return_attention_mask")


class VlmvqaProcessor(ProcessorMixin):
    """Questions about images as the model's input.

    Args:
        tokenizer: the language model's tokenizer.
        config: the model's config, with prompt, image settings and attention pattern.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: VlmvqaConfig) -> None:
        super().__init__(tokenizer, chat_template=CHAT_TEMPLATE)
        self.config = config
        settings = config.model_settings()
        with torch.device("meta"):
            encoder = build_vision_encoder(random_weights(settings.vision))
            projector = build_projector(settings.projector, encoder.features, width=1)  # for its number of tokens
        images = build_settings(ImageSettings, config.images or {}, f"{CONFIG}: images")
        self.rows = Processor(
            tokenizer, images, projector.output.tokens, settings.attention_pattern, config.max_text_tokens
        )

    def __call__(
        self, images: Any = None, text: Any = None, suffix: Any = None, return_tensors: str = "pt", **options: Any
    ) -> BatchFeature:
        """Return the model's input.

        Args:
            images: one image or a list, each a PIL image, a path or a URL.
            text: one question or a list, as long as `images`. An entry that is a list of questions shares the image of
                the same index in one row: `processor([a], [["what is this?", "what color is it?"]])`.
            suffix: answers to train on, nested as `text`; returned as `labels`.
            return_tensors: "pt", the only supported format.
            options: options of transformers' processors that our rows always comply with, such as `padding`.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`, `branch`, `role` and `block`, `int64[B, T]`, as in
            `sequence/rows.py`; `pixel_values float[I, 3, H, H]`, the images or tiles of one row after the other; if
            they are letterboxed, `image_mask bool[I, N]`; with `suffix` also `labels int64[B, T]`, each at the position
            that predicts it.

        Raises:
            InputError: an image that cannot be read, an empty question, images and questions that don't correspond,
                several questions per image under `prefix_lm`, or an unknown option.
        """
        unknown = [name for name, value in options.items() if name not in IMPLIED and value is not None]
        if unknown or return_tensors not in ("pt", None):
            raise InputError(
                f"the processor does not support {', '.join(unknown) or f'return_tensors={return_tensors}'}; leave it "
                "out, or use return_tensors='pt'"
            )
        pictures, questions = _images(images), _texts(text)
        answers = [[None] * len(row) for row in questions] if suffix is None else _texts(suffix)
        self._check(pictures, questions, answers)
        documents = [
            replace(self._load(number, picture), questions=[self._tokenize(*pair) for pair in zip(*texts, strict=True)])
            for number, (picture, *texts) in enumerate(zip(pictures, questions, answers, strict=True))
        ]
        columns = pad_rows(
            [build_row([one], self.rows.num_image_tokens, self.rows.attention_pattern) for one in documents], left=True
        )
        is_padding = columns["document"] == PADDING
        textless = is_padding | (columns["image_index"] != NO_IMAGE)
        found = {
            "input_ids": columns["input_ids"].masked_fill(textless, self.padding_id),
            "attention_mask": (~is_padding).long(),
            "position_ids": columns["position"],
            "branch": columns["branch"],
            "role": columns["role"],
            "block": columns["block"],
            "pixel_values": torch.stack([image for document in documents for image in document.images]),
        }
        found |= masks(documents, self.rows.num_image_tokens)
        return BatchFeature(found if suffix is None else {**found, "labels": columns["labels"]})

    @property
    def padding_id(self) -> int:
        """The id of padding and image tokens: a special token, which decoding leaves out."""
        padding: int | None = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id) if padding is None else padding

    @property
    def model_input_names(self) -> list[str]:
        """The columns that a call returns."""
        return ["input_ids", "attention_mask", "position_ids", "branch", "role", "block", "pixel_values", "image_mask"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> VlmvqaProcessor:
        """Load the processor of a saved model: its `config.json` and its folder `tokenizer`; never run its own code."""
        options.pop("trust_remote_code", None)
        name = pretrained_model_name_or_path
        config = VlmvqaConfig.from_pretrained(name, **options, **OWN_CODE)
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=TOKENIZER, **options, **OWN_CODE)
        return cls(tokenizer, config)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Save the tokenizer, and the config unless the folder has that of a model."""
        folder = Path(save_directory)
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        if not (folder / CONFIG).exists():
            self.config.save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", folder.name), **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the config, with which the processor is saved."""
        return dict(self.config.to_dict())

    def _check(
        self, images: Sequence[Any], questions: Sequence[Sequence[Any]], answers: Sequence[Sequence[Any]]
    ) -> None:
        """Raise InputError if images, questions and answers don't correspond."""
        if not images or len(images) != len(questions):
            raise InputError(
                f"there are {len(images)} images and {len(questions)} entries of text; give each image its question, "
                "or its list of questions: processor(images=[a], text=[[question, question]])"
            )
        if [len(row) for row in questions] != [len(row) for row in answers]:
            raise InputError("suffix should hold an answer for each question of text, nested in the same way")
        if not all(isinstance(one, str) and one.strip() for row in questions for one in row) or not all(questions):
            raise InputError("no question is given, or one is empty; ask something")
        if not self.rows.shares_images and any(len(row) > 1 for row in questions):
            raise InputError(
                f"this model's attention pattern is {self.rows.attention_pattern}, where an image sees its question; "
                "give each question its own copy of the image: processor(images=[a, a], text=[question, question])"
            )

    def _tokenize(self, text: str, answer: str | None) -> Any:
        return self.rows.tokenize(Question(repr(text), text, self.config.prompt.replace("{question}", text)), answer)

    def _load(self, number: int, image: Any) -> Document:
        """Return an image, or its tiles, resized and normalised, as a document without questions."""
        if isinstance(image, str | os.PathLike) and os.path.isfile(image):
            image = Path(image)
        elif not isinstance(image, Image.Image):
            try:
                image = load_image(image)
            except (TypeError, ValueError, OSError, HTTPError) as error:
                reason = str(error).partition(" Got ")[0]  # transformers appends the complete string
                raise InputError(
                    f"image {number} is no PIL image, path or URL of an image ({reason}); correct it"
                ) from error
        return self.rows.load_images(Example(image, number, ()))


def _images(images: Any) -> list[Any]:
    """Return a list of images; transformers nests the images of each text, here one."""
    listed = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    nested = [one if isinstance(one, list | tuple) else [one] for one in listed]
    if any(len(one) != 1 for one in nested):
        raise InputError("a text has several images or none; this model takes one image per text")
    return [one for (one,) in nested]


def _texts(text: Any) -> list[list[Any]]:
    """Return the texts of each image."""
    listed = [] if text is None else list(text) if isinstance(text, list | tuple) else [text]
    return [list(one) if isinstance(one, list | tuple) else [one] for one in listed]
