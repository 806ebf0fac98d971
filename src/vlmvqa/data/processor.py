"""Tokenize questions, load images and collate both into the model's batch.

Legend: B rows, T tokens, I images, N image tokens, H image height and width, Dv vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmvqa.data.example import Example, NoImage, Question
from vlmvqa.data.images import ImageSettings, decode, to_tensor
from vlmvqa.data.tokenization import TokenTable
from vlmvqa.errors import InputError
from vlmvqa.sequence.rows import SHAREABLE, Document, TokenizedQuestion, build_row, pad_rows


@dataclass(frozen=True)
class Processor:
    """Convert examples to batches; training, evaluation and `Predictor.answer` share it.

    Attributes:
        tokenizer: the language model's tokenizer.
        images: size, normalisation and resizing of the vision encoder's input.
        num_image_tokens: N, tokens of one image.
        attention_pattern: the model's attention pattern (`rows.ATTENTION_PATTERNS`).
        max_text_tokens: limit on prompt plus answer tokens of one question (None: no limit). A longer question is
            truncated; the image, the end of the template and the answer never are.
        table: texts that are tokenized already; others are tokenized on demand.
    """

    tokenizer: PreTrainedTokenizerBase
    images: ImageSettings
    num_image_tokens: int
    attention_pattern: str
    max_text_tokens: int | None = None
    table: TokenTable | None = field(default=None, repr=False, compare=False)

    def tokenize(self, question: Question, answer: str | None) -> TokenizedQuestion:
        """Return BOS and the prompt; then the answer and EOS, or nothing where the model generates (`answer=None`).

        Raises:
            InputError: the answer is empty, or leaves no room for the question within `max_text_tokens`.
        """
        bos = self.tokenizer.bos_token_id
        start = [] if bos is None else [bos]  # PaliGemma's order: image, BOS, prompt
        earlier = [self._turn(turn, turn.target, [] if n else start) for n, turn in enumerate(question.history)]
        return replace(self._turn(question, answer, [] if earlier else start), earlier=earlier)

    def _turn(self, question: Question, answer: str | None, start: list[int]) -> TokenizedQuestion:
        prompt = [*start, *self._ids(question.prompt)]
        target: list[int] = []
        if answer is not None:
            target = [*self._ids(answer), self.tokenizer.eos_token_id]
            if len(target) == 1:
                raise InputError(f"question {question.id}: its answer is empty, so nothing is supervised")
        if self.max_text_tokens is not None and len(prompt) + len(target) > self.max_text_tokens:
            # Captions have no question to truncate.
            ending = self._ids(question.prompt.rpartition(question.text)[2]) if question.text else prompt
            room = self.max_text_tokens - len(target) - len(ending)
            if room < 2:
                raise InputError(
                    f"question {question.id}: its answer has {len(target)} tokens, which leaves none of "
                    f"data.max_text_tokens={self.max_text_tokens} for the question; raise it"
                )
            prompt = prompt[:room] + ending
        return TokenizedQuestion(prompt, target)

    def encode(self, example: Example, answers: Sequence[str | None]) -> Document:
        """Load the images and tokenize the questions, each with its training answer or None.

        Raises:
            InputError: an image cannot be read, or an answer cannot be trained on.
        """
        pairs = zip(example.questions, answers, strict=True)
        return replace(self.load_images(example), questions=[self.tokenize(*pair) for pair in pairs])

    def load_images(self, example: Example) -> Document:
        """Return the images, resized and normalised, each `float[3, H, H]`, as a document without questions."""
        if isinstance(example.image, NoImage):  # computed by the encoder, and in no row
            return Document([to_tensor(decode(example.image, example.name, self.images), self.images)], (), kept=[()])
        if segments := self._segments:
            found: Document = segments.load(example, self.images, self.num_image_tokens)
            return found
        return Document([to_tensor(decode(*one, self.images), self.images) for one in example.named_images], ())

    def count_image_tokens(self, example: Example) -> int:
        """Return how many tokens the images of an example take in a row."""
        if isinstance(example.image, NoImage):
            return 0
        if segments := self._segments:
            return int(segments.count_image_tokens(example, self.images, self.num_image_tokens))
        return self.num_image_tokens * len(example.named_images)

    def count_tokens(self, question: Question, answer: str) -> int:
        """Return how many tokens a question and its answer take in a row."""
        tokens = self.tokenize(question, answer)
        return sum(len(turn.prompt) + len(turn.answer) for turn in (*tokens.earlier, tokens)) - 1

    def collate(self, rows: Sequence[Sequence[Document]], multiple: int = 8) -> dict[str, Tensor]:
        """Return the batch of some rows of documents, with T a multiple of `multiple`.

        `pixel_values float[I, 3, H, H]` or `image_features float[I, N, Dv]`, and the columns of `sequence/rows.py`;
        letterboxed images also have an `image_mask bool[I, N]`.
        """
        documents = [document for row in rows for document in row]
        images = torch.stack([image for document in documents for image in document.images])
        counts = (sum(len(document.images) for document in row) for row in rows)
        first_images = accumulate(counts, initial=0)  # index in the batch of each row's first image
        built = [
            build_row(row, self.num_image_tokens, self.attention_pattern, first)
            for row, first in zip(rows, first_images, strict=False)
        ]
        masks = segments.masks(documents, self.num_image_tokens) if (segments := self._segments) else {}
        return {"pixel_values" if images.ndim == 4 else "image_features": images, **masks, **pad_rows(built, multiple)}

    @property
    def _segments(self) -> ModuleType | None:
        """Functions for images of several inputs (`data.tiles`) or with padding (`data.resize=letterbox`)."""
        if self.images.tiles is None and self.images.resize != "letterbox":
            return None
        from vlmvqa.extras.vision import segments

        return segments

    @property
    def shares_images(self) -> bool:
        """Whether one row may hold several questions about an image."""
        return self.attention_pattern in SHAREABLE

    @property
    def processing_class(self) -> Any:
        """The object of transformers that is saved with the model: the tokenizer."""
        return self.tokenizer

    def with_images(self, **options: Any) -> Processor:
        """Return the processor with other options of `ImageSettings`."""
        return replace(self, images=replace(self.images, **options))

    @cached_property
    def end_token_ids(self) -> set[int]:
        """Return the token ids that end an answer."""
        return {self.tokenizer.eos_token_id}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] | None = self.table.get(text) if self.table is not None else None
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
