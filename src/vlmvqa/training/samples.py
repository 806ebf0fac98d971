"""A few answers to look at, of the same questions at every evaluation: `samples.jsonl`, and the loggers' pictures.

They are taken from the answers that the evaluation has anyway, so they cost nothing but their pictures, which are
decoded once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlmvqa.data import images
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.extras.report.calibration import confidence
from vlmvqa.training.log import append

FILE = "samples.jsonl"  # in a run's folder
SIDE = 320  # pixels: a thumbnail


@dataclass(frozen=True)
class Sample:
    """An answer to look at.

    Attributes:
        name: the same at every evaluation: its task, if there are several, and its place.
        log_probability: of the whole answer.
        score: its own, in the metric's unit; None where a question has none.
        picture: small; None where none is shown.
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
    picture: Image | None = None

    @property
    def probability(self) -> float:
        return confidence(self.log_probability)

    def text(self) -> str:
        """What is asked, answered and expected, a line each."""
        known = list(dict.fromkeys(self.answers))
        score = "" if self.score is None else f", scored {self.score:.0f}"
        return (
            f"question   {self.question}\nanswer     {self.answer}  (p {self.probability:.2f}{score})\n"
            f"expected   {', '.join(known)}"
        )

    def record(self, step: int) -> dict[str, Any]:
        """As a line of `samples.jsonl`."""
        return {
            "step": step,
            "task": self.task,
            "question_id": self.question_id,
            "image_id": self.image_id,
            "question": self.question,
            "answer": self.answer,
            "log_probability": self.log_probability,
            "score": self.score,
            "answers": list(self.answers),
        }


@dataclass
class Shown:
    """The questions of a task whose answers are shown: at most so many, each about another image, drawn by seed."""

    task: str
    chosen: Sequence[tuple[Example, Question]]
    pictures: dict[int, Image] = field(default_factory=dict)

    @classmethod
    def of(cls, examples: Sequence[Example], most: int, seed: int, task: str = "") -> Shown:
        draw = random.Random(seed)
        asked = [example for example in {one.image_id: one for one in examples}.values() if example.questions]
        drawn = draw.sample(asked, min(most, len(asked)))
        return cls(task, [(example, draw.choice(example.questions)) for example in drawn])

    def samples(self, answers: Mapping[Any, Any], scores: Mapping[Any, float], pictures: bool) -> list[Sample]:
        """Those among the answers (`predict.Answer` by question id); a picture that cannot be read is left out.

        Args:
            scores: of each question, as far as it has one.
            pictures: whether they are wanted.
        """
        found = []
        for place, (example, question) in enumerate(self.chosen):
            if question.id not in answers:  # its image was left out
                continue
            answer = answers[question.id]
            found.append(
                Sample(
                    f"{self.task}-{place + 1}" if self.task else str(place + 1),
                    self.task,
                    question.id,
                    example.image_id,
                    question.text,
                    answer.text,
                    answer.log_probability,
                    scores.get(question.id),
                    question.answers,
                    self._picture(place, example) if pictures else None,
                )
            )
        return found

    def _picture(self, place: int, example: Example) -> Image | None:
        if place not in self.pictures:
            with suppress(InputError):
                small = images.decode(example.image, example.name).copy()  # it may be the data's own
                small.thumbnail((SIDE, SIDE))
                self.pictures[place] = small
        return self.pictures.get(place)


def write(folder: Path, samples: Sequence[Sample], step: int) -> None:
    """Add them to the run's `samples.jsonl`."""
    append(folder / FILE, [sample.record(step) for sample in samples])
