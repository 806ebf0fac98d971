"""The HTTP API and the files of the page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from fastapi import APIRouter, FastAPI, Form, Query
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.formparsers import MultiPartParser
from starlette.requests import Request

import vlmvqa
from vlmvqa.extras.report.gallery import data_uri
from vlmvqa.extras.serving import browse, chat, errors, openapi, uploads
from vlmvqa.extras.serving.batcher import Batcher, PendingRequest
from vlmvqa.extras.serving.handler import Handler
from vlmvqa.extras.serving.limits import RequestError

FOLDER = Path(__file__).parent

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

    handler = Handler(batcher)
    app.include_router(_answers(handler))
    app.include_router(chat.routes(handler))
    app.include_router(_page(info, run, examples))
    for kind in errors.HANDLED:
        app.exception_handler(kind)(errors.handle)
    return app


def _answers(handler: Handler) -> APIRouter:
    """Return the routes that answer requests and report the server's state."""
    router, batcher = APIRouter(), handler.batcher
    models = list(batcher.models)

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
            raise RequestError(422, f"there must be one `image`; {errors.FORM_HINT}")
        model, limits = form.model or models[0], batcher.limits
        if model not in batcher.models:
            raise RequestError(422, f"model={model:.60} is not served; use {' or '.join(models)}")
        if form.alternatives > limits.alternatives:
            raise RequestError(422, f"alternatives={form.alternatives} is out of range; use 0 to {limits.alternatives}")
        questions = uploads.clean_questions(form.question, limits, batcher.special_tokens[model])
        pending = partial(
            PendingRequest, model, questions=questions, alternatives=form.alternatives, attribution=form.attribution
        )
        answers = await handler.answer(request, model, await form.image.read(), pending)
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
