"""Generate answers with a model and its processor: for one image, or for all examples of a split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlmvqa import ranks
from vlmvqa.data.eval_dataset import EvalDataset
from vlmvqa.data.example import Example, ImageSource, Question, count_questions
from vlmvqa.data.packing import split_questions
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import TokenTable
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.models.interface import Generated, GenerationSettings
from vlmvqa.models.loading import load_model
from vlmvqa.models.trained_model import TrainedModel
from vlmvqa.ranks import bar
from vlmvqa.sequence.rows import Document

if TYPE_CHECKING:
    from vlmvqa.inference.answer_log import AnswerLog

ROW_TEXT_TOKENS = 512


def confidence(log_probability: float | None) -> float:
    """Return the probability of an answer; 0 if it is unknown, for answers of another program."""
    return 0.0 if log_probability is None else math.exp(min(log_probability, 0.0))  # rounding can exceed 0


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: the answer.
        log_probability: under the model, EOS included.
        cut: whether generation stopped at `max_new_tokens`.
    """

    text: str
    log_probability: float
    cut: bool = False

    @property
    def probability(self) -> float:
        """The probability of the complete answer, from 0 to 1."""
        return confidence(self.log_probability)

    def __str__(self) -> str:
        return self.text


class Predictor(TrainedModel):
    """A model that answers questions, as `vlmvqa.load` returns it."""

    @classmethod
    def of(cls, trained: TrainedModel) -> Predictor:
        """Return a predictor of a model."""
        return cls(**vars(trained))

    @overload  # a string is a sequence of strings too, and asks once
    def answer(self, image: ImageSource | str, question: str) -> Answer: ...  # type: ignore[overload-overlap]
    @overload
    def answer(self, image: ImageSource | str, question: Sequence[str]) -> list[Answer]: ...
    def answer(self, image: ImageSource | str, question: str | Sequence[str]) -> Answer | list[Answer]:
        """Answer a question about an image, or several in one pass over the image.

        Args:
            image: a path, the bytes of an image file, or a PIL image.

        Raises:
            InputError: the image cannot be read, or a question is empty.
        """
        example = self.asked(image, question)
        answers = self.answer_examples([example])
        listed = [answers[one.id] for one in example.questions]
        return listed[0] if isinstance(question, str) else listed

    @overload
    def beam_candidates(  # type: ignore[overload-overlap]
        self, image: ImageSource | str, question: str, most: int = 5
    ) -> list[Answer]: ...
    @overload
    def beam_candidates(
        self, image: ImageSource | str, question: Sequence[str], most: int = 5
    ) -> list[list[Answer]]: ...
    def beam_candidates(
        self, image: ImageSource | str, question: str | Sequence[str], most: int = 5
    ) -> list[Answer] | list[list[Answer]]:
        """Return the answers of a search with `most` beams, the most probable first; a list for each question.

        Duplicate texts are merged: the most probable one is kept.

        Raises:
            InputError: as `answer`.
        """
        example = self.asked(image, question)
        decoding = replace(self.decoding, num_beams=most, temperature=0.0, static_cache=False)
        found: dict[int | str, list[Answer]] = {}
        for row in self.rows([example], self.processor, ROW_TEXT_TOKENS):
            encoded = self.processor.encode(row, [None] * len(row.questions))
            batch = self.batch([encoded])
            beams = self.model.beam_candidates(batch, self.processor.end_token_ids, decoding)
            for asked, written in zip(row.questions, beams, strict=True):
                unique: dict[str, Answer] = {}
                for answer in sorted(self._written(written, decoding), key=lambda answer: -answer.log_probability):
                    unique.setdefault(answer.text, answer)
                found[asked.id] = list(unique.values())
        listed = [found[one.id] for one in example.questions]
        return listed[0] if isinstance(question, str) else listed

    def asked(self, image: ImageSource | str, question: str | Sequence[str]) -> Example:
        """Return an example of an image and its questions, numbered from 0, in the model's prompt.

        Raises:
            InputError: a question is empty, or there is none.
        """
        texts = [question] if isinstance(question, str) else list(question)
        if not texts or not all(text.strip() for text in texts):
            raise InputError("no question is given, or one is empty; ask something")
        questions = tuple(
            Question(number, text, self.prompt.replace("{question}", text)) for number, text in enumerate(texts)
        )
        return Example(Path(image) if isinstance(image, str) else image, "given", questions)

    def batch(self, encoded: Sequence[Document]) -> dict[str, Tensor]:
        """Collate encoded examples, one row each, on the model's device."""
        return self.on_device(self.processor.collate([[one] for one in encoded]))

    def answer_examples(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int = 16,
        row_text_tokens: int = ROW_TEXT_TOKENS,
        workers: int = 0,
        bad_records: BadRecords | None = None,
        progress: bool = False,
        answer_log: AnswerLog | None = None,
    ) -> dict[int | str, Answer]:
        """Answer every question of every example, by question id, in the examples' order.

        An image and its questions form a row. Rows are sorted from long to short, which keeps padding low and makes
        an out-of-memory error appear at once. Batches are formed before they are distributed over the ranks: with any
        number of ranks a question is in the same batch, and (on equal devices, with as many threads) its answer is
        the same to the bit.

        Args:
            batch_size: rows per batch.
            row_text_tokens: an image whose questions have more tokens is split into several rows.
            workers: processes that decode images.
            bad_records: policy for unreadable images (default: raise); the questions of a skipped one get no answer.
            answer_log: log of the answers; those that it holds are not generated again.

        Raises:
            InputError: two questions have one id, or an image cannot be read.
        """
        refuse_equal_ids(examples)
        with ranks.local_main_first():  # texts are tokenized at first use
            table = TokenTable.build(
                (question.prompt for question in all_questions(examples)), self.processor.tokenizer
            )
        processor = replace(self.processor, table=table)
        rows = self.rows(examples, processor, row_text_tokens)
        numbers = range(len(rows))
        batches = [list(numbers[start : start + batch_size]) for start in numbers[::batch_size]]
        answers: dict[int | str, Answer] = {}
        if answer_log:
            answers, batches = _logged_answers(answer_log, rows, batches)
        mine = batches[ranks.rank() :: ranks.world_size()] if ranks.is_distributed() else batches
        loader = DataLoader(
            EvalDataset(rows, processor, bad_records or BadRecords(advice="")),
            batch_sampler=mine,
            collate_fn=partial(_collated, processor),
            num_workers=workers,
            generator=torch.Generator(),  # own generator: evaluation must not advance the training's random state
        )
        answers |= self._answer_batches(
            [[rows[number] for number in batch] for batch in mine], loader, progress, answer_log
        )
        every = {question: answer for share in ranks.gather(answers) for question, answer in share.items()}
        return {question.id: every[question.id] for question in all_questions(examples) if question.id in every}

    def rows(self, examples: Sequence[Example], processor: Processor, room: int) -> list[Example]:
        """Split the examples into rows of at most `room` text tokens (or one question), sorted from long to short."""
        most = None if self.model.shares_images else 1
        rows: list[tuple[int, Example]] = []
        for example in examples:
            lengths = [_text_tokens(question, processor) for question in example.questions]
            for first, end in split_questions(lengths, room, most):
                rows.append((sum(lengths[first:end]), example.with_questions(first, end)))
        return [example for _, example in sorted(rows, key=lambda row: -row[0])]

    def _answer_batches(
        self,
        batches: Sequence[Sequence[Example]],
        loader: Iterable[tuple[list[bool], dict[str, Tensor]]],
        progress: bool,
        answer_log: AnswerLog | None,
    ) -> dict[int | str, Answer]:
        """Return the answers of this rank's batches by question id, and log each batch when it is answered."""
        answers: dict[int | str, Answer] = {}
        total = sum(map(count_questions, batches))
        name = "answering, the first rank's share" if ranks.is_distributed() else "answering"
        with bar(doing=name, unit="questions", total=total, shown=progress) as done:
            for batch, (readable, columns) in zip(batches, loader, strict=True):
                found = self._answer_batch(batch, readable, columns)
                # A batch with an unreadable image is not logged, so that the image is reported again on resume.
                if answer_log and len(found) == count_questions(batch):
                    listed = [[question, *dataclasses.astuple(answer)] for question, answer in found.items()]
                    answer_log.add(answer_log.batch_key(batch), listed)
                answers |= found
                done.update(count_questions(batch))
        return answers

    def _answer_batch(
        self, rows: Sequence[Example], readable: Sequence[bool], columns: Mapping[str, Tensor]
    ) -> dict[int | str, Answer]:
        """Return the answers of a batch by question id; a skipped image has none."""
        if not columns:
            return {}
        ids = [question.id for question in all_questions(row for row, one in zip(rows, readable, strict=True) if one)]
        written = self.model.generate(self.on_device(columns), self.processor.end_token_ids, self.decoding, ids)
        return dict(zip(ids, self._written(written, self.decoding), strict=True))

    def _written(self, written: Sequence[Generated], decoding: GenerationSettings) -> list[Answer]:
        """Decode generated tokens."""
        texts = self.processor.tokenizer.batch_decode([one.tokens for one in written], skip_special_tokens=True)
        most = decoding.max_new_tokens  # EOS counts
        return [
            Answer(text.strip(), one.log_probability, len(one.tokens) >= most)
            for text, one in zip(texts, written, strict=True)
        ]

    def on_device(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch on the model's device."""
        device = next(self.model.parameters()).device
        return {name: column.to(device) for name, column in columns.items()}


def load(path_or_hub_id: str | Path, device: str | None = None, dtype: str = "auto") -> Predictor:
    """Load a trained model: `vlmvqa.load("runs/demo").answer("photo.jpg", "what is this?")`.

    Args:
        path_or_hub_id: a run's folder, its `model/` folder, one of its checkpoints, or a hub id.
        device: default: the GPU if there is one.
        dtype: data type of the weights: "float32", "bfloat16", "float16", "saved", or "auto" (bfloat16 for float32
            weights on a GPU that computes in it, else as saved). Softmax, softcaps and log-probabilities are computed
            in float32.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Predictor.of(load_model(path_or_hub_id, device, dtype))


def _logged_answers(
    answer_log: AnswerLog, rows: Sequence[Example], batches: list[list[int]]
) -> tuple[dict[int | str, Answer], list[list[int]]]:
    """Return the answers that a log holds by question id, and the batches (indices of rows) that it lacks."""
    # Rank 0 reads before any rank writes, so that all ranks have the same batches even if their disks differ.
    kept = ranks.broadcast_from_rank0(answer_log.read)
    keys = [answer_log.batch_key([rows[number] for number in batch]) for batch in batches]
    answers = {question: Answer(*answer) for key in keys for question, *answer in kept.get(key, ())}
    return answers, [batch for batch, key in zip(batches, keys, strict=True) if key not in kept]


def _collated(processor: Processor, encoded: Sequence[Document | None]) -> tuple[list[bool], dict[str, Tensor]]:
    """Return which images could be read, and the batch of those."""
    rows = [[one] for one in encoded if one is not None]
    return [one is not None for one in encoded], processor.collate(rows) if rows else {}


def _text_tokens(question: Question, processor: Processor) -> int:
    try:
        return len(processor.tokenize(question, None).prompt)
    except InputError:
        return 0  # reported later, by the policy for bad records


def all_questions(examples: Iterable[Example]) -> Iterator[Question]:
    """Return the questions of all examples, in order."""
    return (question for example in examples for question in example.questions)


def refuse_equal_ids(examples: Sequence[Example]) -> None:
    """Raise InputError if two questions have one id."""
    seen: set[int | str] = set()
    for example in examples:
        for question in example.questions:
            if question.id in seen:
                raise InputError(
                    f"question {question.id} (the last time of {example.name}) is asked twice, but answers are kept "
                    "by question id; give each question its own"
                )
            seen.add(question.id)
