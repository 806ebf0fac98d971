"""The HTTP API on tiny real models: answers, batching, and error messages."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from bench.clock import PeakMemory
from tests.pretrained import picture
from tests.serving import (
    HeldPredictor,
    ask,
    chunk,
    error_message,
    image_file,
    numbered_image,
    paligemma,
    png_header,
    serving,
    vlm_predictor,
)
from vlmvqa.extras.serving.batcher import Batcher, PendingRequest
from vlmvqa.extras.serving.limits import Limits, RequestError
from vlmvqa.inference.predictor import Predictor

QUESTIONS = ["what color is it", "what is the big dog left of", "is it"]
PLAIN = [("question", (None, "what is it"))]


@pytest.fixture(scope="module", params=["vlm", "paligemma"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return vlm_predictor() if request.param == "vlm" else paligemma(tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="module")
def vlm() -> Predictor:
    return vlm_predictor()


@pytest.fixture(scope="module")
def client(vlm: Predictor) -> Iterator[TestClient]:
    with serving(vlm, megabytes=0.3, megapixels=1, questions=5) as (found, _):
        yield found


# --- answers -------------------------------------------------------------------------------------------------------


def test_answers_equal_the_predictors(model: Predictor) -> None:
    image = picture(3)
    with serving(model) as (client, _):
        found = ask(client, image_file(image), *QUESTIONS, alternatives="3", attribution="attention")
    assert found.status_code == 200
    alone = model.answer(image, QUESTIONS)
    searched = model.beam_candidates(image, QUESTIONS, 4)
    for row, text, answer, others in zip(found.json()["answers"], QUESTIONS, alone, searched, strict=True):
        assert (row["question"], row["text"], row["truncated"]) == (text, answer.text, answer.cut)
        assert 0 <= row["probability"] <= 1
        listed = [one["text"] for one in row["alternatives"]]
        assert listed == [other.text for other in others if other.text != answer.text][:3] and listed
        shown = [one["probability"] for one in row["alternatives"]]
        assert shown == sorted(shown, reverse=True)
        with Image.open(io.BytesIO(base64.b64decode(row["attribution"]))) as drawn:
            assert drawn.format == "PNG" and max(drawn.size) == 512
            assert drawn.width / drawn.height == pytest.approx(image.width / image.height, rel=0.02)


def test_alternatives_and_attribution_are_optional(client: TestClient) -> None:
    (row,) = ask(client, numbered_image(0)).json()["answers"]
    assert row["alternatives"] == [] and row["attribution"] is None
    (other,) = ask(client, numbered_image(0), attribution="gradient").json()["answers"]
    assert other["text"] == row["text"] and other["attribution"]


def test_concurrent_requests_are_batched_and_answered_separately(
    model: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty concurrent clients, each with its own image and questions."""
    numbers = range(40)
    asked = {n: [f"what color is dog {n}", "what is it"][: 1 + n % 2] for n in numbers}
    held = HeldPredictor(monkeypatch)
    held.release.set()
    with serving(model) as (client, _), ThreadPoolExecutor(20) as clients:
        found = list(clients.map(lambda n: ask(client, numbered_image(n), *asked[n]).json()["answers"], numbers))
    for n in numbers:
        assert [one["text"] for one in found[n]] == [one.text for one in model.answer(picture(n), asked[n])]
    sizes = [len(questions) for questions in held.batches]
    assert 1 < max(sizes) <= (32 if model.model.shares_images else 16)
    assert len({one["text"] for each in found for one in each}) > 4  # so that a mix-up would be seen


def test_duplicate_questions_in_a_batch_are_computed_once(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    with serving(vlm) as (_, batcher):
        first = batcher.submit(PendingRequest("model", picture(9), ["first"]))
        assert held.started.wait(30)
        same = [batcher.submit(PendingRequest("model", picture(1), ["what is it", "what"])) for _ in range(3)]
        other = batcher.submit(PendingRequest("model", picture(2), ["what is it"]))
        held.release.set()
        texts = [[one.text for one in future.result(30)] for future in (*same, other, first)]
    assert held.batches == [["first"], ["what is it", "what", "what is it"]]
    assert texts[0] == texts[1] == texts[2] == [one.text for one in vlm.answer(picture(1), ["what is it", "what"])]
    assert texts[3] == [vlm.answer(picture(2), "what is it").text]


def test_batches_hold_requests_of_one_model(vlm: Predictor, tmp_path: Path) -> None:
    models = {"vlm": vlm, "paligemma": paligemma(tmp_path)}
    batcher = Batcher(models, Limits())
    requests = [(name, picture(n), f"what is {n}") for n in range(6) for name in models]
    try:
        futures = [batcher.submit(PendingRequest(name, image, [question])) for name, image, question in requests]
        found = [future.result(60)[0].text for future in futures]
    finally:
        batcher.close()
    assert found == [models[name].answer(image, question).text for name, image, question in requests]


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_failing_request_does_not_fail_its_batch(
    vlm: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = HeldPredictor(monkeypatch, poison="poison")
    texts = ["what", "poison", "is it"]
    with serving(vlm) as (client, batcher), ThreadPoolExecutor(4) as clients:
        first = clients.submit(ask, client, numbered_image(9), "first")
        assert held.started.wait(30)
        later = [clients.submit(ask, client, numbered_image(n), text) for n, text in enumerate(texts)]
        wait_until(lambda: batcher.num_waiting == 3)
        held.release.set()
        good, bad, good_too = (future.result(60) for future in later)
        assert first.result(60).status_code == 200
    assert sorted(held.batches[1]) == sorted(texts)  # they were one batch
    assert error_message(bad, 500) == "the model failed on this request; see the server's log"
    assert [one.json()["answers"][0]["text"] for one in (good, good_too)] == [
        vlm.answer(picture(0), "what").text,
        vlm.answer(picture(2), "is it").text,
    ]
    assert "the secret of the server" in caplog.text and "secret" not in bad.text


def test_a_full_queue_returns_503_with_retry_after(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    with serving(vlm, queue=2, max_batch=1) as (client, batcher), ThreadPoolExecutor(3) as clients:
        first = clients.submit(ask, client, numbered_image(0))
        assert held.started.wait(30)
        waiting = [clients.submit(ask, client, numbered_image(n)) for n in (1, 2)]
        wait_until(lambda: batcher.num_waiting == 2)
        refused = ask(client, numbered_image(3))
        assert "try again in a moment" in error_message(refused, 503) and refused.headers["retry-after"] == "1"
        assert client.get("/health").json() == {"status": "ready", "waiting": 2}
        with pytest.raises(RequestError, match=r"the queue is full \(2 requests\)"):
            batcher.submit(PendingRequest("model", picture(3), ["what"]))
        held.release.set()
        assert [one.result(60).status_code for one in (first, *waiting)] == [200] * 3


def test_the_queue_is_limited_by_megapixels(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    large = Image.new("RGB", (1000, 700))
    with serving(vlm, waiting_megapixels=1) as (_, batcher):
        batcher.submit(PendingRequest("model", picture(0), ["what"]))
        assert held.started.wait(30)
        batcher.submit(PendingRequest("model", large, ["what"]))
        with pytest.raises(RequestError, match=r"the queue is full \(1 requests\)"):
            batcher.submit(PendingRequest("model", large, ["is it"]))
        held.release.set()


def test_an_expired_request_returns_503_and_is_not_computed(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    with serving(vlm, timeout_s=0.2) as (client, batcher):
        first = batcher.submit(PendingRequest("model", picture(9), ["first"]))
        assert held.started.wait(30)
        assert "no answer within 0.2 seconds" in error_message(ask(client, numbered_image(0), "late"), 503)
        held.release.set()
        first.result(30)
        batcher.submit(PendingRequest("model", picture(9), ["last"])).result(30)
    assert held.batches == [["first"], ["last"]]


def test_a_disconnected_client_is_not_computed(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    form = form_body(numbered_image(0), "gone")
    with serving(vlm) as (client, batcher):
        first = batcher.submit(PendingRequest("model", picture(9), ["first"]))
        assert held.started.wait(30)
        left = threading.Event()

        async def receive() -> dict[str, Any]:
            if not left.is_set():
                left.set()
                return {"type": "http.request", "body": form[1], "more_body": False}
            while batcher.num_waiting == 0:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        status, _ = post(client.app, "/answer", receive, form[0])
        assert status == 499
        held.release.set()
        first.result(30)
        batcher.submit(PendingRequest("model", picture(9), ["last"])).result(30)
    assert held.batches == [["first"], ["last"]]


def test_a_request_that_uvicorn_cancels_at_shutdown_gets_503(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    headers, form = form_body(numbered_image(0), "late")
    with serving(vlm) as (client, batcher):
        batcher.submit(PendingRequest("model", picture(9), ["first"]))
        assert held.started.wait(30)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            task = asyncio.ensure_future(client.app(scope, receive, send))
            while batcher.num_waiting == 0:
                await asyncio.sleep(0)
            task.cancel()
            await task

        messages = iter([{"type": "http.request", "body": form, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(messages, None) or await asyncio.Event().wait()

        status, body = post(app, "/answer", receive, headers)
        held.release.set()
    assert status == 503 and b"the server is shutting down" in body


def test_queued_requests_fail_at_shutdown(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    with serving(vlm) as (_, batcher):
        first = batcher.submit(PendingRequest("model", picture(0), ["first"]))
        assert held.started.wait(30)
        second = batcher.submit(PendingRequest("model", picture(1), ["second"]))
        batcher.close(timeout_s=0)
        with pytest.raises(RequestError, match="the server is shutting down"):
            second.result(30)
        with pytest.raises(RequestError, match="the server is shutting down"):
            batcher.submit(PendingRequest("model", picture(1), ["third"]))
        held.release.set()
        assert first.result(30)


def wait_until(condition: Any) -> None:
    """Wait for other threads; pytest's timeout ends a test that waits forever."""
    changed = threading.Event()
    while not condition():
        changed.wait(0.001)


def form_body(content: bytes, question: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of a form."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\n' + question.encode(),
        b'\r\n--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + content,
    ]
    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"host", b"localhost")]
    return headers, b"".join(parts) + b"\r\n--x--\r\n"


def post(app: Any, path: str, receive: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Send a POST whose body comes from `receive`; return status and body."""
    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "scheme": "http", "server": ("localhost", 80), "http_version": "1.1", "root_path": ""}
    asyncio.run(app({**scope, "asgi": {"version": "3.0"}, "client": ("127.0.0.1", 1)}, receive, send))
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])


# --- invalid images, questions, options and forms ------------------------------------------------------------------

BAD_IMAGES = {
    "nothing": (b"", 400, "empty"),
    "words": (b"this is not a picture", 415, "not an image in a supported format"),
    "HTML": (b"<!doctype html><script>alert(1)</script>", 415, "not an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 415, "not an image"),
    "a zip": (b"PK\x03\x04" + bytes(100), 415, "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n", 415, "not an image"),
    "TIFF": (image_file(picture(0), "TIFF"), 415, "not an image"),
    "half a JPEG": (image_file(picture(0), "JPEG")[:400], 400, "damaged"),
    "half a PNG": (numbered_image(0)[:600], 400, "cannot be read"),
    "a PNG of 30,000 x 30,000": (png_header(30_000, 30_000), 413, "over 1 megapixels"),
    "a PNG that grows a thousandfold": (image_file(Image.new("RGB", (4000, 4000))), 413, "4,000 x 4,000 pixels"),
    "a PNG whose text grows": (
        lambda: png_header(8, 8, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))),
        400,
        "damaged",
    ),
    "a GIF of 60,000 x 60,000": (b"GIF89a" + b"\x60\xea\x60\xea\0\0\0" + b"\x2c" + bytes(20), 413, "megapixels"),
    "a BMP of 30,000 x 30,000": (
        b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
        + (30_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24),
        413,
        "over 1 megapixels",
    ),
    "a WEBP of 16,000 x 16,000": (
        b"RIFF" + (80).to_bytes(4, "little") + b"WEBPVP8X" + (10).to_bytes(4, "little") + b"\2\0\0\0"
        + (15_999).to_bytes(3, "little") * 2 + b"ANIM" + (6).to_bytes(4, "little") + bytes(6)
        + b"ANMF" + (40).to_bytes(4, "little") + bytes(40),
        None,
        "",
    ),
    # One escape that skips 255 rows, which Pillow would fill.
    "a run-length coded BMP": (
        b"BM" + (1082).to_bytes(4, "little") + bytes(4) + (1078).to_bytes(4, "little") + (40).to_bytes(4, "little")
        + (1_000_000).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"\1\0\x08\0\1" + bytes(23)
        + bytes(1024) + b"\0\2\0\xff",
        415,
        "run-length encoded BMP",
    ),
    "a JPEG of ten thousand scans": (b"\xff\xd8" + b"\xff\xda\0\2" * 10_000, 400, "scans"),
    "too many bytes": (bytes(310_000), 413, "over 0.3 MB"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(client: TestClient, name: str) -> None:
    content, status, words = BAD_IMAGES[name]
    content = content() if callable(content) else content  # compressed by its test, not by each worker
    with PeakMemory(torch.device("cpu")) as memory:
        answer = ask(client, content)
    assert words in error_message(answer, status or answer.status_code) and 400 <= answer.status_code < 500
    assert memory.bytes is None or memory.bytes < 150e6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_supported_formats(client: TestClient, vlm: Predictor, kind: str, tmp_path: Path) -> None:
    content = image_file(picture(4), kind)
    (tmp_path / "x").write_bytes(content)
    assert ask(client, content).json()["answers"][0]["text"] == vlm.answer(tmp_path / "x", "what is it").text


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([" \n "], "question 1 is empty"),
        (["what", "x" * 501], "question 2 has 501 characters; use at most 500"),
        (["what"] * 6, "there are 6 questions; send at most 5 per image"),
        (["what\x00is it"], "question 1 contains control characters"),
        (["a <eos> b"], "question 1 contains <eos>, a special token of the model"),
    ],
)
def test_bad_questions(client: TestClient, questions: list[str], words: str) -> None:
    assert words in error_message(ask(client, numbered_image(0), *questions), 422)


def test_a_question_cannot_insert_another_image(tmp_path: Path) -> None:
    with serving(paligemma(tmp_path)) as (client, _):
        assert "contains <image>" in error_message(ask(client, numbered_image(0), "what is <image>"), 422)


def test_white_space_is_collapsed(client: TestClient, vlm: Predictor) -> None:
    (row,) = ask(client, numbered_image(0), " what\tis \n it ").json()["answers"]
    assert row["question"] == "what is it" and row["text"] == vlm.answer(picture(0), "what is it").text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alternatives": "9"}, "alternatives=9 is out of range; use 0 to 8"),
        ({"alternatives": "-1"}, "alternatives: Input should be greater than or equal to 0"),
        ({"alternatives": "1e3"}, "alternatives: Input should be a valid integer"),
        ({"attribution": "sideways"}, "attribution: Input should be 'attention' or 'gradient'"),
        ({"model": "other"}, "model=other is not served; use model"),
        ({"path": "/etc/passwd"}, "path: Extra inputs are not permitted"),
    ],
)
def test_bad_options(client: TestClient, fields: dict[str, str], words: str) -> None:
    assert words in error_message(ask(client, numbered_image(0), **fields), 422)


def test_bad_forms(client: TestClient) -> None:
    two = [("image", ("a", numbered_image(0))), ("image", ("b", numbered_image(1))), *PLAIN]
    multipart = {"content-type": "multipart/form-data"}
    assert "must be one `image`" in error_message(client.post("/answer", files=two), 422)
    assert "image: Field required" in error_message(client.post("/answer", files=PLAIN), 422)
    path = [("image", (None, "/etc/passwd")), *PLAIN]
    assert "Expected UploadFile" in error_message(client.post("/answer", files=path), 422)
    assert "question: Field required" in error_message(client.post("/answer", files=two[:1]), 422)
    assert "multipart" in error_message(client.post("/answer", json={"image": "/etc/passwd"}), 422)
    assert "boundary" in error_message(client.post("/answer", content=b"x", headers=multipart), 400)
    multipart["content-type"] += "; boundary=x"
    assert "Invalid multipart" in error_message(client.post("/answer", content=b"--y\r\n\r\n", headers=multipart), 400)
    many = client.post("/answer", files=[("image", ("a", numbered_image(0))), *PLAIN * 3000])
    assert error_message(many, many.status_code) and many.status_code in (400, 413)
    assert "use POST" in error_message(client.get("/answer"), 405)
    assert "/docs lists" in error_message(client.get("/nothing"), 404)


def test_body_size_limit(client: TestClient) -> None:
    """The limit holds whatever the headers declare, and for an endless body."""
    taken = 0
    headers, form = form_body(b"", "what")

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 50_000
        beginning = form.removesuffix(b"\r\n--x--\r\n") if taken == 50_000 else b""
        return {"type": "http.request", "body": beginning.ljust(50_000, b"a"), "more_body": True}

    status, body = post(client.app, "/answer", receive, [*headers, (b"content-length", b"10")])
    assert status == 413 and b"MB; send less" in body
    assert taken <= 500_000


def test_body_time_limit(vlm: Predictor) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    with serving(vlm, timeout_s=0.1) as (client, _):
        status, body = post(client.app, "/answer", receive, form_body(b"", "")[0])
        assert status == 408 and b"did not arrive within 0.1 seconds" in body
        assert client.app._num_uploads == 0  # type: ignore[attr-defined]
