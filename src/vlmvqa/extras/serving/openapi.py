"""Data models of the API, and a documentation page that loads nothing from other hosts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, create_model

from vlmvqa.extras.report.attribution import METHODS
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.extras.serving.style import static_page

ERRORS = {
    400: "the image is damaged, or the form cannot be read",
    401: "the server requires a token",
    408: "the request took too long to arrive",
    413: "too many bytes or pixels",
    415: "the image has no supported format",
    422: "a question or an option is invalid",
    503: "the queue is full, or there was no answer in time: retry after the seconds of Retry-After",
}


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


def request_body(limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI description of the form of `POST /answer`, which `api.py` parses itself."""
    formats = f"JPEG, PNG, WEBP, GIF or BMP; up to {limits.megabytes:g} MB and {limits.megapixels:g} megapixels"
    question = Annotated[str, Field(max_length=limits.characters)]
    fields: dict[str, Any] = {
        "image": (bytes, Field(description=formats)),
        "question": (list[question], Field(min_length=1, max_length=limits.questions, description="one per question")),
        "alternatives": (
            int,
            Field(default=0, ge=0, le=limits.alternatives, description="number of alternative answers, by beam search"),
        ),
        "attribution": (
            Literal[METHODS],
            Field(default=None, description="method of an attribution map"),
        ),
    }
    form = create_model("AnswerForm", **fields)
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form.model_json_schema()}}}}


def page(schema: Mapping[str, Any]) -> str:
    """Return a page with the schema and a form to try the API.

    FastAPI's own pages load scripts from other hosts.
    """
    body = f"""<h1>The API</h1>
<p><code>POST /answer</code> answers questions about an image, <code>GET /health</code> returns the server's state.
<a href="./">The page to try the model</a>.</p>
<form action="answer" method="post" enctype="multipart/form-data">
<label>Image <input type="file" name="image" accept="image/*" required></label>
<label>Question <input type="text" name="question" value="What is this?" required></label>
<button>Try it</button></form>
<h2>OpenAPI schema (as <a href="openapi.json">JSON</a>)</h2>
<pre>{escape(yaml.safe_dump(schema, sort_keys=False))}</pre>"""
    return static_page("vlmvqa: the API", body)
