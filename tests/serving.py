"""Servers around tiny real models, and request bodies, for the serving tests."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
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
from vlmvqa.extras.serving.access import AccessMiddleware
from vlmvqa.extras.serving.api import build
from vlmvqa.extras.serving.batcher import Batcher
from vlmvqa.extras.serving.browse import Run
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.inference.predictor import Answer, Predictor
from vlmvqa.models.interface import GenerationSettings


def vlm_predictor() -> Predictor:
    """Return a tiny `VLM`."""
    return predictor()


def paligemma(folder: Path) -> Predictor:
    """Return a tiny PaliGemma, saved in `folder`."""
    model, processor = pretrained.load(pretrained.save("paligemma", folder))
    settings = PretrainedSettings(str(folder))
    return Predictor(model, processor, "answer en {question}\n", settings, GenerationSettings(max_new_tokens=4))


@contextmanager
def serving(
    model: Predictor, token: str | None = None, run: Run | None = None, examples: Sequence[bytes] = (), **limits: Any
) -> Iterator[tuple[TestClient, Batcher]]:
    """Yield a client of the API behind its access checks, as on this machine, and the queue."""
    batcher = Batcher({"model": model}, Limits(**limits))
    app = AccessMiddleware(build(batcher, run, examples), batcher.limits, token, local=token is None)
    try:
        yield TestClient(app, base_url="http://localhost", raise_server_exceptions=False), batcher
    finally:
        batcher.close()


def image_file(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return an encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def numbered_image(number: int) -> bytes:
    """Return a PNG file, different for each number."""
    return image_file(picture(number))


def png_header(width: int, height: int, pixels: bytes = b"", more: bytes = b"") -> bytes:
    """Return a PNG whose header declares this size, whatever its content."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


class HeldPredictor:
    """Make `Predictor.answer_examples` wait before it answers, and record its questions.

    Attributes:
        started: set when a batch has arrived.
        release: lets all batches continue when set.
        batches: the questions of each batch.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, poison: str = "no such question") -> None:
        self.started, self.release = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []
        real = Predictor.answer_examples

        def answer_examples(model: Predictor, examples: list[Example], **options: Any) -> dict[int | str, Answer]:
            texts = [question.text for example in examples for question in example.questions]
            self.batches.append(texts)
            self.started.set()
            assert self.release.wait(30)
            if poison in texts:
                raise RuntimeError("the secret of the server")
            return real(model, examples, **options)

        monkeypatch.setattr(Predictor, "answer_examples", answer_examples)


def ask(client: TestClient, content: bytes, *questions: str, **fields: str) -> Any:
    """Send an image and questions to `POST /answer`."""
    parts = [("question", (None, text)) for text in questions or ["what is it"]]
    parts += [(name, (None, value)) for name, value in fields.items()]
    return client.post("/answer", files=[("image", ("x.png", content)), *parts])


def error_message(response: Any, status: int) -> str:
    """Return the message of an error response with this status."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"} and "Traceback" not in response.text
    return str(response.json()["error"])
