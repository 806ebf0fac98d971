"""What a run trains on: the rows of an epoch, planned over all examples, encoded one by one.

Legend: H image height and width, N image tokens, Dv vision width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.packing import Packing, Plan, split
from vlmvqa.data.processor import Encoded, Processor
from vlmvqa.data.tokenization import TokenTable
from vlmvqa.errors import InputError, counted, suggest

if TYPE_CHECKING:
    from vlmvqa.extras.feature_cache.store import FeatureStore

TARGETS = ("most_common", "sampled")
# What a supervised token counts in the loss, from the tokens of its answer and the questions of its image.
WEIGHTINGS: dict[str, Callable[[int, int], float]] = {
    "token": lambda tokens, questions: 1.0,
    "question": lambda tokens, questions: 1 / tokens,
    "question_sqrt": lambda tokens, questions: 1 / (tokens * math.sqrt(questions)),  # Molmo (Deitke et al. 2024)
}


class TrainingSet(Dataset[list[Encoded]]):
    """The rows of an epoch, encoded in the DataLoader's workers. Read in order: the order is drawn here.

    Args:
        target: "most_common" trains on `Question.target`; "sampled" on one of the annotators' answers, drawn anew
            each epoch from seed, epoch and question (big_vision's choice for VQAv2).
        bad_records: what happens to what cannot be trained on. Under "skip" it is left out; a row of which nothing is
            left gets an image without supervised tokens, so that every rank makes the same number of steps.
        row_tokens: rows are filled with documents up to so many tokens (`packing.py`); None: a document a row.
        questions_per_row: a document has at most so many of its image's questions; None: all, as far as they fit.
        weighting: what a supervised token counts (`WEIGHTINGS`).
        features: the vision encoder's cached output, in place of the images (`features.py`).
        repeats: how often an epoch sees each example (None: once); of a fraction, other ones in each epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        target: str,
        seed: int,
        bad_records: BadRecords,
        *,
        row_tokens: int | None = None,
        questions_per_row: int | None = None,
        weighting: str = "token",
        features: FeatureStore | None = None,
        repeats: Sequence[float] | None = None,
    ) -> None:
        for name, value, known in (("data.target", target, TARGETS), ("loss_weighting", weighting, WEIGHTINGS)):
            if value not in known:
                raise InputError(f"{name}={value} is unknown; use one of {', '.join(known)}{suggest(value, known)}")
        if not examples:
            raise InputError("the training split holds no examples; check data.train_split and data.max_train_samples")
        unanswered = [question.id for example in examples for question in example.questions if question.target is None]
        if unanswered:
            missing = counted(len(unanswered), "question")
            raise InputError(
                f"the training split has no answers to {missing} (the first is {unanswered[0]}); "
                "set data.train_split to a split with answers"
            )
        self.processor, self.target, self.seed = processor, target, seed
        self.bad_records, self.weigh, self.features = bad_records, WEIGHTINGS[weighting], features
        self.examples = list(examples)
        self.documents: list[tuple[int, int, int]] = []  # an example's number, its questions from and to
        lengths = self._measure(row_tokens, questions_per_row)
        each = None if repeats is None else [repeats[number] for number, _, _ in self.documents]
        self.packing = Packing(lengths, row_tokens, seed, each)
        if not len(self.packing):
            raise InputError("an epoch has no images at these data.weights; raise them")
        self.multiple = 1
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch
        self._planned: tuple[int, Plan] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's DataLoader before it reads an epoch."""
        self.epoch.fill_(epoch)

    def fill_steps(self, rows: int) -> None:
        """End every epoch with a whole step of so many rows: what is missing are rows without supervised tokens."""
        self.multiple = rows

    def __len__(self) -> int:
        return -(-len(self.packing) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> list[Encoded]:
        if index >= len(self.packing):
            return [self._unsupervised(index % len(self.documents))]
        documents = self._plan()[index]
        encoded = [self._encode(number) for number in documents]
        return [one for one in encoded if one is not None] or [self._unsupervised(documents[0])]

    def _plan(self) -> Plan:
        epoch = int(self.epoch)
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self.packing.plan(epoch)
        return self._planned[1]

    def _measure(self, row_tokens: int | None, questions_per_row: int | None) -> list[int]:
        """Cut the examples into documents; the tokens of each. What cannot be trained on goes now."""
        image = self.processor.num_image_tokens
        room = None if row_tokens is None else row_tokens - image
        known = iter(self._lengths())
        tokens = []
        for number, example in enumerate(self.examples):
            lengths, kept = [], []
            for question, length in zip(example.questions, known, strict=False):
                try:
                    lengths.append(self._checked(question, length, room))
                    kept.append(question)
                except InputError as error:
                    self.bad_records.add_error(error)
            if len(kept) < len(example.questions):
                self.examples[number] = replace(example, questions=tuple(kept))
            for first, end in split(lengths, room, questions_per_row):
                self.documents.append((number, first, end))
                tokens.append(image + sum(lengths[first:end]))
        if not tokens:
            raise InputError("no training question can be used; see the listing of skipped records")
        return tokens

    def _lengths(self) -> list[int]:
        """Tokens of each question with its answer in a row, of the longest answer that may be drawn; 0: look closer."""
        questions = [question for example in self.examples for question in example.questions]
        answers = [self._possible(question) for question in questions]
        texts = chain((question.prompt for question in questions), chain.from_iterable(answers))
        table = TokenTable.build(texts, self.processor.tokenizer)
        self.processor = replace(self.processor, table=table)
        counts = [len(several) for several in answers]
        starts = np.cumsum([0, *counts[:-1]])
        answer = table.lengths(chain.from_iterable(answers))
        longest, shortest = np.maximum.reduceat(answer, starts), np.minimum.reduceat(answer, starts)
        prompt = table.lengths(question.prompt for question in questions)
        total = prompt + (self.processor.tokenizer.bos_token_id is not None) + longest
        limit = self.processor.max_text_tokens
        odd = (shortest == 0) | (False if limit is None else total + 1 > limit)  # EOS counts there
        lengths: list[int] = np.where(odd, 0, total).tolist()
        return lengths

    def _checked(self, question: Question, length: int, room: int | None) -> int:
        length = length or max(self.processor.length(question, answer) for answer in self._possible(question))
        if room is not None and length > room:
            image, row = self.processor.num_image_tokens, room + self.processor.num_image_tokens
            raise InputError(
                f"question {question.id}: with its image it has {image + length} tokens, more than "
                f"data.row_tokens={row}; raise it"
            )
        return length

    def _possible(self, question: Question) -> Sequence[str]:
        """The answers that may be trained on."""
        return (self.target == "sampled" and question.answers) or (question.target or "",)

    def _encode(self, number: int, supervised: bool = True) -> Encoded | None:
        """A document, or None where its image is left out."""
        place, first, end = self.documents[number]
        example = self.examples[place]
        try:
            image = self._image(example)
        except InputError as error:
            self.bad_records.add_error(error)
            return None
        questions = []
        for question in example.questions[first:end]:
            tokens = self.processor.tokenize(question, self._answer(question) if supervised else None)
            weight = self.weigh(len(tokens.answer), len(example.questions)) if supervised else 0.0
            questions.append(replace(tokens, weight=weight))
        return Encoded(image, questions)

    def _unsupervised(self, number: int) -> Encoded:
        """The first document from here on whose image can be read, with nothing to learn from it."""
        for offset in range(len(self.documents)):
            encoded = self._encode((number + offset) % len(self.documents), supervised=False)
            if encoded is not None:
                return encoded
        raise InputError("no training example could be read; see the listing of skipped records")

    def _image(self, example: Example) -> Tensor:
        if self.features is not None:
            return self.features[example.image_id]
        return self.processor.image(example)

    def _answer(self, question: Question) -> str | None:
        if self.target == "sampled":
            return random.Random(f"{self.seed}-{int(self.epoch)}-{question.id}").choice(self._possible(question))
        return question.target
