"""The training dataset: an epoch's rows are planned over all examples and encoded one at a time.

Legend: H image height and width, N image tokens, Dv vision width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmvqa.data.example import Example, Question
from vlmvqa.data.packing import Packing, Plan, split_questions
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import TokenTable
from vlmvqa.errors import BadRecords, InputError, counted, suggest
from vlmvqa.sequence.rows import Document

TARGETS = ("most_common", "sampled")
# Loss weight of each supervised token, from the tokens of its answer and the questions of its image.
WEIGHTINGS: dict[str, Callable[[int, int], float]] = {
    "token": lambda tokens, questions: 1.0,
    "question": lambda tokens, questions: 1 / tokens,
    "question_sqrt": lambda tokens, questions: 1 / (tokens * math.sqrt(questions)),  # Molmo (Deitke et al. 2024)
}


class ImageFeatures(Protocol):
    """The vision encoder's cached output `float[N, Dv]` by image id (`extras/feature_cache`)."""

    def __getitem__(self, image_id: int | str, /) -> Tensor: ...


class DocumentSpan(NamedTuple):
    """A document as indices: questions `first` to `end` (exclusive) of `TrainDataset.examples[example]`."""

    example: int
    first: int
    end: int


@dataclass(frozen=True)
class RowSettings:
    """Settings of the rows.

    Attributes:
        target: "most_common" trains on `Question.target`; "sampled" on one of the annotators' answers, sampled each
            epoch from seed, epoch and question id (big_vision's choice for VQAv2).
        seed: seed of the row order and of sampled answers.
        row_tokens: rows are packed with documents up to this many tokens (`packing.py`); None: one document per row.
        questions_per_row: limit on the questions of one document; None: all questions of the image that fit.
        copy_images: each question of a document gets its own copy of the image. Rows hold the same questions in the
            same order as without, and are longer: `row_tokens` counts each image once.
        length_window: see `Packing.plan`.
        loss_weighting: loss weight of each supervised token (`WEIGHTINGS`).
    """

    target: str = "most_common"
    seed: int = 0
    row_tokens: int | None = None
    questions_per_row: int | None = None
    copy_images: bool = False
    length_window: int = 1
    loss_weighting: str = "token"

    def __post_init__(self) -> None:
        if self.length_window < 0:
            raise InputError(f"data.length_window={self.length_window} must be at least 0; 0 does not sort rows")
        checked = ("data.target", self.target, TARGETS), ("loss_weighting", self.loss_weighting, tuple(WEIGHTINGS))
        for name, value, known in checked:
            if value not in known:
                raise InputError(f"{name}={value} is unknown; use one of {', '.join(known)}{suggest(value, known)}")


class TrainDataset(Dataset[list[Document]]):
    """The rows of an epoch, encoded in the DataLoader's workers. Read it in order: it shuffles the rows itself.

    Args:
        bad_records: policy for questions and images that cannot be used. Under "skip" they are left out; a row that
            loses all its documents gets one without supervised tokens, so that all ranks run the same number of steps.
        features: replaces the images by the vision encoder's cached output.
        repeats: how often an epoch contains each example (None: once). A fraction selects different ones each epoch.

    Raises:
        InputError: there is nothing to train on, or a bad record under the policy "error".
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        settings: RowSettings,
        bad_records: BadRecords,
        *,
        features: ImageFeatures | None = None,
        repeats: Sequence[float] | None = None,
    ) -> None:
        _check_answered(examples)
        self.processor, self.settings, self.bad_records, self.features = processor, settings, bad_records, features
        self.examples = list(examples)
        self.documents: list[DocumentSpan] = []
        lengths = self._split_into_documents()
        per_document = None if repeats is None else [repeats[span.example] for span in self.documents]
        self.packing = Packing(lengths, settings.row_tokens, settings.seed, per_document)
        if not len(self.packing):
            raise InputError("an epoch has no images at these data.weights; raise them")
        self.step_rows = 1
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch
        self._current_plan: tuple[int, Plan] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate's DataLoader calls this before it reads one."""
        self.epoch.fill_(epoch)

    def set_step_rows(self, rows: int) -> None:
        """Set the rows of a step: every epoch is padded to full steps with rows without supervised tokens."""
        self.step_rows, self._current_plan = rows, None

    def __len__(self) -> int:
        return -(-len(self.packing) // self.step_rows) * self.step_rows

    def __getitem__(self, index: int) -> list[Document]:
        if index >= len(self.packing):
            return self._unsupervised(index % len(self.documents))
        numbers = self._plan()[index]
        return [document for number in numbers for document in self._encode(number)] or self._unsupervised(numbers[0])

    def _plan(self) -> Plan:
        epoch = int(self.epoch)
        if self._current_plan is None or self._current_plan[0] != epoch:
            self._current_plan = epoch, self.packing.plan(epoch, self.step_rows, self.settings.length_window)
        return self._current_plan[1]

    # --- documents ------------------------------------------------------------------------------------

    def _split_into_documents(self) -> list[int]:
        """Drop questions that cannot be trained on, split the others into documents and return their token counts."""
        settings = self.settings
        all_lengths = iter(self._question_lengths())
        document_lengths = []
        for number, example in enumerate(self.examples):
            lengths, usable = [], []
            image_tokens = self.processor.count_image_tokens(example)
            room = None if settings.row_tokens is None else settings.row_tokens - image_tokens
            for question, length in zip(example.questions, all_lengths, strict=False):
                try:
                    lengths.append(self._check_length(question, length, image_tokens))
                    usable.append(question)
                except InputError as error:
                    self.bad_records.add_error(error)
            if len(usable) < len(example.questions):
                self.examples[number] = replace(example, questions=tuple(usable))
            for first, end in split_questions(lengths, room, settings.questions_per_row):
                self.documents.append(DocumentSpan(number, first, end))
                document_lengths.append(image_tokens + sum(lengths[first:end]))
        if not document_lengths:
            raise InputError("no training question can be used; see the listing of skipped records")
        return document_lengths

    def _question_lengths(self) -> list[int]:
        """Return the tokens of each question with its longest possible answer; 0 where `_check_length` must count them.

        Those are conversations, and questions with an empty answer or more than `max_text_tokens`. Texts are tokenized
        here, once.
        """
        questions = [question for example in self.examples for question in example.questions]
        answers = [self._possible_answers(question) for question in questions]
        history = [turn for question in questions for turn in question.history]
        texts = chain((turn.prompt for turn in (*history, *questions)), chain.from_iterable(answers))
        table = TokenTable.build(texts, self.processor.tokenizer)
        self.processor = replace(self.processor, table=table)
        starts = np.cumsum([0, *map(len, answers[:-1])])
        answer_lengths = table.lengths(chain.from_iterable(answers))
        longest, shortest = np.maximum.reduceat(answer_lengths, starts), np.minimum.reduceat(answer_lengths, starts)
        prompt_lengths = table.lengths(question.prompt for question in questions)
        total = prompt_lengths + (self.processor.tokenizer.bos_token_id is not None) + longest
        limit, turns = self.processor.max_text_tokens, np.array([len(question.history) for question in questions])
        unusual = (
            (shortest == 0) | (turns > 0) | (False if limit is None else total + 1 > limit)
        )  # EOS counts towards the limit
        lengths: list[int] = np.where(unusual, 0, total).tolist()
        return lengths

    def _check_length(self, question: Question, length: int, image_tokens: int) -> int:
        """Return the tokens of a question with its longest answer; raise an InputError if no row has room for them."""
        length = length or max(
            self.processor.count_tokens(question, answer) for answer in self._possible_answers(question)
        )
        total, limit = image_tokens + length, self.settings.row_tokens
        if limit is not None and total > limit:
            raise InputError(
                f"question {question.id}: with its image it has {total} tokens, more than "
                f"data.row_tokens={limit}; raise it"
            )
        return length

    # --- encoding -------------------------------------------------------------------------------------

    def _possible_answers(self, question: Question) -> Sequence[str]:
        return (self.settings.target == "sampled" and question.answers) or (question.target or "",)

    def _answer(self, question: Question) -> str | None:
        """Return the answer to train on in this epoch."""
        if self.settings.target != "sampled":
            return question.target
        generator = random.Random(f"{self.settings.seed}-{int(self.epoch)}-{question.id}")
        return generator.choice(self._possible_answers(question))

    def _encode(self, number: int, supervised: bool = True) -> list[Document]:
        """Return a document, or its questions as documents; nothing if its image cannot be read and is skipped."""
        index, first, end = self.documents[number]
        example = self.examples[index]
        try:
            cached = self.features
            images = self.processor.load_images(example) if cached is None else Document([cached[example.image_id]], ())
        except InputError as error:
            self.bad_records.add_error(error)
            return []
        weigh = WEIGHTINGS[self.settings.loss_weighting]
        questions = []
        for question in example.questions[first:end]:
            tokens = self.processor.tokenize(question, self._answer(question) if supervised else None)
            count = sum(len(turn.answer) for turn in (*tokens.earlier, tokens))
            weight = weigh(count, len(example.questions)) if supervised else 0.0
            questions.append(replace(tokens, weight=weight))
        groups = [[question] for question in questions] if self.settings.copy_images else [questions]
        return [replace(images, questions=group) for group in groups]

    def _unsupervised(self, number: int) -> list[Document]:
        """Return the first document from `number` on whose image can be read, without supervised tokens."""
        for offset in range(len(self.documents)):
            found = self._encode((number + offset) % len(self.documents), supervised=False)
            if found:
                return found
        raise InputError("no training example could be read; see the listing of skipped records")


def _check_answered(examples: Sequence[Example]) -> None:
    """Raise an InputError if there are no examples, or questions without an answer to train on."""
    if not examples:
        raise InputError("the training split holds no examples; check data.train_split and data.max_train_samples")
    unanswered = [question.id for example in examples for question in example.questions if question.target is None]
    if unanswered:
        missing = counted(len(unanswered), "question")
        raise InputError(
            f"the training split has no answers to {missing} (the first is {unanswered[0]}); "
            "set data.train_split to a split with answers"
        )
