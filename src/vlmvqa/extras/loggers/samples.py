"""A few answers to inspect, to the same questions at every evaluation: `samples.jsonl` and the loggers' images.

They are taken from the answers that the evaluation generates anyway; only their images are decoded additionally, once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.extras.report.gallery import picture

THUMBNAIL_SIZE = 320  # pixels


@dataclass(frozen=True)
class Sample:
    """An answer to inspect.

    Attributes:
        name: the same at every evaluation: its task, if there are several, and its index.
        log_probability: of the answer's tokens together.
        score: in the metric's unit; None if the question has none.
        thumbnail: its image; None if no image is shown.
    """

    name: str
    task: str
    question_id: int | str
    image_id: int | str
    question: str
    answer: str
    log_probability: float
    score: float | None
    answers: tuple[str, ...]
    thumbnail: Image | None = None

    @property
    def probability(self) -> float:
        """The answer's probability; rounding may leave the logarithm slightly above 0."""
        return math.exp(min(self.log_probability, 0.0))

    def text(self) -> str:
        """Return question, answer and expected answers, one line each."""
        expected = list(dict.fromkeys(self.answers))
        score = "" if self.score is None else f", scored {self.score:.0f}"
        return (
            f"question   {self.question}\nanswer     {self.answer}  (p {self.probability:.2f}{score})\n"
            f"expected   {', '.join(expected)}"
        )

    def record(self, step: int) -> dict[str, Any]:
        """Return the sample as a record of `samples.jsonl`."""
        return {"step": step, **{key: value for key, value in vars(self).items() if key not in ("name", "thumbnail")}}


@dataclass
class SampledQuestions:
    """Questions of a task whose answers are shown, each about another image."""

    task: str
    chosen: Sequence[tuple[Example, Question]]
    thumbnails: dict[int, Image] = field(default_factory=dict)

    @classmethod
    def choose(cls, examples: Sequence[Example], count: int, seed: int, task: str = "") -> SampledQuestions:
        """Choose up to `count` questions at random."""
        rng = random.Random(seed)
        with_questions = [one for one in {one.image_id: one for one in examples}.values() if one.questions]
        chosen = rng.sample(with_questions, min(count, len(with_questions)))
        return cls(task, [(example, rng.choice(example.questions)) for example in chosen])

    def samples(self, answers: Mapping[Any, Any], scores: Mapping[Any, float], thumbnails: bool) -> list[Sample]:
        """Return the chosen questions' samples; one whose image was skipped has no answer and is left out.

        Args:
            answers: `predictor.Answer` by question id.
            scores: by question id, for questions that have one.
            thumbnails: whether to add thumbnails; an unreadable image is left out.
        """
        found = []
        for index, (example, question) in enumerate(self.chosen):
            if question.id not in answers:
                continue
            answer = answers[question.id]
            found.append(
                Sample(
                    name=f"{self.task}-{index + 1}" if self.task else str(index + 1),
                    task=self.task,
                    question_id=question.id,
                    image_id=example.image_id,
                    question=question.text,
                    answer=answer.text,
                    log_probability=answer.log_probability,
                    score=scores.get(question.id),
                    answers=question.answers,
                    thumbnail=self._thumbnail(index, example) if thumbnails else None,
                )
            )
        return found

    def _thumbnail(self, index: int, example: Example) -> Image | None:
        if index not in self.thumbnails:
            with suppress(InputError):
                # A copy: `decode` returns an image that is in memory already as it is.
                thumbnail = picture(example).copy()
                thumbnail.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
                self.thumbnails[index] = thumbnail
        return self.thumbnails.get(index)
