"""lmms-eval's requests as examples; imports nothing of lmms-eval."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from PIL.Image import Image

from vlmvqa.data import images
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.models.interface import GenerationSettings

# Generation arguments that this project's decoding has no equivalent of, with the values that change nothing.
UNSUPPORTED = {"top_p": (None, 0, 1), "top_k": (None, 0), "repetition_penalty": (None, 1), "num_return_sequences": (1,)}
SAMPLING = ("top_p", "top_k")  # without effect on greedy decoding and beam search


@dataclass(frozen=True)
class Request:
    """A request without its image.

    Attributes:
        task, split, document: the document; every rank has all documents, so any rank can load the image.
        number: distinguishes the requests about one document.
        image: digest of the image's pixels.
        question: the context that lmms-eval passes; the model's prompt template is applied to it.
        target: the continuation to score; None to generate.
        arguments: the generation arguments as JSON.
    """

    task: str
    split: str
    document: int
    number: int
    image: str
    question: str
    target: str | None = None
    arguments: str = "null"

    @property
    def id(self) -> str:
        """The question's id, which seeds its sampling: the same with any number of ranks."""
        return f"{self.task}/{self.split}/{self.document}/{self.number}"


@dataclass(frozen=True)
class DocumentImage:
    """The image of a document, loaded from lmms-eval's dataset when its batch is built.

    Attributes:
        load: returns the image.
    """

    load: Callable[[], Image]

    def read_bytes(self) -> bytes:
        """Return the image, upright and RGB, as an uncompressed file."""
        file = io.BytesIO()
        images.decode(self.load(), "the image").save(file, "ppm")
        return file.getvalue()


def digest(image: Image) -> str:
    """Return a digest of an image's pixels."""
    return blake2b(f"{image.mode} {image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


def one_image(visuals: Sequence[Any] | None, where: str) -> Image:
    """Return the only visual of a document.

    Raises:
        InputError: there is none, there are several, or it is a video or a sound.
    """
    found = list(visuals or ())
    if len(found) != 1 or not isinstance(found[0], Image):
        listed = ", ".join(type(one).__name__ for one in found) or "nothing"
        raise InputError(f"{where} shows {listed}; this model answers questions about one image, choose another task")
    return found[0]


def examples(
    requests: Iterable[Request], prompt: str, load: Callable[[Request], Image], grouped: bool = True
) -> list[Example]:
    """Group requests by image: one example, and so one row of the model, holds all questions about it.

    The order is that of the documents, so batches do not depend on the number of ranks.

    Args:
        prompt: the model's template, which contains `{question}`.
        load: returns the image of a request.
        grouped: False makes one example of each request.
    """
    rows: dict[str, list[Request]] = {}
    for one in sorted(requests, key=lambda one: (one.task, one.split, one.document, one.number)):
        rows.setdefault(one.image if grouped else one.id, []).append(one)
    return [_example(row, prompt, load) for row in rows.values()]


def _example(row: Sequence[Request], prompt: str, load: Callable[[Request], Image]) -> Example:
    first = row[0]
    questions = tuple(
        Question(one.id, one.question, prompt.replace("{question}", one.question), one.target) for one in row
    )
    return Example(DocumentImage(lambda: load(first)), f"{first.task}/{first.split}/{first.document}", questions)


def decoding(own: GenerationSettings, given: Mapping[str, Any]) -> GenerationSettings:
    """Return the model's settings, changed by a task's generation arguments.

    Raises:
        InputError: an argument asks for a kind of decoding that this project does not have.
    """
    temperature = given.get("temperature", own.temperature)
    if given.get("do_sample") is False:
        temperature = 0.0
    elif given.get("do_sample"):
        temperature = given.get("temperature", 1.0)
    for name, neutral in UNSUPPORTED.items():
        if name in given and given[name] not in neutral and (temperature or name not in SAMPLING):
            raise InputError(f"generation argument {name}={given[name]} is not supported; leave it out (--gen_kwargs)")
    beams = int(given.get("num_beams") or own.num_beams)
    return replace(
        own,
        max_new_tokens=int(given.get("max_new_tokens") or own.max_new_tokens),
        num_beams=beams,
        temperature=float(temperature or 0.0),
        length_penalty=float(given.get("length_penalty", own.length_penalty)),
        static_cache=own.static_cache and beams == 1,
    )


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Return the text up to the first stop sequence."""
    stops = [until] if isinstance(until, str) else list(until or ())
    ends = [end for stop in stops if stop and (end := text.find(stop)) >= 0]
    return text[: min(ends)].rstrip() if ends else text
