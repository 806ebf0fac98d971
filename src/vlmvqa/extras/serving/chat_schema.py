"""Data models of the OpenAI-compatible API: a question about an image as a chat completion.

Fields of OpenAI's API that have no meaning here accept only the value that changes nothing; other values and unknown
fields are errors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

# A field that is refused if another field is set (True) or is not (False).
CONFLICTS = {
    "max_tokens": ("max_completion_tokens", True, "is set too; use one of them"),
    "top_logprobs": ("logprobs", False, "is not true; set it"),
    "stream_options": ("stream", False, "is not true; set it"),
}

# ---- request


class Strict(BaseModel):
    """A part of a request: values are not converted, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """An image."""

    url: str = Field(description="data:image/...;base64,...: the image file itself; no URL is opened")
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _one_question(parts: list[Part]) -> list[Part]:
    images = sum(isinstance(part, ImagePart) for part in parts)
    if images != 1 or len(parts) == 1:
        raise PydanticCustomError(
            "one_question",
            "there are {images} image_url and {texts} text parts; the models answer a question about one image, so "
            "send one image and the question",
            {"images": images, "texts": len(parts) - images},
        )
    return parts


def _one_turn(messages: Any) -> Any:
    if isinstance(messages, list):
        roles = [one.get("role") if isinstance(one, dict) else None for one in messages]
        if roles != ["user"]:
            raise PydanticCustomError(
                "one_turn",
                "the models answer single questions, without a system message or earlier turns; send one message with "
                "the role user, and put all text into the question",
            )
    return messages


class UserMessage(Strict):
    """The question and its image."""

    role: Literal["user"]
    content: Annotated[
        list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part]), AfterValidator(_one_question)
    ]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = Field(default=False, description="send the usage in a last chunk")


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


StopText = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    list[StopText],
    Field(max_length=4),
    BeforeValidator(_as_list, json_schema_input_type=StopText | Annotated[list[StopText], Field(max_length=4)]),
]
Label = Annotated[str | None, Field(description="has no effect")]
Empty = Annotated[list[Any] | None, Field(max_length=0)]
EmptyMap = Annotated[dict[str, Any] | None, Field(max_length=0)]


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`; `chat.py` checks the server's limits."""

    model: str = Field(description="name of one of the models of /v1/models, or the last part of it")
    messages: Annotated[list[UserMessage], BeforeValidator(_one_turn), Field(min_length=1, max_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1, description="default: the server's max_new_tokens")
    max_tokens: int | None = Field(default=None, ge=1, description="older name of max_completion_tokens")
    temperature: float | None = Field(
        default=None, ge=0, le=2, allow_inf_nan=False, description="default: the server's decoding settings"
    )
    seed: int | None = Field(default=None, description="of the sampling; equal seeds give equal answers")
    n: int | None = Field(default=1, ge=1, description="number of answers, each sampled separately")
    stop: Stop | None = Field(default=None, description="texts at which the answer is cut off")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="alternatives listed with each token")
    stream: bool | None = Field(default=False, description="send the tokens of the finished answer as events")
    stream_options: StreamOptions | None = None
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None

    # OpenAI's other fields: the values that change nothing.
    top_p: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: EmptyMap = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none", "medium"] | None = None
    verbosity: Literal["medium"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: EmptyMap = None
    tools: Empty = None
    functions: Empty = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], Literal[False]] | None = None

    @field_validator("max_tokens", "top_logprobs", "stream_options")
    @classmethod
    def _conflicts(cls, value: Any, info: ValidationInfo) -> Any:
        other, is_set, reason = CONFLICTS[str(info.field_name)]
        if value is not None and bool(info.data.get(other)) == is_set:
            raise PydanticCustomError("conflict", "{other} {reason}", {"other": other, "reason": reason})
        return value

    @property
    def question(self) -> str:
        """The text parts."""
        return "\n".join(part.text for part in self.messages[0].content if isinstance(part, TextPart))

    @property
    def image_url(self) -> str:
        """The data URL of the image."""
        return next(part.image_url.url for part in self.messages[0].content if isinstance(part, ImagePart))


# ---- response


class TopLogprob(BaseModel):
    """A token with its log-probability under the model, before the temperature is applied."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8 bytes; null for a part of a character")


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most probable tokens at its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """The tokens of an answer; the end-of-sequence token is not among them."""

    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """One of the n answers."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"] = Field(description="length: truncated at max_tokens")
    logprobs: ChoiceLogprobs | None


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int = Field(description="image tokens included")
    completion_tokens: int = Field(description="of all answers, without end-of-sequence tokens")
    total_tokens: int


class ChatCompletion(BaseModel):
    """Response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """A piece of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one of the n answers."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when the server started")
    owned_by: str = "vlmvqa"


class ModelList(BaseModel):
    """Response of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """Details of an error."""

    message: str = Field(description="one sentence: what is wrong, and what to do")
    type: str
    param: str | None = Field(description="the field")
    code: str | None


class ErrorResponse(BaseModel):
    """Response to a request that fails."""

    error: ErrorDetail
