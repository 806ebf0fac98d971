"""From an upload to its result: decode the image on a thread, queue the request, and wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL.Image import Image
from starlette.requests import ClientDisconnect, Request

from vlmvqa.extras.serving import uploads
from vlmvqa.extras.serving.batcher import Batcher, PendingRequest
from vlmvqa.extras.serving.limits import busy

DECODER_THREADS = 2  # each decodes one image, which takes up to 17 bytes per pixel


class Handler:
    """Answer uploads with the models of a queue."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self._decoders = ThreadPoolExecutor(DECODER_THREADS, thread_name_prefix="vlmvqa images")

    async def answer(
        self, client: Request, model: str, content: bytes, pending: Callable[[Image], PendingRequest]
    ) -> list[Any]:
        """Return the results of a request about an image.

        Args:
            client: watched, so that the request is dropped when the client leaves.
            model: name of the model that will read the image.
            content: the image file.
            pending: make the request from the decoded image.

        Raises:
            RequestError: the image cannot be read, the queue is full, or there was no answer in time.
        """
        limits, loop = self.batcher.limits, asyncio.get_running_loop()
        settings = self.batcher.models[model].processor.images
        deadline = loop.time() + limits.timeout_s
        image = await loop.run_in_executor(self._decoders, uploads.decode, content, limits, settings)
        queued = self.batcher.submit(pending(image))
        result = await _result(client, asyncio.wrap_future(queued), deadline - loop.time())
        if result is None:
            raise busy(f"there was no answer within {limits.timeout_s:g} seconds")
        return result


async def _result(client: Request, answers: asyncio.Future[list[Any]], seconds: float) -> list[Any] | None:
    """Return a future's result; cancel it if the client leaves, the server stops, or `seconds` have passed (None)."""
    disconnect = asyncio.ensure_future(client.receive())
    try:
        waiting: set[asyncio.Future[Any]] = {answers, disconnect}
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answers.done():
            return answers.result()
        if disconnect.done():
            raise ClientDisconnect
        return None
    except asyncio.CancelledError:
        raise busy("the server is shutting down") from None
    finally:
        answers.cancel()
        disconnect.cancel()
