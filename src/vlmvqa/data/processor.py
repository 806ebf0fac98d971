"""Examples to the batch the model takes: tokenised questions, decoded images, padded rows.

Legend: B rows, T tokens, I images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings, decode, to_tensor
from vlmvqa.data.tokenization import TokenTable
from vlmvqa.errors import InputError
from vlmvqa.sequence.masks import SHAREABLE
from vlmvqa.sequence.rows import Document, TokenizedQuestion, build_row, pad_rows


@dataclass(frozen=True)
class Encoded:
    """A document ready for a row: its image and its questions as token ids.

    `image` is `float[3, H, H]`, a frozen encoder's cached output `float[N, Dv]`, or, for a pretrained model, the
    decoded picture.
    """

    image: Any
    questions: list[TokenizedQuestion]


@dataclass(frozen=True)
class Processor:
    """Turns examples into batches, the same way in training, evaluation and `answer`.

    Attributes:
        images: size, normalisation and resizing of the vision encoder's input.
        num_image_tokens: tokens the vision encoder makes of an image.
        attention_pattern: the model's attention pattern.
        max_text_tokens: prompt and answer of one question, at most; what is too long loses tokens of the question,
            never of the image, the template's end or the answer. None: no limit.
        table: texts that are tokenised already; any other is tokenised when it comes.
    """

    tokenizer: PreTrainedTokenizerBase
    images: ImageSettings
    num_image_tokens: int
    attention_pattern: str
    max_text_tokens: int | None = None
    table: TokenTable | None = field(default=None, repr=False, compare=False)

    def tokenize(self, question: Question, answer: str | None) -> TokenizedQuestion:
        """BOS, prompt; then the answer and EOS (`answer=None`: nothing, the model is to write it).

        Raises:
            InputError: an empty answer, or one that alone exceeds `max_text_tokens`.
        """
        ids = self._ids(question.prompt)
        bos, eos = self._special
        prompt = [*bos, *ids]  # PaliGemma's order: image, BOS, prompt
        target: list[int] = []
        if answer is not None:
            target = [*self._ids(answer), eos]
            if len(target) == 1:
                raise InputError(f"question {question.id}: its answer is empty, so nothing is supervised")
        if self.max_text_tokens is not None and len(prompt) + len(target) > self.max_text_tokens:
            # Captions have no question to shorten.
            ending = self._ids(question.prompt.rpartition(question.text)[2]) if question.text else prompt
            room = self.max_text_tokens - len(target) - len(ending)
            if room < 2:
                raise InputError(
                    f"question {question.id}: its answer has {len(target)} tokens, which leaves none of "
                    f"data.max_text_tokens={self.max_text_tokens} for the question; raise it"
                )
            prompt = prompt[:room] + ending
        return TokenizedQuestion(prompt, target)

    def encode(self, example: Example, answers: Sequence[str | None]) -> Encoded:
        """Decode the image and tokenise the questions, each with its training answer or None.

        Raises:
            InputError: the image cannot be read, or an answer cannot be trained on.
        """
        pairs = zip(example.questions, answers, strict=True)
        return Encoded(self.image(example), [self.tokenize(question, answer) for question, answer in pairs])

    def image(self, example: Example) -> Tensor:
        """The decoded image: `float[3, H, H]`."""
        return to_tensor(decode(example.image, example.name, self.images), self.images)

    def length(self, question: Question, answer: str) -> int:
        """Tokens of a question with its answer in a row; EOS is a label, never an input."""
        tokens = self.tokenize(question, answer)
        return len(tokens.prompt) + len(tokens.answer) - 1

    def collate(self, rows: Sequence[Sequence[Encoded]], multiple: int = 8) -> dict[str, Tensor]:
        """The batch: `pixel_values float[I, 3, H, H]` or `image_features float[I, N, Dv]`, and the `[B, T]` columns of
        `sequence/rows.py`, T a multiple of `multiple`."""
        numbers = count()
        laid = [[Document(next(numbers), encoded.questions) for encoded in row] for row in rows]
        columns = pad_rows([build_row(row, self.num_image_tokens, self.attention_pattern) for row in laid], multiple)
        images = torch.stack([encoded.image for row in rows for encoded in row])
        return {"pixel_values" if images.ndim == 4 else "image_features": images, **columns}

    @property
    def shares_images(self) -> bool:
        """Whether one row may hold several questions about an image."""
        return self.attention_pattern in SHAREABLE

    @property
    def processing_class(self) -> Any:
        """The object of transformers that is saved with the model: the tokenizer."""
        return self.tokenizer

    def with_images(self, resize: str, reduced: bool) -> Processor:
        """Return the processor with other options of `ImageSettings`."""
        return replace(self, images=replace(self.images, resize=resize, reduced=reduced))

    @cached_property
    def ends(self) -> set[int]:
        """The token ids that end an answer."""
        return {self.tokenizer.eos_token_id}

    @cached_property
    def _special(self) -> tuple[list[int], int]:
        """BOS, where the tokenizer has one, and EOS: asking it for them takes as long as a lookup in the table."""
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos], self.tokenizer.eos_token_id

    def _ids(self, text: str) -> list[int]:
        found = self.table.get(text) if self.table is not None else None
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


class QuestionSet(Dataset[Encoded | None]):
    """Encoded examples without answers, for evaluation; None where the image is bad and left out."""

    def __init__(self, examples: Sequence[Example], processor: Processor, bad_records: BadRecords) -> None:
        self.examples, self.processor, self.bad_records = examples, processor, bad_records

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded | None:
        example = self.examples[index]
        try:
            return self.processor.encode(example, [None] * len(example.questions))
        except InputError as error:
            self.bad_records.add_error(error)
            return None
