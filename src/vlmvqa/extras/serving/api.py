"""The HTTP API: `POST /answer`, `GET /health`, its documentation, and the image routes of the page."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Form
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request

import vlmvqa
from vlmvqa.extras.serving import openapi
from vlmvqa.extras.serving.limits import RequestError
from vlmvqa.extras.serving.service import Service
from vlmvqa.extras.serving.uploads import ImageCache

R = TypeVar("R")
FORM_HINT = "send multipart/form-data with a file `image` and a field `question` for each question"
CACHED_IMAGES = 25  # images of the largest size that the page's cache holds

MultiPartParser.spool_max_size = 2**62  # never write to disk; `AccessMiddleware` limits the body


def build(service: Service) -> FastAPI:
    """Return the API without the page and without `AccessMiddleware`."""
    images = ImageCache(CACHED_IMAGES * service.limits.bytes)
    app = FastAPI(title="vlmvqa", version=vlmvqa.__version__, docs_url=None, redoc_url=None)
    app.state.images = images

    @app.post(
        "/answer",
        summary="Answer questions about an image",
        response_model=openapi.Answers,
        responses={status: {"model": openapi.Error, "description": why} for status, why in openapi.ERRORS.items()},
    )
    async def answer(
        request: Request, form: Annotated[openapi.AnswerForm, Form(media_type="multipart/form-data")]
    ) -> Any:
        if len((await request.form()).getlist("image")) > 1:
            raise RequestError(422, f"there must be one `image`; {FORM_HINT}")
        answering = service.answer(
            await form.image.read(), form.question, alternatives=form.alternatives, attribution=form.attribution
        )
        answers = await _unless_disconnected(request, answering)
        return {"model": service.model_names[0], "answers": answers}

    @app.get("/health", summary="Return the server's state", response_model=openapi.Health)
    async def health() -> Any:
        return {"status": "ready", "waiting": service.batcher.num_waiting}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(openapi.page(app.openapi()))

    @app.post("/image", include_in_schema=False)
    async def upload(request: Request) -> Any:
        """Cache an image for the page; its events then name the image."""
        content = await request.body()
        image = await service.decode(content)
        return {"name": images.add(content), "width": image.width, "height": image.height}

    @app.get("/image/{name}", include_in_schema=False)
    async def cached_image(name: str) -> Response:
        content = images.get(name)
        if content is None:
            raise RequestError(404, "this image is no longer cached; upload it again")
        return Response(content, media_type=_media_type(content), headers={"cache-control": "private, max-age=3600"})

    for kind in (RequestError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.exception_handler(kind)(_error_response)
    return app


async def _unless_disconnected(request: Request, answering: Coroutine[Any, Any, R]) -> R:
    """Return the result of a coroutine, but cancel it when the client disconnects."""
    task = asyncio.ensure_future(answering)
    disconnect = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, disconnect):
            future.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await future


def _media_type(content: bytes) -> str:
    """Return the type of a file that `uploads.decode` has accepted."""
    kinds = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"GI": "gif", b"BM": "bmp", b"RI": "webp"}
    return f"image/{kinds[content[:2]]}"


async def _error_response(_: Request, error: Exception) -> Response:
    headers: Mapping[str, str] | None = None
    match error:
        case RequestError():
            status, message, headers = error.status, error.message, error.headers
        case RequestValidationError():
            first = error.errors()[0]
            status, message = 422, f"{first['loc'][-1]!s:.40}: {first['msg']}; {FORM_HINT}"
        case HTTPException():
            status, message, headers = error.status_code, error.detail, error.headers
        case ClientDisconnect():
            status, message = 499, "the client disconnected"
        case _:  # uvicorn logs the traceback
            status, message = 500, "the server failed on this request; see its log"
    return JSONResponse({"error": message}, status, headers)
