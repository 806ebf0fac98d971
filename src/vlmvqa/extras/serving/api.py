"""The HTTP API: `POST /answer`, `GET /health`, and a page that describes them. The page for people uses it too."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

import vlmvqa
from vlmvqa.extras.serving import openapi
from vlmvqa.extras.serving.limits import Limits, Refused
from vlmvqa.extras.serving.pictures import Pictures
from vlmvqa.extras.serving.service import Service, Told

R = TypeVar("R")
FIELDS = ("image", "question", "alternatives", "look")
MULTIPART = "send multipart/form-data with a file `image` and a field `question` for each question"
KEPT = 25  # pictures of the largest size that are kept for the page


class Alternative(BaseModel):
    text: str
    probability: float


class OneAnswer(BaseModel):
    question: str
    text: str
    probability: float = Field(description="of the whole answer, its end included")
    cut: bool = Field(description="the answer was truncated at max_new_tokens")
    alternatives: list[Alternative] = Field(description="what else it might have said, the likeliest first")
    look: str | None = Field(description="the attention map, drawn over the picture: a PNG in base64")


class Answers(BaseModel):
    model: str
    answers: list[OneAnswer]


class Health(BaseModel):
    status: str
    waiting: int = Field(description="requests that wait to be answered")


class Error(BaseModel):
    error: str = Field(description="one sentence: what is wrong, and what to do")


def build(service: Service) -> FastAPI:
    """The application, without the page and without its guard."""
    limits = service.limits
    pictures = Pictures(KEPT * limits.bytes)
    app = FastAPI(title="vlmvqa", version=vlmvqa.__version__, docs_url=None, redoc_url=None)
    app.state.pictures = pictures

    @app.post(
        "/answer",
        summary="Answer questions about a picture",
        response_model=Answers,
        responses={status: {"model": Error, "description": why} for status, why in openapi.REFUSALS.items()},
        openapi_extra=openapi.body(limits),
    )
    async def answer(request: Request) -> Any:
        with service.admitted():
            sent = await _form(request, limits)
            (picture,) = sent.getlist("image")
            assert isinstance(picture, UploadFile)
            told = await _unless_left(
                request,
                service.ask(
                    await picture.read(),
                    [str(text) for text in sent.getlist("question")],
                    alternatives=_number(sent, "alternatives"),
                    look=_text(sent, "look"),
                ),
            )
        return {"model": service.names[0], "answers": [_shown(one) for one in told]}

    @app.get("/health", summary="Whether it answers", response_model=Health)
    async def health() -> Any:
        return {"status": "ready", "waiting": service.batcher.waiting}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(openapi.page(app.openapi()))

    @app.post("/picture", include_in_schema=False)
    async def picture(request: Request) -> Any:
        """Keep a picture for the page, which then asks by its name."""
        with service.admitted():
            content = await request.body()
            decoded = await service.decode(content)
        return {"name": pictures.keep(content), "width": decoded.width, "height": decoded.height}

    @app.get("/picture/{name}", include_in_schema=False)
    async def kept(name: str) -> Response:
        content = pictures.find(name)
        if content is None:
            raise Refused(404, "this picture is no longer kept; drop it again")
        return Response(content, media_type=_media_type(content), headers={"cache-control": "private, max-age=3600"})

    app.exception_handler(Refused)(_refused)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(ClientDisconnect)(_left)
    app.exception_handler(Exception)(_failed)
    return app


class _Parser(MultiPartParser):
    spool_max_size = 2**62  # in memory, however large: the body's size is limited before


async def _form(request: Request, limits: Limits) -> FormData:
    """The fields of a request.

    Raises:
        Refused: it is no form, or not of these fields.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(415, MULTIPART)
    # One more than may be, so that the sentence is ours.
    most = {"max_files": 1, "max_fields": 4 * limits.questions + 8, "max_part_size": 4 * limits.characters + 1000}
    try:
        sent = await _Parser(request.headers, request.stream(), **most).parse()
    except MultiPartException as error:
        raise Refused(400, f"{error.message.rstrip('.')}; {MULTIPART}") from None
    except (FormParserError, ValueError, KeyError) as error:
        raise Refused(400, f"the form cannot be read ({' '.join(str(error).split())[:200]}); {MULTIPART}") from None
    unknown = sorted(set(sent) - set(FIELDS))
    if unknown:
        raise Refused(422, f"there is no field {unknown[0][:40]!r}; use {', '.join(FIELDS)}")
    files = [name for name, value in sent.multi_items() if isinstance(value, UploadFile)]
    if files != ["image"] or len(sent.getlist("image")) != 1:
        raise Refused(422, f"there must be one file, `image`; {MULTIPART}")
    return sent


def _text(sent: FormData, name: str) -> str | None:
    """A field that is given at most once; None: it is not, or is empty."""
    given = sent.getlist(name)
    if len(given) > 1:
        raise Refused(422, f"{name} is given {len(given)} times; give it once")
    return str(given[0]) or None if given else None


def _number(sent: FormData, name: str) -> int:
    text = _text(sent, name) or "0"
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Refused(422, f"{name}={text[:40]} is no number; leave it out, or give 0 or more")
    return int(text)


async def _unless_left(request: Request, asking: Coroutine[Any, Any, R]) -> R:
    """What is asked for; given up when the client has left, so that it need not be computed."""
    task = asyncio.ensure_future(asking)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


def _shown(told: Told) -> dict[str, Any]:
    return {
        "question": told.question,
        "text": told.text,
        "probability": told.probability,
        "cut": told.cut,
        "alternatives": [{"text": text, "probability": probability} for text, probability in told.alternatives],
        "look": None if told.look is None else base64.b64encode(told.look).decode("ascii"),
    }


def _media_type(content: bytes) -> str:
    """Of a file that was decoded before."""
    kinds = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"GI": "gif", b"BM": "bmp", b"RI": "webp"}
    return f"image/{kinds[content[:2]]}"


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse({"error": error.sentence}, error.status, headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _left(_: Request, __: Exception) -> Response:
    return JSONResponse({"error": "the client left"}, 499)


async def _failed(_: Request, __: Exception) -> Response:
    """Of our own mistakes; uvicorn logs the traceback."""
    return JSONResponse({"error": "the server failed on this request; its log says why"}, 500)
