"""The OpenAI-compatible API: `POST /v1/chat/completions` and `GET /v1/models`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.requests import Request

from vlmvqa.extras.serving import chat_schema as schema
from vlmvqa.extras.serving import uploads
from vlmvqa.extras.serving.completions import Completion, CompletionRequest
from vlmvqa.extras.serving.handler import Handler
from vlmvqa.extras.serving.limits import Limits, RequestError
from vlmvqa.models.interface import GenerationSettings

MIN_TEMPERATURE = 1e-4  # below it, float32 overflows and sampling is greedy decoding
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schema.ErrorResponse, "description": "400: a field is invalid or not supported"},
    503: {"model": schema.ErrorResponse, "description": "the queue is full, or there was no answer in time: retry"},
}
STREAM = {"description": "with `stream`: events with ChatCompletionChunk", "content": {"text/event-stream": {}}}


def routes(handler: Handler) -> APIRouter:
    """Return the routes of OpenAI's API."""
    router = APIRouter(prefix="/v1", responses=ERRORS)
    models = handler.batcher.models
    names, started = _names(models), int(time.time())

    def served(name: str) -> str:
        if name not in names:
            message = f"model={name:.60} is not served; use {' or '.join(models)}"
            raise RequestError(404, message, param="model", code="model_not_found")
        return names[name]

    @router.post(
        "/chat/completions",
        summary="Answer a question about an image, as OpenAI's API does",
        response_model=schema.ChatCompletion | schema.ChatCompletionChunk,
        responses={200: STREAM},
    )
    async def chat_completions(request: Request, body: schema.ChatRequest) -> Any:
        model, limits = served(body.model), handler.batcher.limits
        decoding = _decoding(body, models[model].decoding, limits)
        (question,) = uploads.clean_questions([body.question], limits, handler.batcher.special_tokens[model])
        pending = partial(
            CompletionRequest,
            model,
            questions=[question] * (body.n or 1),
            decoding=decoding,
            stop=body.stop or (),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        content = uploads.from_data_url(body.image_url)
        answers = await handler.answer(request, model, content, pending)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        if not body.stream:
            return _completion(answers, about)
        chunks = _chunks(answers, about, bool(body.stream_options and body.stream_options.include_usage))
        return StreamingResponse(_events(chunks), media_type="text/event-stream")

    @router.get("/models", summary="List the served models, as OpenAI's API does")
    async def list_models() -> schema.ModelList:
        return schema.ModelList(data=[schema.Model(id=name, created=started) for name in models])

    @router.get("/models/{model:path}", summary="Return a served model, as OpenAI's API does")
    async def show_model(model: str) -> schema.Model:
        return schema.Model(id=served(model), created=started)

    return router


def _names(models: Mapping[str, Any]) -> dict[str, str]:
    """Return the model of each accepted name: its own, and the last part of it unless two models share that."""
    last = [PurePath(name).name for name in models]
    short = {one: name for one, name in zip(last, models, strict=True) if last.count(one) == 1}
    return short | {name: name for name in models}


def _decoding(body: schema.ChatRequest, own: GenerationSettings, limits: Limits) -> GenerationSettings:
    """Return the server's generation settings with those of a request.

    Raises:
        RequestError: a setting exceeds the server's limits.
    """
    if (body.n or 1) > limits.questions:
        raise RequestError(400, f"n={body.n} is too large; use at most {limits.questions}", param="n")
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    tokens = getattr(body, field) or own.max_new_tokens
    most = max(limits.new_tokens, own.max_new_tokens)
    if tokens > most:
        raise RequestError(400, f"{field}={tokens} is too large; use at most {most}", param=field)
    temperature = own.temperature if body.temperature is None else body.temperature
    if temperature < MIN_TEMPERATURE:
        return replace(own, max_new_tokens=tokens, temperature=0.0)  # whatever the seed is, so that batches are larger
    seed = own.seed if body.seed is None else body.seed
    return replace(own, max_new_tokens=tokens, temperature=temperature, num_beams=1, seed=seed)


def _completion(answers: Sequence[Completion], about: Mapping[str, Any]) -> schema.ChatCompletion:
    choices = [
        schema.Choice(
            index=index,
            message=schema.AssistantMessage(content="".join(answer.pieces)),
            finish_reason=answer.finish_reason,
            logprobs=None if answer.logprobs is None else schema.ChoiceLogprobs(content=list(answer.logprobs)),
        )
        for index, answer in enumerate(answers)
    ]
    return schema.ChatCompletion(**about, choices=choices, usage=_usage(answers))


def _usage(answers: Sequence[Completion]) -> schema.Usage:
    written = sum(len(answer.pieces) for answer in answers)
    prompt = answers[0].prompt_tokens
    return schema.Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


def _chunks(
    answers: Sequence[Completion], about: Mapping[str, Any], usage: bool
) -> Iterator[schema.ChatCompletionChunk]:
    """Yield the events of a stream: for each answer its role, its tokens and its end; then the usage if requested."""
    about = {**about, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: schema.Delta, reason: Any = None, logprobs: Any = None) -> schema.ChatCompletionChunk:
        choice = schema.ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)
        return schema.ChatCompletionChunk(**about, choices=[choice], usage=None)

    for index, answer in enumerate(answers):
        yield chunk(index, schema.Delta(role="assistant", content=""))
        for number, piece in enumerate(answer.pieces):
            logprobs = answer.logprobs and schema.ChoiceLogprobs(content=[answer.logprobs[number]])
            yield chunk(index, schema.Delta(content=piece), logprobs=logprobs)
        yield chunk(index, schema.Delta(), answer.finish_reason)
    if usage:
        yield schema.ChatCompletionChunk(**about, choices=[], usage=_usage(answers))


async def _events(chunks: Iterator[schema.ChatCompletionChunk]) -> AsyncIterator[str]:
    for chunk in chunks:  # unset fields are left out: those of `Delta`
        yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
    yield "data: [DONE]\n\n"
