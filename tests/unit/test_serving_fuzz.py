"""Fuzzing: every request gets an answer or an error message, never a 5xx; no file is opened and no program started."""

from __future__ import annotations

import base64
import json
import mimetypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from starlette.testclient import TestClient

from bench.clock import PeakMemory
from tests.conftest import ROOT
from tests.pretrained import picture
from tests.serving import image_file, serving, vlm_predictor

# Python's own files: modules may be imported at first use.
OWN_PATHS = (sys.prefix, sys.base_prefix, sys.pycache_prefix or sys.prefix, str(ROOT / "src"), "/proc/self")
MAX_BYTES = 200e6
IMAGES = [image_file(picture(n), kind) for n, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))]
_opened: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: record opened files, started programs and connections."""
    if not _watching:
        return
    if event == "open" and not isinstance(arguments[0], int):
        path, mode = str(arguments[0]), arguments[1]
        if (mode is not None and set(mode) & set("wax+")) or not path.startswith(OWN_PATHS):
            _opened.append(f"{path} ({mode})")
    elif event in ("subprocess.Popen", "os.system", "os.posix_spawn", "socket.connect", "os.remove", "os.rename"):
        _opened.append(f"{event} {arguments}")


mimetypes.init()  # reads files at first use
sys.addaudithook(_watch)


@contextmanager
def nothing_opened() -> Iterator[None]:
    global _watching
    _opened.clear()
    _watching = True
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "dont_write_bytecode", True)  # of modules imported at first use
            yield
    finally:
        _watching = False
    assert not _opened


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with serving(vlm_predictor(), megabytes=0.2, megapixels=1, questions=4, characters=60) as (found, _):
        with PeakMemory(torch.device("cpu")) as memory:
            yield found
        assert memory.bytes is None or memory.bytes < MAX_BYTES


def check(answer: Any) -> None:
    """Check for an answer, or an error of one sentence."""
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        assert answer.json()["answers"]
    else:
        check_error(answer.json()["error"])


def check_error(message: Any) -> None:
    assert isinstance(message, str) and message and "Traceback" not in message and len(message) < 400


def form(parts: list[tuple[bytes, bytes]], boundary: bytes = b"x") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + body + b"\r\n" for head, body in parts) + (
        b"--" + boundary + b"--\r\n"
    )


@some.composite
def damaged(draw: some.DrawFn) -> bytes:
    """Generate an image file with bytes replaced, removed or repeated."""
    content = bytearray(draw(some.sampled_from(IMAGES)))
    for _ in range(draw(some.integers(0, 6))):
        place = draw(some.integers(0, max(len(content) - 1, 0)))
        length = draw(some.integers(0, 40))
        content[place : place + length] = draw(some.one_of(some.binary(max_size=40), some.just(content[:length])))
    return bytes(content)


PATHS = ["/etc/passwd", "../../etc/passwd", "a.png\x00.exe", "C:\\a", "file:///etc/passwd", "http://x.example/a.png"]
NAMES = some.one_of(some.sampled_from(PATHS), some.text(max_size=300))
CONTENTS = some.one_of(damaged(), some.binary(max_size=2000), some.sampled_from(IMAGES))


def header(name: bytes, file: bytes | None = None, more: bytes = b"") -> bytes:
    named = b"" if file is None else b'; filename="' + file + b'"'
    return b'Content-Disposition: form-data; name="' + name + b'"' + named + more


@settings(max_examples=80, deadline=None)
@given(content=CONTENTS, name=NAMES, questions=some.lists(some.text(max_size=80), max_size=6))
def test_uploads(client: TestClient, content: bytes, name: str, questions: list[str]) -> None:
    named = name.encode("utf-8", "surrogatepass").replace(b"\r", b"").replace(b"\n", b"")
    fields = [(header(b"question"), one.encode("utf-8", "surrogatepass")) for one in questions]
    body = form([(header(b"image", named), content), *fields])
    with nothing_opened():
        check(client.post("/answer", content=body, headers={"content-type": "multipart/form-data; boundary=x"}))


FIELDS = [b"image", b"question", b"alternatives", b"attribution", b"", b"path", b"\xff", b'a"; filename="b']


@settings(max_examples=80, deadline=None)
@given(
    parts=some.lists(
        some.tuples(
            some.sampled_from(FIELDS),
            some.one_of(some.none(), some.binary(max_size=30)),
            some.one_of(CONTENTS, some.sampled_from([b"what is it", b"2", b"attention", b"-1", b"\xed\xa0\x80"])),
        ),
        max_size=8,
    ),
    boundary=some.sampled_from([b"x", b"-", b"a" * 300]),
    kind=some.sampled_from(["multipart/form-data; boundary=", "text/plain; boundary="]),
    charset=some.sampled_from(["", "utf-7", "raw_unicode_escape", "nonsense", "utf-16"]).map("; charset={}".format),
    cut=some.integers(0, 60),
)
def test_forms(client: TestClient, parts: list[Any], boundary: bytes, kind: str, charset: str, cut: int) -> None:
    body = form([(header(name, file), content) for name, file, content in parts], boundary)
    body = body[: len(body) - cut] if cut > 30 else body
    with nothing_opened():
        check(client.post("/answer", content=body, headers={"content-type": kind + boundary.decode() + charset}))


@settings(max_examples=80, deadline=None)
@given(
    method=some.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=some.one_of(
        some.sampled_from(["answer", "info", "browse", "examples/0", "page.js", "docs", "health", ""]),
        some.text(some.characters(codec="ascii", exclude_characters="?#"), max_size=60),
        some.sampled_from(PATHS).map(lambda path: f"examples/{path}"),
    ),
    body=some.binary(max_size=300),
    headers=some.dictionaries(
        some.sampled_from(["content-type", "authorization", "cookie", "accept", "range", "content-length", "expect"]),
        some.text(some.characters(min_codepoint=32, max_codepoint=255), max_size=60),
    ),
)
def test_requests(client: TestClient, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    url = "/" + "".join(f"%{ord(one):02x}" for one in path)
    with nothing_opened():
        answer = client.request(method, url, content=body, headers=encoded)
    assert answer.status_code < 500


URL = f"data:image/png;base64,{base64.b64encode(IMAGES[1]).decode()}"
CHAT_FIELDS = ["model", "messages", "max_tokens", "temperature", "n", "seed", "stop", "logprobs", "top_logprobs"]
CHAT_FIELDS += ["stream", "stream_options", "user", "top_p", "logit_bias", "tools", "path"]
TEXTS = some.one_of(
    some.sampled_from([URL, "data:image/png;base64,", "user", "text", "image_url", "\ud800", *PATHS]),
    some.text(max_size=90),
)
NUMBERS = some.one_of(some.integers(-1, 9), some.integers(), some.floats(), some.booleans(), some.none())
VALUES = some.recursive(
    some.one_of(TEXTS, NUMBERS),
    lambda inner: some.one_of(
        some.lists(inner, max_size=4),
        some.dictionaries(some.one_of(some.sampled_from(["role", "content", "type", "text", "url"]), TEXTS), inner),
    ),
    max_leaves=12,
)
PART = some.fixed_dictionaries(
    {"type": some.sampled_from(["text", "image_url", "x"])},
    optional={"text": TEXTS, "image_url": some.one_of(some.fixed_dictionaries({"url": TEXTS}), VALUES), "x": VALUES},
)
TURN = some.fixed_dictionaries(
    {"role": some.sampled_from(["user", "system", 1])}, optional={"content": some.lists(PART)}
)
ASKED = [
    {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": URL}}]}
]


@settings(max_examples=150, deadline=None)
@given(
    fields=some.dictionaries(some.sampled_from(CHAT_FIELDS), VALUES, max_size=3),
    messages=some.one_of(some.just(ASKED), some.lists(TURN, max_size=2), VALUES),
    damage=some.one_of(some.none(), some.tuples(some.integers(0, 200), some.binary(max_size=9))),
)
def test_chat_bodies(client: TestClient, fields: dict[str, Any], messages: Any, damage: Any) -> None:
    body = json.dumps({"model": "model", "messages": messages, "max_tokens": 2, **fields}).encode()
    if damage:
        body = body[: damage[0]] + damage[1] + body[damage[0] + len(damage[1]) :]
    with nothing_opened():
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        check_error(answer.json()["error"]["message"])
