"""Error responses: one sentence for the page and `/answer`, OpenAI's format for the routes below `/v1`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from vlmvqa.extras.serving.chat_schema import ErrorDetail, ErrorResponse
from vlmvqa.extras.serving.limits import RequestError

HANDLED = (RequestError, RequestValidationError, HTTPException, ClientDisconnect, Exception)
FORM_HINT = "send multipart/form-data with a file `image` and a field `question` for each question"


def is_openai(path: str) -> bool:
    """Return whether a path is one of OpenAI's API, with its format of errors."""
    return path.startswith("/v1/")


async def handle(request: Request, error: Exception) -> Response:
    """Return the response to an exception of a route."""
    return response(request.url.path, _request_error(request, error))


def response(path: str, error: RequestError) -> JSONResponse:
    """Return the response to an error, in the format of its path."""
    message = error.message.encode("utf-8", "replace").decode()  # a JSON string may hold half a surrogate pair
    if not is_openai(path):
        return JSONResponse({"error": message}, error.status, error.headers)
    status = 400 if error.status in (415, 422) else error.status
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = ErrorResponse(error=ErrorDetail(message=message, type=kind, param=error.param, code=error.code))
    return JSONResponse(content.model_dump(), status, error.headers)


def _request_error(request: Request, error: Exception) -> RequestError:
    path = request.url.path if len(request.url.path) <= 60 else f"{request.url.path[:60]}..."
    match error:
        case RequestError():
            return error
        case RequestValidationError():
            first = error.errors()[0]
            return _invalid_json(first) if is_openai(path) else _invalid_form(first)
        case HTTPException():
            status, message = error.status_code, error.detail
            if status == 404:
                message = f"there is no {path}; /docs lists the routes"
            elif status == 405 and error.headers:
                message = f"{request.method:.60} {path} is not allowed; use {error.headers['Allow']} (see /docs)"
            return RequestError(status, message, error.headers)
        case ClientDisconnect():
            return RequestError(499, "the client disconnected")
        case _:  # uvicorn logs the traceback
            return RequestError(500, "the server failed on this request; see its log")


def _invalid_form(error: dict[str, Any]) -> RequestError:
    hint = f"; {FORM_HINT}" if error["loc"][0] == "body" else ""
    return RequestError(422, f"{error['loc'][-1]!s:.40}: {error['msg']}{hint}")


def _invalid_json(error: dict[str, Any]) -> RequestError:
    _, *place = error["loc"]
    if error["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON ({error['ctx']['error']} at character {place[0]})")
    if not place:
        return RequestError(
            400, "the body is not a JSON object; send one with the header Content-Type: application/json"
        )
    param = _field(place)
    return RequestError(400, f"{param}: {error['msg']}", param=param)


def _field(place: Sequence[str | int]) -> str:
    """Return the name of a field, as in `messages[0].content[1].image_url.url`."""
    name = ""
    for before, part in zip([None, *place], place, strict=False):
        if isinstance(part, int):
            name += f"[{part}]"
        elif not (isinstance(before, int) and part in ("text", "image_url")):  # pydantic's choice among content parts
            name += f".{part}"
    return name.removeprefix(".")[:80]
