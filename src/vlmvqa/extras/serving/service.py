"""A picture and its questions to answers: what the API and the page both do with what a client sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from vlmvqa.extras.report.attribution import METHODS
from vlmvqa.extras.serving import overlay, uploads
from vlmvqa.extras.serving.batcher import Answered, Asked, Batcher
from vlmvqa.extras.serving.limits import Limits, Refused, busy
from vlmvqa.inference.predictor import Predictor

DECODERS = 2  # pictures decoded at a time: each takes up to 17 bytes a pixel meanwhile


@dataclass(frozen=True)
class Told:
    """An answer as it is shown.

    Attributes:
        probability: of the whole answer, its end included.
        cut: it was truncated at max_new_tokens.
        alternatives: text and probability.
        look: PNG of the attention map.
    """

    question: str
    text: str
    probability: float
    cut: bool = False
    alternatives: Sequence[tuple[str, float]] = ()
    look: bytes | None = None


class Service:
    """The models of a server and what they are asked through.

    Args:
        models: by the names that clients call them, the first one's first.
    """

    def __init__(self, models: Mapping[str, Predictor], limits: Limits) -> None:
        self.names, self.limits = tuple(models), limits
        self.batcher = Batcher(models, limits)
        self._settings = {name: predictor.processor.images for name, predictor in models.items()}
        self._marks = {name: _marks(predictor) for name, predictor in models.items()}
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="vlmvqa pictures")
        self._inside = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Room for one more request, from before it is read to its end.

        Raises:
            Refused: so many are being read, wait or are answered that there is none.
        """
        if self._inside >= self.limits.queue + self.limits.max_batch:
            raise busy(f"{self._inside} requests are being answered already")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def decode(self, content: bytes, model: str | None = None) -> Image.Image:
        """As `uploads.decode`, in one of a few threads."""
        settings = self._settings[model or self.names[0]]
        return await asyncio.get_running_loop().run_in_executor(
            self._decoders, uploads.decode, content, self.limits, settings
        )

    async def ask(
        self, content: bytes, texts: Sequence[str], *, model: str = "", alternatives: int = 0, look: str | None = None
    ) -> list[Told]:
        """An answer to each question about the picture of a file's bytes.

        Args:
            model: one of the names; "": the first.
            alternatives, look: as of `Asked`.

        Raises:
            Refused: what was sent cannot be answered, or not now.
        """
        model = model or self.names[0]
        if look not in (None, *METHODS):
            raise Refused(422, f"look={look[:40]} is unknown; use {' or '.join(METHODS)}, or leave it out")
        if not 0 <= alternatives <= self.limits.alternatives:
            raise Refused(422, f"{alternatives} alternatives are asked for; ask for 0 to {self.limits.alternatives}")
        questions = uploads.questions(texts, self.limits, self._marks[model])
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                picture = await self.decode(content, model)
                submitted = self.batcher.submit(Asked(model, picture, questions, alternatives, look))
                answered = await asyncio.wrap_future(submitted)  # left here, it is cancelled there
                drawn = await asyncio.to_thread(_draw, picture, answered)
        except TimeoutError:
            raise busy(f"there was no answer within {self.limits.timeout_s:g} seconds") from None
        return [
            Told(
                question,
                one.answer.text,
                one.answer.probability,
                one.answer.cut,
                [(other.text, other.probability) for other in one.alternatives],
                png,
            )
            for question, one, png in zip(questions, answered, drawn, strict=True)
        ]

    def close(self) -> None:
        """End the threads."""
        self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)


def _draw(picture: Image.Image, answered: Sequence[Answered]) -> list[bytes | None]:
    return [None if one.look is None else overlay.png(picture, one.look) for one in answered]


def _marks(predictor: Predictor) -> frozenset[str]:
    """What a tokenizer takes for more than words. A question that holds `<image>` would ask for another picture."""
    tokenizer = predictor.processor.tokenizer
    return frozenset(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
