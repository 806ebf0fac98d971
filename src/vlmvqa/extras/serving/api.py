"""The HTTP API: `POST /answer`, `GET /health`, its documentation, and the image routes of the page."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

import vlmvqa
from vlmvqa.extras.serving import openapi
from vlmvqa.extras.serving.image_cache import ImageCache
from vlmvqa.extras.serving.limits import Limits, RequestError
from vlmvqa.extras.serving.service import Service

R = TypeVar("R")
FIELDS = ("image", "question", "alternatives", "attribution")
FORM_HINT = "send multipart/form-data with a file `image` and a field `question` for each question"
CACHED_IMAGES = 25  # images of the largest size that the page's cache holds


def build(service: Service) -> FastAPI:
    """Return the API without the page and without `AccessMiddleware`."""
    limits = service.limits
    images = ImageCache(CACHED_IMAGES * limits.bytes)
    app = FastAPI(title="vlmvqa", version=vlmvqa.__version__, docs_url=None, redoc_url=None)
    app.state.images = images

    @app.post(
        "/answer",
        summary="Answer questions about an image",
        response_model=openapi.Answers,
        responses={status: {"model": openapi.Error, "description": why} for status, why in openapi.ERRORS.items()},
        openapi_extra=openapi.request_body(limits),
    )
    async def answer(request: Request) -> Any:
        with service.request_slot():
            form = await _parse_form(request, limits)
            (image,) = form.getlist("image")
            assert isinstance(image, UploadFile)
            answering = service.answer(
                await image.read(),
                [str(text) for text in form.getlist("question")],
                alternatives=_number(form, "alternatives"),
                attribution=_text(form, "attribution"),
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
        with service.request_slot():
            content = await request.body()
            image = await service.decode(content)
        return {"name": images.add(content), "width": image.width, "height": image.height}

    @app.get("/image/{name}", include_in_schema=False)
    async def cached_image(name: str) -> Response:
        content = images.get(name)
        if content is None:
            raise RequestError(404, "this image is no longer cached; upload it again")
        return Response(content, media_type=_media_type(content), headers={"cache-control": "private, max-age=3600"})

    for kind in (RequestError, HTTPException, ClientDisconnect, Exception):
        app.exception_handler(kind)(_error_response)
    return app


class _InMemoryParser(MultiPartParser):
    spool_max_size = 2**62  # never write to disk; `AccessMiddleware` limits the body


async def _parse_form(request: Request, limits: Limits) -> FormData:
    """Return the form of a request.

    FastAPI would parse it before `Service.request_slot` is checked, and write large files to disk.

    Raises:
        RequestError: the body isn't a form with these fields.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError(415, FORM_HINT)
    # Looser than the limits, so that later checks return their own messages.
    bounds = {"max_files": 1, "max_fields": 4 * limits.questions + 8, "max_part_size": 4 * limits.characters + 1000}
    try:
        form = await _InMemoryParser(request.headers, request.stream(), **bounds).parse()
    except MultiPartException as error:
        raise RequestError(400, f"{error.message.rstrip('.')}; {FORM_HINT}") from None
    except (FormParserError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(400, f"the form cannot be parsed ({reason}); {FORM_HINT}") from None
    unknown = sorted(set(form) - set(FIELDS))
    if unknown:
        raise RequestError(422, f"there is no field {unknown[0][:40]!r}; use {', '.join(FIELDS)}")
    files = [name for name, value in form.multi_items() if isinstance(value, UploadFile)]
    if files != ["image"] or len(form.getlist("image")) != 1:
        raise RequestError(422, f"there must be one file, `image`; {FORM_HINT}")
    return form


def _text(form: FormData, name: str) -> str | None:
    """Return an optional field; None if it is missing or empty."""
    values = form.getlist(name)
    if len(values) > 1:
        raise RequestError(422, f"{name} is given {len(values)} times; give it once")
    return str(values[0]) or None if values else None


def _number(form: FormData, name: str) -> int:
    text = _text(form, name) or "0"
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise RequestError(422, f"{name}={text[:40]} is not a number; leave it out, or use 0 or more")
    return int(text)


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
        case HTTPException():
            status, message, headers = error.status_code, error.detail, error.headers
        case ClientDisconnect():
            status, message = 499, "the client disconnected"
        case _:  # uvicorn logs the traceback
            status, message = 500, "the server failed on this request; see its log"
    return JSONResponse({"error": message}, status, headers)
