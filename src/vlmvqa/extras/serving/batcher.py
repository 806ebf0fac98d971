"""Micro-batching: a queue of requests and the thread that runs the models on batches of them.

In float32 an answer doesn't depend on the other rows of its batch (`tests/unit/test_predictor.py`), so it doesn't
depend on other clients either; in bfloat16 on a GPU it may, by rounding.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Self

from PIL import Image

from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.extras.report.attribution import Attribution, attribute, draw
from vlmvqa.extras.serving.limits import MILLION, Limits, RequestError, busy
from vlmvqa.extras.serving.openapi import Alternative, QuestionAnswer
from vlmvqa.inference.predictor import Answer, Predictor

log = logging.getLogger("vlmvqa.extras.serving")
MAP_SIDE = 512  # pixels of an attribution map's longer side; small images are enlarged so that it looks smooth


@dataclass(eq=False)
class PendingRequest:
    """An image and its questions, waiting to be answered.

    Attributes:
        model: name of the model.
        image: RGB, upright.
        alternatives: number of alternative answers per question.
        attribution: method of the attribution map; None: no map.
        deadline: monotonic time after which slow requests are not finished.
        results: an answer for each question, in order.
    """

    model: str
    image: Image.Image
    questions: Sequence[str]
    alternatives: int = 0
    attribution: str | None = None
    deadline: float = math.inf
    results: Future[Any] = field(default_factory=Future)

    @cached_property
    def ids(self) -> list[str]:
        """An id of image and text for each question; sampling is seeded by it, so equal requests get equal answers."""
        image = blake2b(self.image.tobytes(), digest_size=16).hexdigest()
        return [f"{self.image.size} {image} {question}" for question in self.questions]

    @property
    def batch_key(self) -> Hashable:
        """Requests with equal keys may share a batch."""
        return self.model

    @property
    def is_slow(self) -> bool:
        """Whether `finish` runs the model, for this request alone."""
        return bool(self.alternatives or self.attribution)

    @classmethod
    def predict(cls, predictor: Predictor, batch: Sequence[Self], max_rows: int) -> Sequence[Any]:
        """Run the model on requests with equal keys; return for each what `finish` needs.

        Duplicate questions are computed once.
        """
        examples: list[Example] = []
        seen: set[str] = set()
        for request in batch:
            new = {key: text for key, text in zip(request.ids, request.questions, strict=True) if key not in seen}
            seen |= new.keys()
            prompts = ((key, text, predictor.prompt.replace("{question}", text)) for key, text in new.items())
            if questions := tuple(Question(*one) for one in prompts):
                examples.append(Example(request.image, "sent", questions))
        answers = predictor.answer_examples(examples, batch_size=max_rows)
        return [[answers[key] for key in request.ids] for request in batch]

    def finish(self, predictor: Predictor, answers: Any) -> list[Any]:
        """Return the results: add the requested alternatives and attribution maps to the answers."""
        results = []
        beams: Sequence[Sequence[Answer]] = [()] * len(answers)
        if self.alternatives:
            beams = predictor.beam_candidates(self.image, list(self.questions), self.alternatives + 1)
        for question, answer, found in zip(self.questions, answers, beams, strict=True):
            result = QuestionAnswer(
                question=question, text=answer.text, probability=answer.probability, truncated=answer.cut
            )
            others = [Alternative(text=other.text, probability=other.probability) for other in found]
            result.alternatives = [other for other in others if other.text != answer.text][: self.alternatives]
            if self.attribution:
                attribution = attribute(predictor, self.image, question, answer.text, self.attribution)
                result.attribution = _png(self.image, attribution)
            results.append(result)
        return results


class Batcher:
    """Answer requests in batches on one thread.

    Args:
        models: predictors by name.

    Attributes:
        special_tokens: texts that a question may not contain; `<image>`, for example, would insert another image.
    """

    def __init__(self, models: Mapping[str, Predictor], limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.special_tokens = {
            name: [str(token) for token in model.processor.tokenizer.added_tokens_decoder.values() if token.special]
            for name, model in models.items()
        }
        self._queue: deque[PendingRequest] = deque()
        self._queue_changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vlmvqa models", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    def submit(self, request: PendingRequest) -> Future[Any]:
        """Queue a request; cancelling its future before it runs drops it.

        Raises:
            RequestError: the queue is full, or the server is shutting down.
        """
        request.deadline = time.monotonic() + self.limits.timeout_s
        with self._queue_changed:
            if self._closed:
                raise busy("the server is shutting down")
            pixels = sum(other.image.width * other.image.height for other in (request, *self._queue))
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
            self._queue_changed.notify()
            for request in self._queue:
                if request.results.set_running_or_notify_cancel():
                    request.results.set_exception(busy("the server is shutting down"))
            self._queue.clear()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[PendingRequest]:
        """Wait for requests; return the oldest and those with an equal key that fit with it. Empty: closed."""
        batch: list[PendingRequest] = []
        num_rows = 0
        with self._queue_changed:
            while not batch:
                self._queue_changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    break
                for _ in range(len(self._queue)):  # once around: requests that don't fit are queued again, in order
                    request = self._queue.popleft()
                    rows = 1 if self.models[request.model].model.shares_images else len(request.questions)
                    same = not batch or request.batch_key == batch[0].batch_key
                    fits = not batch or (same and num_rows + rows <= self.limits.max_batch)
                    if not fits:
                        self._queue.append(request)
                    elif request.results.set_running_or_notify_cancel():  # False: the client has left or timed out
                        batch.append(request)
                        num_rows += rows
        return batch

    def _answer(self, batch: Sequence[PendingRequest]) -> None:
        """Answer a batch; if the model fails on it, answer its requests one by one, so that only the bad one fails."""
        predictor = self.models[batch[0].model]
        try:
            predicted = batch[0].predict(predictor, batch, self.limits.max_batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].results.set_exception(_client_error(error))
            else:
                for request in batch:
                    self._answer([request])
            return
        # Slow requests last.
        for request, answers in sorted(zip(batch, predicted, strict=True), key=lambda pair: pair[0].is_slow):
            try:
                if request.is_slow and time.monotonic() > request.deadline:
                    raise busy("there was no answer in time")  # the client already has this error
                request.results.set_result(request.finish(predictor, answers))
            except Exception as error:
                request.results.set_exception(_client_error(error))


def _png(image: Image.Image, attribution: Attribution) -> str:
    """Return an image (RGB, upright) with an attribution map over it, as a PNG in base64."""
    width, height = (max(1, round(side * MAP_SIDE / max(image.size))) for side in image.size)
    ratios = (width / image.width, height / image.height) * 2
    left, top, right, bottom = (round(edge * ratio) for edge, ratio in zip(attribution.box, ratios, strict=True))
    box = (left, top, max(right, left + 1), max(bottom, top + 1))  # at least a pixel
    buffer = io.BytesIO()
    draw(image.resize((width, height), Image.Resampling.BICUBIC), replace(attribution, box=box)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _client_error(error: Exception) -> RequestError:
    """Return the error for the client: the message of an `InputError`; otherwise details go only to the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError):
        return RequestError(422, str(error))
    log.error("a request failed", exc_info=error)
    return RequestError(500, "the model failed on this request; see the server's log")
