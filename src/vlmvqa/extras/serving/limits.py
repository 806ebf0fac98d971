"""How much a client may send, how much may wait, and how what is too much is refused."""

from __future__ import annotations

from dataclasses import dataclass, fields

from PIL import Image

from vlmvqa.errors import InputError

MILLION = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        megabytes: of a picture's file.
        megapixels: of a picture, by its header, before it is decoded.
        questions: about one picture.
        characters: of a question.
        alternatives: answers told beside the best.
        max_batch: rows that are answered at a time.
        queue: requests that wait for that, or are being read.
        waiting_megapixels: of all their pictures together, decoded: 3 MB each.
        timeout_s: seconds in which a request must have come, and then those in which it is answered.
        clients: open connections.
    """

    megabytes: float = 10
    megapixels: float = 25
    questions: int = 16
    characters: int = 500
    alternatives: int = 8
    max_batch: int = 16
    queue: int = 64
    waiting_megapixels: float = 200
    timeout_s: float = 60
    clients: int = 500

    def __post_init__(self) -> None:
        for one in fields(self):
            value = vars(self)[one.name]
            if not isinstance(value, int | float) or value <= 0:
                raise InputError(f"limits.{one.name} is {value}; use a number above 0")
        most = Image.MAX_IMAGE_PIXELS or 0
        if self.pixels > most:
            raise InputError(f"limits.megapixels is {self.megapixels}; pictures over {most / MILLION:.0f} are not read")

    @property
    def pixels(self) -> int:
        return int(self.megapixels * MILLION)

    @property
    def bytes(self) -> int:
        return int(self.megabytes * MILLION)


class Refused(Exception):
    """What a client is told in place of an answer.

    Attributes:
        status: HTTP's.
        sentence: what is wrong, and what to do.
        retry_after: seconds, where the same may be asked again.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after


def busy(why: str) -> Refused:
    """Nothing is wrong with the request: it may be made again."""
    return Refused(503, f"{why}; ask again in a moment", retry_after=1)
