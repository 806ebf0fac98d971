"""Examples to the batch the model takes: tokenised questions, decoded images, padded rows.

Legend: B rows, T tokens, I images.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings, decode, to_tensor
from vlmvqa.errors import InputError
from vlmvqa.sequence.rows import Document, TokenizedQuestion, build_row, pad_rows

TARGETS = ("most_common", "sampled")
REMEMBERED = 2**17  # texts whose tokens a processor keeps: the same are met again every epoch


@dataclass(frozen=True)
class Encoded:
    """An example ready for a row: its image as `float[3, H, H]` and its questions as token ids."""

    pixels: Tensor
    questions: list[TokenizedQuestion]


@dataclass(frozen=True)
class Processor:
    """Turns examples into batches, the same way in training, evaluation and `answer`.

    Attributes:
        images: size, normalisation and resizing of the vision encoder's input.
        image_tokens: tokens the vision encoder makes of an image.
        mode: the model's attention mode.
        max_text_tokens: prompt and answer of one question, at most; what is too long loses tokens of the question,
            never of the image, the template's end or the answer. None: no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    images: ImageSettings
    image_tokens: int
    mode: str
    max_text_tokens: int | None = None
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def tokenize(self, question: Question, answer: str | None) -> TokenizedQuestion:
        """BOS, prompt; then the answer and EOS (`answer=None`: nothing, the model is to write it).

        Raises:
            InputError: an empty answer, or one that alone exceeds `max_text_tokens`.
        """
        ids = self._ids(question.prompt)
        bos = self.tokenizer.bos_token_id  # PaliGemma's order: image, BOS, prompt
        prompt = ids if bos is None else [bos, *ids]
        target: list[int] = []
        if answer is not None:
            target = [*self._ids(answer), self.tokenizer.eos_token_id]
            if len(target) == 1:
                raise InputError(f"question {question.id}: its answer is empty, so nothing is supervised")
        if self.max_text_tokens is not None and len(prompt) + len(target) > self.max_text_tokens:
            ending = self._ids(question.prompt.rpartition(question.text)[2])
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
        pixels = to_tensor(decode(example.image, example.name), self.images)
        pairs = zip(example.questions, answers, strict=True)
        return Encoded(pixels, [self.tokenize(question, answer) for question, answer in pairs])

    def collate(self, encoded: Sequence[Encoded], images_per_row: int = 1) -> dict[str, Tensor]:
        """The batch: `pixel_values float[I, 3, H, H]` and the `int64[B, T]` columns of `sequence/rows.py`."""
        documents = [Document(number, example.questions) for number, example in enumerate(encoded)]
        groups = [documents[start : start + images_per_row] for start in range(0, len(documents), images_per_row)]
        rows = [build_row(group, self.image_tokens, self.mode) for group in groups]
        return {"pixel_values": torch.stack([example.pixels for example in encoded]), **pad_rows(rows, multiple=8)}

    def _ids(self, text: str) -> list[int]:
        known = self._known
        if text not in known:
            if len(known) >= REMEMBERED:
                known.clear()
            known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return known[text]


def split_questions(examples: Sequence[Example], questions_per_row: int | None) -> list[Example]:
    """Examples with at most so many questions each: an image asked more is repeated (None: no limit)."""
    if questions_per_row is None:
        return list(examples)
    return [
        replace(example, questions=example.questions[start : start + questions_per_row])
        for example in examples
        for start in range(0, len(example.questions), questions_per_row)
    ]


class TrainingSet(Dataset[Encoded]):
    """Encoded examples for the DataLoader's workers.

    Args:
        target: "most_common" trains on `Question.target`; "sampled" on one of the annotators' answers, drawn anew
            each epoch from seed, epoch and question (big_vision's choice for VQAv2).
        bad_records: what happens to an image that cannot be decoded. Under "skip" the next good example takes its
            place, so that every rank makes the same number of steps.
    """

    def __init__(
        self, examples: Sequence[Example], processor: Processor, target: str, seed: int, bad_records: BadRecords
    ) -> None:
        if target not in TARGETS:
            raise InputError(f"data.target={target} is unknown; use one of {', '.join(TARGETS)}")
        if not examples:
            raise InputError("the training split holds no examples; check data.train_split and data.max_train_samples")
        unanswered = [question.id for example in examples for question in example.questions if question.target is None]
        if unanswered:
            raise InputError(
                f"the training split has no answers to {len(unanswered)} questions (the first is {unanswered[0]}); "
                "set data.train_split to a split with answers"
            )
        self.examples, self.processor, self.target, self.seed = examples, processor, target, seed
        self.bad_records = bad_records
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded:
        if get_worker_info() is not None:
            # A notice to stop goes to the whole process group: the run saves first, and needs its workers until then.
            os.setpgid(0, 0)
        for offset in range(len(self.examples)):
            example = self.examples[(index + offset) % len(self.examples)]
            try:
                return self.processor.encode(example, [self._answer(question) for question in example.questions])
            except InputError as error:
                self.bad_records.add_error(error)
        raise InputError("no training example could be read; see the listing of skipped records")

    def _answer(self, question: Question) -> str | None:
        if self.target == "sampled":
            return random.Random(f"{self.seed}-{int(self.epoch)}-{question.id}").choice(question.answers)
        return question.target


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
