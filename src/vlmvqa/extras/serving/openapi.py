"""Data models of the API, and a documentation page that loads nothing from other hosts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Literal

import yaml
from fastapi import UploadFile
from pydantic import BaseModel, Field

ERRORS = {
    400: "the image is damaged, or the form cannot be read",
    401: "the server requires a token",
    408: "the request took too long to arrive",
    413: "too many bytes or pixels",
    415: "the image has no supported format",
    422: "a question or an option is invalid",
    503: "the queue is full, or there was no answer in time: retry after the seconds of Retry-After",
}


class AnswerForm(BaseModel):
    """The form of `POST /answer`; `Service.answer` checks the server's limits."""

    model_config = {"extra": "forbid"}
    image: UploadFile = Field(description="JPEG, PNG, WEBP, GIF or BMP")
    question: list[str] = Field(description="one per question")
    alternatives: int = Field(default=0, ge=0, description="number of alternative answers, by beam search")
    attribution: Literal["attention", "gradient"] | None = Field(
        default=None, description="method of an attribution map"
    )


class Alternative(BaseModel):
    """An alternative answer."""

    text: str
    probability: float


class QuestionAnswer(BaseModel):
    """The answer to a question."""

    question: str
    text: str
    probability: float = Field(description="of the complete answer, end of sequence included")
    truncated: bool = Field(description="the answer was truncated at max_new_tokens")
    alternatives: list[Alternative] = Field(description="other answers of the beam search, most probable first")
    attribution: str | None = Field(description="attribution map over the image: a PNG in base64")


class Answers(BaseModel):
    """Response of `POST /answer`."""

    model: str
    answers: list[QuestionAnswer]


class Health(BaseModel):
    """Response of `GET /health`."""

    status: str
    waiting: int = Field(description="number of requests in the queue")


class Error(BaseModel):
    """Response to a request that fails."""

    error: str = Field(description="one sentence: what is wrong, and what to do")


def page(schema: Mapping[str, Any]) -> str:
    """Return a page with the schema; FastAPI's own pages load scripts from other hosts."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>vlmvqa: the API</title><link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 2rem 1.25rem; }}
pre {{ overflow-x: auto; }}
</style></head><body><h1>The API</h1>
<p><code>POST /answer</code> answers questions about an image, <code>GET /health</code> returns the server's state.
<a href="./">The page to try the model</a>.</p>
<h2>OpenAPI schema (as <a href="openapi.json">JSON</a>)</h2>
<pre>{escape(yaml.safe_dump(schema, sort_keys=False))}</pre></body></html>"""
