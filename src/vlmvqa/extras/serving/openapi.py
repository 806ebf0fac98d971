"""Data models of the API."""

from __future__ import annotations

from typing import Literal

from fastapi import UploadFile
from pydantic import BaseModel, Field

from vlmvqa.extras.serving.limits import Limits

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
    """The form of `POST /answer`; `api.answer` checks the server's limits."""

    model_config = {"extra": "forbid"}
    image: UploadFile = Field(description="JPEG, PNG, WEBP, GIF or BMP")
    question: list[str] = Field(description="one per question")
    model: str | None = Field(default=None, description="name of one of the models of /info; default: the first")
    alternatives: int = Field(default=0, ge=0, description="number of alternative answers, by beam search")
    attribution: Literal["attention", "gradient"] | None = Field(default=None, description="attribution map's method")


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
    alternatives: list[Alternative] = Field(default=[], description="other answers of the beam search, by probability")
    attribution: str | None = Field(default=None, description="attribution map over the image: a PNG in base64")


class Answers(BaseModel):
    """Response of `POST /answer`."""

    model: str
    answers: list[QuestionAnswer]


class Health(BaseModel):
    """Response of `GET /health`."""

    status: str
    waiting: int = Field(description="number of requests in the queue")


class Info(BaseModel):
    """Response of `GET /info`."""

    models: list[str]
    formats: list[str] = Field(description="of images")
    limits: Limits
    examples: list[str] = Field(description="thumbnails of the images of /examples, as data URIs")
    question_types: list[str] | None = Field(description="of the browsed run; null without one")


class Error(BaseModel):
    """Response to a request that fails."""

    error: str = Field(description="one sentence: what is wrong, and what to do")
