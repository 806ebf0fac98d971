"""Limits on requests and the queue, and the error for a request that the server doesn't answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from PIL import Image

from vlmvqa.errors import InputError

MILLION = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Limits of a server; docs/serving.md explains them."""

    megabytes: float = 10
    megapixels: float = 25
    questions: int = 16
    characters: int = 500
    alternatives: int = 8
    new_tokens: int = 1024
    max_batch: int = 16
    queue: int = 64
    waiting_megapixels: float = 200
    timeout_s: float = 60
    clients: int = 500

    def __post_init__(self) -> None:
        for field in fields(self):
            value = vars(self)[field.name]
            if not isinstance(value, int | float) or value <= 0:
                raise InputError(f"limits.{field.name} is {value}; use a number above 0")
        pillow_limit = Image.MAX_IMAGE_PIXELS or 0
        if self.megapixels * MILLION > pillow_limit:
            raise InputError(f"limits.megapixels is {self.megapixels}; use at most {pillow_limit // MILLION}")


class RequestError(Exception):
    """An error that is returned to the client.

    Attributes:
        status: HTTP status.
        message: one sentence: what is wrong, and what to do.
        headers: HTTP headers of the response.
        param, code: the field that is wrong, and a name of the error, in OpenAI's format.
    """

    def __init__(
        self,
        status: int,
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers
        self.param, self.code = param, code


def busy(reason: str) -> RequestError:
    """Return the error for a valid request that can be retried."""
    return RequestError(503, f"{reason}; try again in a moment", {"retry-after": "1"})
