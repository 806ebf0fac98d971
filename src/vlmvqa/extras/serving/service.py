"""Answer the questions of a request: validate, decode, queue and render, for the API and the page."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from PIL import Image

from vlmvqa.extras.report.attribution import Attribution, draw
from vlmvqa.extras.serving import uploads
from vlmvqa.extras.serving.batcher import Batcher, QuestionResult
from vlmvqa.extras.serving.limits import Limits, RequestError, busy
from vlmvqa.extras.serving.openapi import Alternative, QuestionAnswer
from vlmvqa.inference.predictor import Predictor

DECODER_THREADS = 2  # each decodes one image, which takes up to 17 bytes per pixel
MAP_SIDE = 512  # pixels of an attribution map's longer side; small images are enlarged so that it looks smooth


class Service:
    """The models of a server, their queue and the threads that decode images.

    Args:
        models: predictors by the name shown to clients; the first is the default.
    """

    def __init__(self, models: Mapping[str, Predictor], limits: Limits) -> None:
        self.model_names, self.limits = tuple(models), limits
        self.batcher = Batcher(models, limits)
        self._image_settings = {name: predictor.processor.images for name, predictor in models.items()}
        self._special_tokens = {name: _special_tokens(predictor) for name, predictor in models.items()}
        self._decoders = ThreadPoolExecutor(DECODER_THREADS, thread_name_prefix="vlmvqa images")

    async def decode(self, content: bytes, model: str | None = None) -> Image.Image:
        """Run `uploads.decode` in a thread."""
        settings = self._image_settings[model or self.model_names[0]]
        return await asyncio.get_running_loop().run_in_executor(
            self._decoders, uploads.decode, content, self.limits, settings
        )

    async def answer(
        self,
        content: bytes,
        texts: Sequence[str],
        *,
        model: str | None = None,
        alternatives: int = 0,
        attribution: str | None = None,
    ) -> list[QuestionAnswer]:
        """Answer questions about an image file; `alternatives` and `attribution` are those of `PendingRequest`.

        Args:
            model: name of the model; None: the first.

        Raises:
            RequestError: the request is invalid, or the server is busy.
        """
        model = model or self.model_names[0]
        if not 0 <= alternatives <= self.limits.alternatives:
            raise RequestError(422, f"alternatives={alternatives} is out of range; use 0 to {self.limits.alternatives}")
        questions = uploads.clean_questions(texts, self.limits, self._special_tokens[model])
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                image = await self.decode(content, model)
                submitted = self.batcher.submit(model, image, questions, alternatives, attribution)
                results = await asyncio.wrap_future(submitted)  # cancelling this also cancels `submitted`
                return await asyncio.to_thread(_render, image, questions, results)
        except TimeoutError:
            raise busy(f"there was no answer within {self.limits.timeout_s:g} seconds") from None

    def close(self) -> None:
        """Stop the threads."""
        self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)


def _render(image: Image.Image, questions: Sequence[str], results: Sequence[QuestionResult]) -> list[QuestionAnswer]:
    return [
        QuestionAnswer(
            question=question,
            text=result.answer.text,
            probability=result.answer.probability,
            truncated=result.answer.cut,
            alternatives=[Alternative(text=one.text, probability=one.probability) for one in result.alternatives],
            attribution=None if result.attribution is None else _attribution_png(image, result.attribution),
        )
        for question, result in zip(questions, results, strict=True)
    ]


def _attribution_png(image: Image.Image, attribution: Attribution) -> str:
    """Return the image with the attribution map over it, as a PNG in base64.

    Args:
        image: RGB, upright, as the model received it.
    """
    scale = MAP_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top, right, bottom = attribution.box
    scale_x, scale_y = width / image.width, height / image.height
    left, top = min(round(left * scale_x), width - 1), min(round(top * scale_y), height - 1)
    box = (left, top, max(round(right * scale_x), left + 1), max(round(bottom * scale_y), top + 1))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    draw(resized, replace(attribution, box=box)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _special_tokens(predictor: Predictor) -> frozenset[str]:
    """Return texts that a question may not contain; `<image>`, for example, would insert another image."""
    tokenizer = predictor.processor.tokenizer
    return frozenset(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
