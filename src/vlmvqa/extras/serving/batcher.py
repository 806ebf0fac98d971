"""The one thread that asks the models: requests wait in a queue, and it takes what waits there together as a batch.

An answer does not depend on its company (`tests/unit/test_predictor.py`), so neither does it on who else asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from PIL import Image

from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.extras.report.attribution import Attribution, attribute
from vlmvqa.extras.serving.limits import MILLION, Limits, Refused, busy
from vlmvqa.inference.predictor import Answer, Predictor

log = logging.getLogger("vlmvqa.extras.serving")


@dataclass(frozen=True)
class Asked:
    """A picture (RGB, upright) and questions about it, for one of the models.

    Attributes:
        alternatives: how many answers to search beside the best; 0: none.
        look: the method of the attention map; None: no map.
    """

    model: str
    picture: Image.Image
    questions: Sequence[str]
    alternatives: int = 0
    look: str | None = None


@dataclass(frozen=True)
class Answered:
    """An answer, what else might have been said (the best beams), its attention map."""

    answer: Answer
    alternatives: Sequence[Answer] = ()
    look: Attribution | None = None


@dataclass(eq=False)
class _Waiting:
    asked: Asked
    deadline: float
    answered: Future[list[Answered]] = field(default_factory=Future)

    @cached_property
    def ids(self) -> list[str]:
        """A name for each question, the same whenever the same is asked: where answers are drawn, so are they."""
        picture = blake2b(repr(self.asked.picture.size).encode(), digest_size=16)
        picture.update(self.asked.picture.tobytes())
        found = []
        for question in self.asked.questions:
            each = picture.copy()
            each.update(question.encode())
            found.append(each.hexdigest())
        return found

    @property
    def pixels(self) -> int:
        return self.asked.picture.width * self.asked.picture.height

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


class Batcher:
    """Answers by the models of a server, by their names.

    Attributes:
        batches: rows of the last batches that were answered, the newest last.
    """

    def __init__(self, models: Mapping[str, Predictor], limits: Limits) -> None:
        self.models, self.limits = dict(models), limits
        self.batches: deque[int] = deque(maxlen=1000)
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="vlmvqa models", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def submit(self, asked: Asked) -> Future[list[Answered]]:
        """An answer to each question, in their order, when it is there. Cancelled before, it is not computed.

        Raises:
            Refused: too much waits already.
        """
        one = _Waiting(asked, time.monotonic() + self.limits.timeout_s)
        with self._changed:
            if self._closed:
                raise busy("the server is ending")
            pixels = sum(other.pixels for other in self._waiting)
            most = self.limits.waiting_megapixels * MILLION
            if len(self._waiting) >= self.limits.queue or (self._waiting and pixels + one.pixels > most):
                raise busy(f"{len(self._waiting)} requests wait already")
            self._waiting.append(one)
            self._changed.notify()
        return one.answered

    def close(self, seconds: float = 1.0) -> None:
        """Refuse what waits and what comes; wait so long for what is being computed."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for one in left:
            if one.answered.set_running_or_notify_cancel():
                one.answered.set_exception(busy("the server is ending"))
        self._worker.join(seconds)

    def _work(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _take(self) -> list[_Waiting]:
        """What is answered next, of one model: the first that waits and, as far as there is room, who can join it."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return []
                batch: list[_Waiting] = []
                left: deque[_Waiting] = deque()
                rows = 0
                for one in self._waiting:
                    needed = self._rows(one)
                    joins = not batch or (
                        one.asked.model == batch[0].asked.model and rows + needed <= self.limits.max_batch
                    )
                    if not joins:
                        left.append(one)
                    elif one.answered.set_running_or_notify_cancel():  # else its client has left
                        batch.append(one)
                        rows += needed
                self._waiting = left
                if batch:
                    return batch

    def _rows(self, one: _Waiting) -> int:
        return 1 if self.models[one.asked.model].model.shares_images else len(one.asked.questions)

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        """Answer a batch. What fails there fails alone: its neighbours are answered without it."""
        late = [one for one in batch if one.late]
        for one in late:
            one.answered.set_exception(_late(self.limits))
        batch = [one for one in batch if one not in late]
        if not batch:
            return
        try:
            found = self._ask(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answered.set_exception(_reason(error))
                return
            for one in batch:
                self._answer([one])
            return
        # Who asked for nothing else first: the others take a while.
        for one in sorted(batch, key=lambda one: bool(one.asked.alternatives or one.asked.look)):
            try:
                one.answered.set_result(self._more(one, [found[name] for name in one.ids]))
            except Exception as error:
                one.answered.set_exception(_reason(error))

    def _ask(self, batch: Sequence[_Waiting]) -> dict[int | str, Answer]:
        """Answers by id; what is asked twice is computed once."""
        predictor = self.models[batch[0].asked.model]
        examples: list[Example] = []
        seen: set[str] = set()
        for one in batch:
            new = [(name, text) for name, text in zip(one.ids, one.asked.questions, strict=True) if name not in seen]
            asked = {name: Question(name, text, predictor.prompt.replace("{question}", text)) for name, text in new}
            seen |= asked.keys()
            if asked:
                examples.append(Example(one.asked.picture, "sent", tuple(asked.values())))
        rows = sum(1 if predictor.model.shares_images else len(example.questions) for example in examples)
        answers = predictor.answer_examples(examples, batch_size=self.limits.max_batch)
        self.batches.append(rows)
        return answers

    def _more(self, one: _Waiting, answers: Sequence[Answer]) -> list[Answered]:
        """What a request asked for beside the answers."""
        asked, predictor = one.asked, self.models[one.asked.model]
        others: Sequence[Sequence[Answer]] = [()] * len(answers)
        if asked.alternatives:
            if one.late:
                raise _late(self.limits)
            searched = predictor.alternatives(asked.picture, list(asked.questions), asked.alternatives + 1)
            others = [
                [other for other in found if other.text != answer.text][: asked.alternatives]
                for found, answer in zip(searched, answers, strict=True)
            ]
        looks: list[Attribution | None] = [None] * len(answers)
        if asked.look:
            for place, (question, answer) in enumerate(zip(asked.questions, answers, strict=True)):
                if one.late:
                    raise _late(self.limits)
                looks[place] = attribute(predictor, asked.picture, question, answer.text, asked.look)
        return [Answered(*each) for each in zip(answers, others, looks, strict=True)]


def _late(limits: Limits) -> Refused:
    return busy(f"there was no answer within {limits.timeout_s:g} seconds")


def _reason(error: Exception) -> Refused:
    """What the client is told: the model's sentence, or that it failed; why stands in the log alone."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, InputError):
        return Refused(422, str(error))
    log.error("a request failed", exc_info=error)
    return Refused(500, "the model failed on this request; the server's log says why")
