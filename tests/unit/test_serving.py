"""The HTTP API on tiny real models: right answers, whose they are, and one sentence for everything else."""

from __future__ import annotations

import asyncio
import base64
import io
import re
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
from tests.serving import Held, ask, chunk, client, encoded, own, paligemma, png_of, sent, sentence
from vlmvqa.extras.serving import html
from vlmvqa.extras.serving.batcher import Asked
from vlmvqa.extras.serving.limits import Limits, Refused
from vlmvqa.extras.serving.service import Service, Told
from vlmvqa.inference.predictor import Predictor

QUESTIONS = ["what color is it", "what is the big dog left of", "is it"]
PLAIN = [("question", (None, "what is it"))]


@pytest.fixture(scope="module", params=["ours", "paligemma"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return own() if request.param == "ours" else paligemma(tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="module")
def ours() -> Predictor:
    return own()


@pytest.fixture(scope="module")
def asking(ours: Predictor) -> Iterator[TestClient]:
    with client(ours, megabytes=0.3, megapixels=1, questions=5) as (found, _):
        yield found


# --- answers -------------------------------------------------------------------------------------------------------


def test_the_answers_are_the_models_own(model: Predictor) -> None:
    image = picture(3)
    with client(model) as (asking, _):
        found = ask(asking, encoded(image), *QUESTIONS, alternatives="3", look="attention")
    assert found.status_code == 200
    alone = model.answer(image, QUESTIONS)
    searched = model.alternatives(image, QUESTIONS, 4)
    for told, text, answer, others in zip(found.json()["answers"], QUESTIONS, alone, searched, strict=True):
        assert (told["question"], told["text"], told["cut"]) == (text, answer.text, answer.cut)
        assert 0 <= told["probability"] <= 1
        listed = [one["text"] for one in told["alternatives"]]
        assert listed == [other.text for other in others if other.text != answer.text][:3] and listed
        shown = [one["probability"] for one in told["alternatives"]]
        assert shown == sorted(shown, reverse=True)
        with Image.open(io.BytesIO(base64.b64decode(told["look"]))) as drawn:
            assert drawn.format == "PNG" and max(drawn.size) == 512
            assert drawn.width / drawn.height == pytest.approx(image.width / image.height, rel=0.02)


def test_the_page_sorts_bars_by_the_probability_it_shows() -> None:
    """The greedy answer is marked, wherever it is."""
    told = Told("what is it", "dog", 0.2, alternatives=[("cat", 0.5), ("cow", 0.1)])
    bars = re.findall(r'"vq-bar( vq-best)?"><span>(\w+)', html.answers([told]))
    assert bars == [("", "cat"), (" vq-best", "dog"), ("", "cow")]


def test_nothing_is_computed_that_was_not_asked_for(asking: TestClient) -> None:
    (told,) = ask(asking, sent(0)).json()["answers"]
    assert told["alternatives"] == [] and told["look"] is None
    (other,) = ask(asking, sent(0), look="gradient").json()["answers"]
    assert other["text"] == told["text"] and other["look"]


def test_who_asks_together_is_answered_together_and_apart(model: Predictor) -> None:
    """Forty clients at once, each with a picture and questions of its own."""
    numbers = range(40)
    asked = {n: [f"what color is dog {n}", "what is it"][: 1 + n % 2] for n in numbers}
    with client(model) as (asking, service), ThreadPoolExecutor(20) as clients:
        found = list(clients.map(lambda n: ask(asking, sent(n), *asked[n]).json()["answers"], numbers))
        batches = list(service.batcher.batches)
    for n in numbers:
        assert [one["text"] for one in found[n]] == [one.text for one in model.answer(picture(n), asked[n])]
    assert max(batches) > 1 and max(batches) <= 16
    assert len({one["text"] for each in found for one in each}) > 4  # so that a mix-up would be seen


def test_what_is_asked_twice_at_once_is_computed_once(ours: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with client(ours) as (_, service):
        first = service.batcher.submit(Asked("model", picture(9), ["first"]))
        assert held.begun.wait(30)
        same = [service.batcher.submit(Asked("model", picture(1), ["what is it", "what"])) for _ in range(3)]
        other = service.batcher.submit(Asked("model", picture(2), ["what is it"]))
        held.go.set()
        texts = [[one.answer.text for one in future.result(30)] for future in (*same, other, first)]
    assert held.asked == [["first"], ["what is it", "what", "what is it"]]
    assert texts[0] == texts[1] == texts[2] == [one.text for one in ours.answer(picture(1), ["what is it", "what"])]
    assert texts[3] == [ours.answer(picture(2), "what is it").text]


def test_two_models_are_not_taken_for_each_other(ours: Predictor, tmp_path: Path) -> None:
    models = {"ours": ours, "paligemma": paligemma(tmp_path)}
    service = Service(models, Limits())
    asked = [Asked(name, picture(n), [f"what is {n}"]) for n in range(6) for name in models]
    try:
        found = [future.result(60)[0].answer.text for future in [service.batcher.submit(one) for one in asked]]
    finally:
        service.close()
    assert found == [models[one.model].answer(one.picture, one.questions[0]).text for one in asked]


# --- trouble -------------------------------------------------------------------------------------------------------


def test_what_makes_the_model_fail_fails_alone(
    ours: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = Held(monkeypatch, poison="poison")
    texts = ["what", "poison", "is it"]
    with client(ours) as (asking, service), ThreadPoolExecutor(4) as clients:
        first = clients.submit(ask, asking, sent(9), "first")
        assert held.begun.wait(30)
        later = [clients.submit(ask, asking, sent(n), text) for n, text in enumerate(texts)]
        wait_until(lambda: service.batcher.waiting == 3)
        held.go.set()
        good, bad, good_too = (future.result(60) for future in later)
        assert first.result(60).status_code == 200
    assert sorted(held.asked[1]) == sorted(texts)  # they were one batch
    assert sentence(bad, 500) == "the model failed on this request; the server's log says why"
    assert [one.json()["answers"][0]["text"] for one in (good, good_too)] == [
        ours.answer(picture(0), "what").text,
        ours.answer(picture(2), "is it").text,
    ]
    assert "the secret of the server" in caplog.text and "secret" not in bad.text


def test_a_full_queue_says_when_to_come_again(ours: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with client(ours, queue=2, max_batch=1) as (asking, service), ThreadPoolExecutor(3) as clients:
        first = clients.submit(ask, asking, sent(0))
        assert held.begun.wait(30)
        waiting = [clients.submit(ask, asking, sent(n)) for n in (1, 2)]
        wait_until(lambda: service.batcher.waiting == 2)
        refused = ask(asking, sent(3))
        assert "ask again in a moment" in sentence(refused, 503) and refused.headers["retry-after"] == "1"
        assert asking.get("/health").json() == {"status": "ready", "waiting": 2}
        with pytest.raises(Refused, match="2 requests wait already"):
            service.batcher.submit(Asked("model", picture(3), ["what"]))
        held.go.set()
        assert [one.result(60).status_code for one in (first, *waiting)] == [200] * 3


def test_large_pictures_fill_the_queue_sooner(ours: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    large = Image.new("RGB", (1000, 700))
    with client(ours, waiting_megapixels=1) as (_, service):
        service.batcher.submit(Asked("model", picture(0), ["what"]))
        assert held.begun.wait(30)
        service.batcher.submit(Asked("model", large, ["what"]))
        with pytest.raises(Refused, match="1 requests wait already"):
            service.batcher.submit(Asked("model", large, ["is it"]))
        held.go.set()


def test_who_waits_too_long_is_told_and_not_computed(ours: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with client(ours, timeout_s=0.2) as (asking, service):
        first = service.batcher.submit(Asked("model", picture(9), ["first"]))
        assert held.begun.wait(30)
        assert "no answer within 0.2 seconds" in sentence(ask(asking, sent(0), "late"), 503)
        held.go.set()
        first.result(30)
        service.batcher.submit(Asked("model", picture(9), ["last"])).result(30)
    assert held.asked == [["first"], ["last"]]


def test_who_has_left_is_not_computed(ours: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    form = form_of(sent(0), "gone")
    with client(ours) as (asking, service):
        first = service.batcher.submit(Asked("model", picture(9), ["first"]))
        assert held.begun.wait(30)
        left = threading.Event()

        async def receive() -> dict[str, Any]:
            if not left.is_set():
                left.set()
                return {"type": "http.request", "body": form[1], "more_body": False}
            while service.batcher.waiting == 0:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        status, _ = call(asking.app, "/answer", receive, form[0])
        assert status == 499
        held.go.set()
        first.result(30)
        service.batcher.submit(Asked("model", picture(9), ["last"])).result(30)
    assert held.asked == [["first"], ["last"]]


def test_what_waits_at_the_end_is_told(ours: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with client(ours) as (_, service):
        first = service.batcher.submit(Asked("model", picture(0), ["first"]))
        assert held.begun.wait(30)
        second = service.batcher.submit(Asked("model", picture(1), ["second"]))
        service.batcher.close(seconds=0)
        with pytest.raises(Refused, match="the server is ending"):
            second.result(30)
        with pytest.raises(Refused, match="the server is ending"):
            service.batcher.submit(Asked("model", picture(1), ["third"]))
        held.go.set()
        assert first.result(30)


def wait_until(true: Any) -> None:
    """Of what other threads do; a test's own limit of time ends it."""
    changed = threading.Event()
    while not true():
        changed.wait(0.001)


def form_of(content: bytes, question: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of a form."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="question"\r\n\r\n' + question.encode(),
        b'\r\n--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + content,
    ]
    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"host", b"localhost")]
    return headers, b"".join(parts) + b"\r\n--x--\r\n"


def call(app: Any, path: str, receive: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Status and body of a POST whose messages a test gives itself."""
    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "scheme": "http", "server": ("localhost", 80), "http_version": "1.1", "root_path": ""}
    asyncio.run(app({**scope, "asgi": {"version": "3.0"}, "client": ("127.0.0.1", 1)}, receive, send))
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])


# --- what is no picture, and no question ---------------------------------------------------------------------------

DAMAGED = {
    "nothing": (b"", 400, "empty"),
    "words": (b"this is not a picture", 415, "no picture that can be read"),
    "HTML": (b"<!doctype html><script>alert(1)</script>", 415, "no picture"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 415, "no picture"),
    "a zip": (b"PK\x03\x04" + bytes(100), 415, "no picture"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n", 415, "no picture"),
    "TIFF": (encoded(picture(0), "TIFF"), 415, "no picture"),
    "half a JPEG": (encoded(picture(0), "JPEG")[:400], 400, "damaged"),
    "half a PNG": (sent(0)[:600], 400, "cannot be read"),
    "a PNG of 30,000 x 30,000": (png_of(30_000, 30_000), 413, "over 1 megapixels"),
    "a PNG that grows a thousandfold": (encoded(Image.new("RGB", (4000, 4000))), 413, "4,000 x 4,000 pixels"),
    "a PNG whose text grows": (
        png_of(8, 8, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))),
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
    # One escape that leaves out 255 rows, which Pillow would fill.
    "a run-length coded BMP": (
        b"BM" + (1082).to_bytes(4, "little") + bytes(4) + (1078).to_bytes(4, "little") + (40).to_bytes(4, "little")
        + (1_000_000).to_bytes(4, "little") + (1).to_bytes(4, "little") + b"\1\0\x08\0\1" + bytes(23)
        + bytes(1024) + b"\0\2\0\xff",
        415,
        "run-length coded BMP",
    ),
    "a JPEG of ten thousand scans": (b"\xff\xd8" + b"\xff\xda\0\2" * 10_000, 400, "scans"),
    "too many bytes": (bytes(310_000), 413, "over 0.3 MB"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_picture_is_one_sentence(asking: TestClient, name: str) -> None:
    content, status, words = DAMAGED[name]
    with PeakMemory(torch.device("cpu")) as memory:
        answer = ask(asking, content)
    assert words in sentence(answer, status or answer.status_code) and 400 <= answer.status_code < 500
    assert memory.bytes is None or memory.bytes < 150e6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_known_formats(asking: TestClient, ours: Predictor, kind: str, tmp_path: Path) -> None:
    content = encoded(picture(4), kind)
    (tmp_path / "x").write_bytes(content)
    assert ask(asking, content).json()["answers"][0]["text"] == ours.answer(tmp_path / "x", "what is it").text


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([" \n "], "question 1 is empty"),
        (["what", "x" * 501], "question 2 has 501 characters; ask it in 500"),
        (["what"] * 6, "6 questions are asked; send at most 5"),
        (["what\x00is it"], "question 1 holds control characters"),
        (["a <eos> b"], "question 1 holds <eos>, which is a mark of the model's own"),
    ],
)
def test_what_is_no_question_is_one_sentence(asking: TestClient, questions: list[str], words: str) -> None:
    assert words in sentence(ask(asking, sent(0), *questions), 422)


def test_a_question_cannot_ask_for_another_picture(tmp_path: Path) -> None:
    with client(paligemma(tmp_path)) as (asking, _):
        assert "holds <image>" in sentence(ask(asking, sent(0), "what is <image>"), 422)


def test_white_space_is_one_space(asking: TestClient, ours: Predictor) -> None:
    (told,) = ask(asking, sent(0), " what\tis \n it ").json()["answers"]
    assert told["question"] == "what is it" and told["text"] == ours.answer(picture(0), "what is it").text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alternatives": "9"}, "ask for 0 to 8"),
        ({"alternatives": "-1"}, "alternatives=-1 is no number"),
        ({"alternatives": "1e3"}, "no number"),
        ({"look": "sideways"}, "look=sideways is unknown; use attention or gradient"),
        ({"model": "other"}, "there is no field 'model'; use image, question"),
    ],
)
def test_what_is_no_option_is_one_sentence(asking: TestClient, fields: dict[str, str], words: str) -> None:
    assert words in sentence(ask(asking, sent(0), **fields), 422)


def test_what_is_no_form_is_one_sentence(asking: TestClient) -> None:
    two = [("image", ("a", sent(0))), ("image", ("b", sent(1))), *PLAIN]
    multipart = {"content-type": "multipart/form-data"}
    assert "Too many files" in sentence(asking.post("/answer", files=two), 400)
    assert "must be one file" in sentence(asking.post("/answer", files=PLAIN), 422)
    assert "must be one file" in sentence(asking.post("/answer", files=[("image", (None, "/etc/passwd")), *PLAIN]), 422)
    assert "no question is asked" in sentence(asking.post("/answer", files=[("image", ("a", sent(0)))]), 422)
    assert "multipart" in sentence(asking.post("/answer", json={"image": "/etc/passwd"}), 415)
    assert "boundary" in sentence(asking.post("/answer", content=b"x", headers=multipart), 400)
    multipart["content-type"] += "; boundary=x"
    assert "Invalid multipart" in sentence(asking.post("/answer", content=b"--y\r\n\r\n", headers=multipart), 400)
    many = asking.post("/answer", files=[("image", ("a", sent(0))), *PLAIN * 3000])
    assert "send" in sentence(many, many.status_code) and many.status_code in (400, 413)
    assert "use POST" in sentence(asking.get("/answer"), 405)
    assert "/docs lists" in sentence(asking.get("/nothing"), 404)


def test_a_body_is_read_no_further_than_it_may_go(asking: TestClient) -> None:
    """Whatever its headers say, and if it never ends."""
    taken = 0
    headers, form = form_of(b"", "what")

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 50_000
        beginning = form.removesuffix(b"\r\n--x--\r\n") if taken == 50_000 else b""
        return {"type": "http.request", "body": beginning.ljust(50_000, b"a"), "more_body": True}

    for path, most in (("/answer", 500_000), ("/picture", 500_000), ("/gradio_api/queue/join", 300_000)):
        taken = 0
        status, body = call(asking.app, path, receive, [*headers, (b"content-length", b"10")])
        assert status == 413 and b"MB were sent; send less" in body
        assert taken <= most


def test_a_body_that_does_not_come_is_not_waited_for(ours: Predictor) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    with client(ours, timeout_s=0.1) as (asking, service):
        status, body = call(asking.app, "/answer", receive, form_of(b"", "")[0])
        assert status == 408 and b"did not come within 0.1 seconds" in body
        assert service._inside == 0
