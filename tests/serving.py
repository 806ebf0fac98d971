"""A server's parts around tiny real models, and what clients send to them."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests import pretrained
from tests.pretrained import picture
from tests.unit.test_predictor import predictor
from vlmvqa.data.example import Example
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.extras.serving.access import Guard
from vlmvqa.extras.serving.api import build
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.extras.serving.service import Service
from vlmvqa.inference.predictor import Answer, Predictor
from vlmvqa.models.generation import Decoding


def paligemma(folder: Path) -> Predictor:
    model, processor = pretrained.load(pretrained.save("paligemma", folder))
    settings = PretrainedSettings(str(folder))
    return Predictor(model, processor, "answer en {question}\n", settings, Decoding(max_new_tokens=4))


@contextmanager
def client(model: Predictor, token: str | None = None, **limits: Any) -> Iterator[tuple[TestClient, Service]]:
    """The API behind its guard, as a browser on this machine sees it."""
    service = Service({"model": model}, Limits(**limits))
    guarded = Guard(build(service), service.limits, token, local=token is None)
    try:
        yield TestClient(guarded, base_url="http://localhost", raise_server_exceptions=False), service
    finally:
        service.close()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sent(number: int) -> bytes:
    """A picture's file: another for each number."""
    return encoded(picture(number))


def png_of(width: int, height: int, pixels: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG that says it is of this size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


class Held:
    """A model that waits to be let go before it answers, and keeps what it was asked.

    Attributes:
        begun: it has a batch in hand.
        asked: the texts of each batch.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, poison: str = "no such question") -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.asked: list[list[str]] = []
        real = Predictor.answer_examples

        def answer_examples(model: Predictor, examples: list[Example], **options: Any) -> dict[int | str, Answer]:
            texts = [question.text for example in examples for question in example.questions]
            self.asked.append(texts)
            self.begun.set()
            assert self.go.wait(30)
            if poison in texts:
                raise RuntimeError("the secret of the server")
            return real(model, examples, **options)

        monkeypatch.setattr(Predictor, "answer_examples", answer_examples)


def own() -> Predictor:
    """A tiny model of ours."""
    return predictor()


def ask(asking: TestClient, content: bytes, *questions: str, **fields: str) -> Any:
    listed = [("question", (None, text)) for text in questions or ["what is it"]]
    listed += [(name, (None, value)) for name, value in fields.items()]
    return asking.post("/answer", files=[("image", ("x.png", content)), *listed])


def sentence(answer: Any, status: int) -> str:
    """The one sentence of a refusal."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"} and "Traceback" not in answer.text
    return str(answer.json()["error"])
