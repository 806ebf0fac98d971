"""The HTTP API and the files of the page."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from fastapi import APIRouter, FastAPI, Form, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request

import vlmvqa
from vlmvqa.extras.report.gallery import data_uri
from vlmvqa.extras.serving import browse, openapi, uploads
from vlmvqa.extras.serving.batcher import Batcher, PendingRequest
from vlmvqa.extras.serving.limits import RequestError, busy

R = TypeVar("R")
FOLDER = Path(__file__).parent
FORM_HINT = "send multipart/form-data with a file `image` and a field `question` for each question"
DECODER_THREADS = 2  # each decodes one image, which takes up to 17 bytes per pixel

MultiPartParser.spool_max_size = 2**62  # never write to disk; `AccessMiddleware` limits the body


def build(batcher: Batcher, run: browse.Run | None = None, examples: Sequence[bytes] = ()) -> FastAPI:
    """Return the application without `AccessMiddleware`.

    Args:
        batcher: answers the requests; its first model is the default.
        run: run to browse.
        examples: image files to choose from.
    """
    app = FastAPI(title="vlmvqa", version=vlmvqa.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    info = openapi.Info(
        models=list(batcher.models),
        formats=list(uploads.FORMATS),
        limits=batcher.limits,
        examples=[data_uri(uploads.decode(content, batcher.limits)) for content in examples],
        question_types=None if run is None else run.types,
    )

    app.include_router(_answers(batcher))
    app.include_router(_page(info, run, examples))
    for kind in (RequestError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.exception_handler(kind)(_error_response)
    return app


def _answers(batcher: Batcher) -> APIRouter:
    """Return the routes that answer requests and report the server's state."""
    router, models = APIRouter(), list(batcher.models)
    decoders = ThreadPoolExecutor(DECODER_THREADS, thread_name_prefix="vlmvqa images")

    @router.post(
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
        model, limits, loop = form.model or models[0], batcher.limits, asyncio.get_running_loop()
        if model not in batcher.models:
            raise RequestError(422, f"model={model:.60} is not served; use {' or '.join(models)}")
        if form.alternatives > limits.alternatives:
            raise RequestError(422, f"alternatives={form.alternatives} is out of range; use 0 to {limits.alternatives}")
        questions = uploads.clean_questions(form.question, limits, batcher.special_tokens[model])
        content, settings = await form.image.read(), batcher.models[model].processor.images
        deadline = loop.time() + limits.timeout_s
        image = await loop.run_in_executor(decoders, uploads.decode, content, limits, settings)
        pending = batcher.submit(PendingRequest(model, image, questions, form.alternatives, form.attribution))
        answers = await _result(request, asyncio.wrap_future(pending), deadline - loop.time())
        if answers is None:
            raise busy(f"there was no answer within {limits.timeout_s:g} seconds")
        return {"model": model, "answers": answers}

    @router.get("/health", summary="Return the server's state", response_model=openapi.Health)
    async def health() -> Any:
        return {"status": "ready", "waiting": batcher.num_waiting}

    return router


def _page(info: openapi.Info, run: browse.Run | None, examples: Sequence[bytes]) -> APIRouter:
    """Return the routes that serve the page, the data that it shows, and the OpenAPI schema."""
    router = APIRouter()

    @router.get("/info", summary="Return the models, limits, examples and the browsed run's question types")
    async def show_info() -> openapi.Info:
        return info

    @router.get("/browse", summary="Return a page of the browsed run's answers")
    def show_page(
        correctness: browse.Correctness = "all",
        type: Annotated[str, Query(description="a question type; empty: all")] = "",
        confidence: browse.Confidence = "any",
        page: Annotated[int, Query(ge=0)] = 0,
    ) -> Any:
        if run is None:
            raise RequestError(404, "no run is open; start the server with browse=runs/name, a scored run's folder")
        return browse.page(run, correctness, type, confidence, page)

    @router.get("/examples/{number}", summary="Return the image file of an example", response_class=Response)
    async def example(number: int) -> Response:
        if not 0 <= number < len(examples):
            raise RequestError(404, f"there is no example {number}; there are {len(examples)}, counted from 0")
        return Response(examples[number], media_type="application/octet-stream")

    @router.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:  # FastAPI's own page loads scripts from other hosts
        return PlainTextResponse(yaml.safe_dump(request.app.openapi(), sort_keys=False))

    @router.get("/", include_in_schema=False)
    @router.get("/page.css", include_in_schema=False)
    @router.get("/page.js", include_in_schema=False)
    async def page_file(request: Request) -> FileResponse:
        return FileResponse(FOLDER / (request.url.path[1:] or "page.html"))

    return router


async def _result(request: Request, answers: asyncio.Future[R], seconds: float) -> R | None:
    """Return a future's result; cancel it if the client leaves, the server stops, or `seconds` have passed (None)."""
    disconnect = asyncio.ensure_future(request.receive())
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


async def _error_response(request: Request, error: Exception) -> Response:
    headers: Mapping[str, str] | None = None
    path = request.url.path if len(request.url.path) <= 60 else f"{request.url.path[:60]}..."
    match error:
        case RequestError():
            status, message, headers = error.status, error.message, error.headers
        case RequestValidationError():
            first = error.errors()[0]
            hint = f"; {FORM_HINT}" if first["loc"][0] == "body" else ""
            status, message = 422, f"{first['loc'][-1]!s:.40}: {first['msg']}{hint}"
        case HTTPException():
            status, message, headers = error.status_code, error.detail, error.headers
            if status == 404:
                message = f"there is no {path}; /docs lists the routes"
            elif status == 405 and headers:
                message = f"{request.method:.60} {path} is not allowed; use {headers['Allow']} (see /docs)"
        case ClientDisconnect():
            status, message = 499, "the client disconnected"
        case _:  # uvicorn logs the traceback
            status, message = 500, "the server failed on this request; see its log"
    return JSONResponse({"error": message}, status, headers)
