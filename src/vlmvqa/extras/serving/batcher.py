"""Micro-batching: a queue of requests and the thread that runs the models on batches of them.

An answer doesn't depend on the other rows of its batch (`tests/unit/test_predictor.py`), so it doesn't depend on other
clients either.
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
from vlmvqa.extras.serving.limits import MILLION, Limits, RequestError, busy
from vlmvqa.inference.predictor import Answer, Predictor

log = logging.getLogger("vlmvqa.extras.serving")


@dataclass(frozen=True)
class QuestionResult:
    """The answer to a question, alternative answers from beam search, and an attribution map."""

    answer: Answer
    alternatives: Sequence[Answer]
    attribution: Attribution | None


@dataclass(eq=False)
class PendingRequest:
    """An image and its questions, waiting to be answered.

    Attributes:
        model: name of the model.
        image: RGB, upright.
        alternatives: number of alternative answers per question.
        attribution: method of the attribution map; None: no map.
        deadline: monotonic time after which the request is not computed.
        results: a result for each question, in order.
    """

    model: str
    image: Image.Image
    questions: Sequence[str]
    alternatives: int
    attribution: str | None
    deadline: float
    results: Future[list[QuestionResult]] = field(default_factory=Future)

    @cached_property
    def ids(self) -> list[str]:
        """A hash of image and text for each question.

        Sampling is seeded by it, so equal requests get equal answers.
        """
        image_hash = blake2b(repr(self.image.size).encode(), digest_size=16)
        image_hash.update(self.image.tobytes())
        ids = []
        for question in self.questions:
            question_hash = image_hash.copy()
            question_hash.update(question.encode())
            ids.append(question_hash.hexdigest())
        return ids

    @property
    def pixels(self) -> int:
        """Number of pixels of the image."""
        return self.image.width * self.image.height

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline


class Batcher:
    """Answer requests in batches on one thread.

    Args:
        models: predictors by name.

    Attributes:
        batch_sizes: rows of the most recent batches, oldest first.
    """

    def __init__(self, models: Mapping[str, Predictor], limits: Limits) -> None:
        self.models, self.limits = dict(models), limits
        self.batch_sizes: deque[int] = deque(maxlen=1000)
        self._queue: deque[PendingRequest] = deque()
        self._queue_changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vlmvqa models", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    def submit(
        self,
        model: str,
        image: Image.Image,
        questions: Sequence[str],
        alternatives: int = 0,
        attribution: str | None = None,
    ) -> Future[list[QuestionResult]]:
        """Queue a request; cancelling its future before it runs drops it.

        Raises:
            RequestError: the queue is full, or the server is shutting down.
        """
        deadline = time.monotonic() + self.limits.timeout_s
        request = PendingRequest(model, image, questions, alternatives, attribution, deadline)
        with self._queue_changed:
            if self._closed:
                raise busy("the server is shutting down")
            pixels = request.pixels + sum(other.pixels for other in self._queue)
            too_large = self._queue and pixels > self.limits.waiting_megapixels * MILLION
            if len(self._queue) >= self.limits.queue or too_large:
                raise busy(f"the queue is full ({len(self._queue)} requests)")
            self._queue.append(request)
            self._queue_changed.notify()
        return request.results

    def close(self, timeout_s: float = 1.0) -> None:
        """Fail queued and new requests; wait at most `timeout_s` for the current batch."""
        with self._queue_changed:
            self._closed = True
            queued = list(self._queue)
            self._queue.clear()
            self._queue_changed.notify()
        for request in queued:
            if request.results.set_running_or_notify_cancel():
                request.results.set_exception(busy("the server is shutting down"))
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[PendingRequest]:
        """Wait for requests; return the oldest and those of the same model that fit with it. Empty: closed."""
        with self._queue_changed:
            while True:
                self._queue_changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return []
                batch: list[PendingRequest] = []
                remaining: deque[PendingRequest] = deque()
                num_rows = 0
                for request in self._queue:
                    rows = self._num_rows(request.model, request.questions)
                    same_model = not batch or request.model == batch[0].model
                    if batch and not (same_model and num_rows + rows <= self.limits.max_batch):
                        remaining.append(request)
                    elif request.results.set_running_or_notify_cancel():  # False: the client has disconnected
                        batch.append(request)
                        num_rows += rows
                self._queue = remaining
                if batch:
                    return batch

    def _num_rows(self, model: str, questions: Sequence[object]) -> int:
        return 1 if self.models[model].model.shares_images else len(questions)

    def _answer(self, batch: Sequence[PendingRequest]) -> None:
        """Answer a batch; if the model fails on it, answer its requests one by one, so that only the bad one fails."""
        current = []
        for request in batch:
            if request.expired:
                request.results.set_exception(self._timeout())
            else:
                current.append(request)
        if not current:
            return
        try:
            answers = self._predict(current)
        except Exception as error:
            if len(current) == 1:
                current[0].results.set_exception(_client_error(error))
                return
            for request in current:
                self._answer([request])
            return
        # Requests without alternatives and attribution first: those two take a while.
        for request in sorted(current, key=lambda request: bool(request.alternatives or request.attribution)):
            try:
                request.results.set_result(self._results(request, [answers[key] for key in request.ids]))
            except Exception as error:
                request.results.set_exception(_client_error(error))

    def _predict(self, batch: Sequence[PendingRequest]) -> dict[int | str, Answer]:
        """Return answers by question id; duplicate questions are computed once."""
        model = batch[0].model
        predictor = self.models[model]
        examples: list[Example] = []
        seen: set[str] = set()
        for request in batch:
            new = {key: text for key, text in zip(request.ids, request.questions, strict=True) if key not in seen}
            seen |= new.keys()
            prompts = {key: predictor.prompt.replace("{question}", text) for key, text in new.items()}
            questions = tuple(Question(key, text, prompts[key]) for key, text in new.items())
            if questions:
                examples.append(Example(request.image, "sent", questions))
        answers = predictor.answer_examples(examples, batch_size=self.limits.max_batch)
        self.batch_sizes.append(sum(self._num_rows(model, example.questions) for example in examples))
        return answers

    def _results(self, request: PendingRequest, answers: Sequence[Answer]) -> list[QuestionResult]:
        """Add the requested alternatives and attribution maps to the answers."""
        predictor = self.models[request.model]
        alternatives: Sequence[Sequence[Answer]] = [()] * len(answers)
        if request.alternatives:
            self._check_deadline(request)
            beams = predictor.beam_candidates(request.image, list(request.questions), request.alternatives + 1)
            alternatives = [
                [other for other in found if other.text != answer.text][: request.alternatives]
                for found, answer in zip(beams, answers, strict=True)
            ]
        attributions: list[Attribution | None] = [None] * len(answers)
        if request.attribution:
            for index, (question, answer) in enumerate(zip(request.questions, answers, strict=True)):
                self._check_deadline(request)
                attributions[index] = attribute(predictor, request.image, question, answer.text, request.attribution)
        return [QuestionResult(*row) for row in zip(answers, alternatives, attributions, strict=True)]

    def _check_deadline(self, request: PendingRequest) -> None:
        if request.expired:
            raise self._timeout()

    def _timeout(self) -> RequestError:
        return busy(f"there was no answer within {self.limits.timeout_s:g} seconds")


def _client_error(error: Exception) -> RequestError:
    """Return the error for the client: the message of an `InputError`; otherwise details go only to the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError):
        return RequestError(422, str(error))
    log.error("a request failed", exc_info=error)
    return RequestError(500, "the model failed on this request; see the server's log")
