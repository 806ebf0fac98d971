"""Who may ask the server and from where, which routes there are, and what it keeps for its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.pretrained import picture
from tests.serving import ask, client, own, sent, sentence
from vlmvqa.errors import InputError
from vlmvqa.extras.report.gallery import HEAT
from vlmvqa.extras.serving import browse, html, page
from vlmvqa.extras.serving.access import Guard
from vlmvqa.extras.serving.api import build
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.extras.serving.pictures import Pictures
from vlmvqa.extras.serving.server import Address, listen
from vlmvqa.extras.serving.service import Service, Told
from vlmvqa.inference.predictor import Predictor


@pytest.fixture(scope="module")
def ours() -> Predictor:
    return own()


@pytest.fixture(scope="module")
def asking(ours: Predictor) -> Iterator[TestClient]:
    with client(ours, megabytes=0.3, megapixels=1) as (found, _):
        yield found


# --- who may ask ---------------------------------------------------------------------------------------------------


def test_a_token_guards_everything_but_health(ours: Predictor) -> None:
    with client(ours, token="a long secret") as (asking, _):
        assert asking.get("/health").status_code == 200
        for path in ("/", "/docs", "/openapi.json", "/picture/x", "/config", "/gradio_api/queue/data"):
            assert "asks for a token" in sentence(asking.get(path), 401)
        assert "token" in sentence(ask(asking, sent(0)), 401)
        assert "token" in sentence(asking.post("/picture", content=sent(0)), 401)
        assert asking.get("/docs", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert asking.get("/docs", headers={"authorization": "Bearer a long secret"}).status_code == 200
        assert asking.get("/docs", headers={"authorization": "Bearer a long secr\xe9t".encode()}).status_code == 401


def test_the_page_asks_for_the_token_once(ours: Predictor) -> None:
    html = {"accept": "text/html"}
    with client(ours, token="a long secret") as (asking, _):
        page = asking.get("/docs", headers=html)
        assert page.status_code == 401 and 'type="password"' in page.text
        wrong = asking.post("/sign-in", data={"token": "a wrong one"})
        assert wrong.status_code == 401 and "That is not the token" in wrong.text and not asking.cookies
        right = asking.post("/sign-in", data={"token": "a long secret"}, follow_redirects=False)
        assert right.status_code == 303 and right.headers["location"] == "/"
        kept = right.headers["set-cookie"]
        assert "HttpOnly" in kept and "SameSite=strict" in kept and "a long secret" not in kept
        assert asking.get("/docs").status_code == 200
        asking.cookies.clear()
        for cookie in ("vlmvqa=another", "vlmvqa=", "=;\x01=", "vlmvqa=\u00e9"):
            assert asking.get("/docs", headers={"cookie": cookie.encode()}).status_code == 401


def test_without_a_token_only_this_machine_is_answered(ours: Predictor) -> None:
    """A page of elsewhere whose name leads here could read the answers otherwise."""
    with client(ours) as (asking, _):
        for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
            assert asking.get("/health", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            assert "only as localhost" in sentence(asking.get("/health", headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "gpu-box"])
def test_other_machines_may_ask_with_a_token_or_in_so_many_words(host: str) -> None:
    with pytest.raises(InputError, match=r"there is no token; give token=\.\.\., or open=true"):
        Address(host)
    assert Address(host, open=True) and Address(host, token="a long secret")
    with pytest.raises(InputError, match="open=no is unknown; use open=true or open=false"):
        Address(host, open="no")  # type: ignore[arg-type] # what Hydra makes of it
    for token in ("short", "a long secr\u00e9t"):
        with pytest.raises(InputError, match="shorter than 8 characters or holds others than ASCII"):
            Address(host, token=token)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_may_ask(host: str) -> None:
    assert Address(host).local


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with listen(Address(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is already in use; .* as in port={port + 1} "):
            listen(Address(port=port))
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1:0 \(.+\); correct host="):
        listen(Address("192.0.2.1", 0, open=True))
    for port in (99_999_999, -1, "ssh"):
        with pytest.raises(InputError, match=f"port={port} is none; use a number below 65536"):
            Address(port=port)


@pytest.mark.parametrize(("name", "value"), [("queue", 0), ("timeout_s", -1), ("megapixels", 200), ("clients", "many")])
def test_limits_that_are_none(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"limits.{name} is {value}"):
        Limits(**{name: value})


# --- pages ---------------------------------------------------------------------------------------------------------


def test_the_api_is_described_without_anything_from_elsewhere(asking: TestClient) -> None:
    page = asking.get("/docs")
    assert page.status_code == 200 and "POST /answer" in page.text and "GET /health" in page.text
    assert all(name in page.text for name in ("image", "question", "alternatives", "look", "answers[].probability"))
    assert "//" not in re.sub(r"/\*.*?\*/", "", page.text) and "<script" not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    schema = asking.get("/openapi.json").json()
    assert schema["paths"].keys() == {"/answer", "/health"}
    assert {"200", "413", "415", "503"} <= schema["paths"]["/answer"]["post"]["responses"].keys()


def test_a_picture_is_kept_for_the_page(asking: TestClient) -> None:
    content = sent(5)
    kept = asking.post("/picture", content=content).json()
    assert (kept["width"], kept["height"]) == picture(5).size
    found = asking.get(f"/picture/{kept['name']}")
    assert found.content == content and found.headers["content-type"] == "image/png"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "no picture" in sentence(asking.post("/picture", content=b"<svg/>"), 415)
    for name in ("0" * 32, "..%2f..%2fetc%2fpasswd", "x" * 3000):
        assert asking.get(f"/picture/{name}").status_code == 404


def test_the_pictures_that_were_used_longest_ago_give_way() -> None:
    pictures = Pictures(most=100)
    example = pictures.keep_always(b"e" * 90)
    first, second = pictures.keep(b"a" * 40), pictures.keep(b"b" * 40)
    assert pictures.keep(b"a" * 40) == first  # sent again
    third = pictures.keep(b"c" * 40)
    assert pictures.find(second) is None
    assert all(pictures.find(name) for name in (first, third, example))


def test_events_of_the_page_name_no_files_and_other_routes_of_gradio_are_none(ours: Predictor) -> None:
    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"gradio: " + body})

    asking = TestClient(Guard(gradio, Limits(), local=True), base_url="http://localhost")
    event = {"data": ["a question", 3], "fn_index": 0}
    assert asking.post("/gradio_api/queue/join", json=event).text.startswith('gradio: {"data"')
    for hidden in ({"path": "/etc/passwd"}, [{"a": {"path": "http://elsewhere.example", "meta": {}}}]):
        refused = asking.post("/gradio_api/queue/join", json={**event, "data": [hidden]})
        assert "names no files" in sentence(refused, 400)
    for broken in (b"{", b"[" * 100_000, b"\xff"):
        assert "is JSON" in sentence(asking.post("/gradio_api/queue/join", content=broken), 400)
    for path in (
        *("file=/etc/passwd", "file/etc/passwd", "upload", "proxy=http://elsewhere.example", "stream/x", "vibe-edit"),
        *(
            "run/ask",
            "call/ask",
            "call/v2/ask",
            "api/ask",
            "deep_link",
            "custom_component/a/b/c/d",
            "queue/x",
        ),
    ):
        assert asking.get(f"/gradio_api/{path}").status_code == 404
        assert asking.post(f"/gradio_api/{path}", json=event).status_code == 404
    for path in ("/", "/config", "/assets/index.js", "/theme.css", "/gradio_api/heartbeat/abc"):
        assert asking.get(path).status_code == 200


def test_wrong_methods_and_unknown_paths_are_one_sentence(ours: Predictor, tmp_path: Path) -> None:
    """With the page at /, which takes all that the API's routes don't match."""
    service = Service({"model": ours}, Limits())
    app = build(service)
    page.mount(app, service, None, [], tmp_path)
    asking = TestClient(Guard(app, Limits(), local=True), base_url="http://localhost")
    wrong = {"/answer": "GET PUT DELETE PATCH OPTIONS", "/picture": "GET", "/picture/x": "POST", "/health": "POST"}
    try:
        for path, methods in (
            wrong | {"/docs": "POST", "/openapi.json": "PUT", "/": "POST", "/config": "POST"}
        ).items():
            for method in methods.split():
                refused = asking.request(method, path)
                assert f"{method} {path} is not allowed; use " in sentence(refused, 405)
                assert refused.headers["allow"] in refused.json()["error"]
        for path in ("/answers", "/answer/", "/v1/answer", "/gradio_api/upload"):
            assert f"there is no {path}; /docs lists the routes" in sentence(asking.get(path), 404)
    finally:
        service.close()


def test_an_answer_without_a_word_is_shown_as_one() -> None:
    asked = {"image_id": 1, "question": "what is it?", "answers": ["a <dog>"], "log_probability": None}
    run = browse.Run("run", [{**asked, "answer": "", "vqa_accuracy": 0.0}], "vqa_accuracy")
    html, _, _ = browse.page(run, "wrong", "any", "any", 0)
    assert "(no word)" in html and "References: a &lt;dog&gt;" in html


def test_a_truncated_answer_and_the_colours_of_its_map_are_explained() -> None:
    told = Told("what is it?", "a do", 0.5, cut=True, alternatives=[("b", 0.2), ("c", 0.3)], look=b"png")
    page = html.answers([told], "gradient")
    assert "(truncated at max_new_tokens)" in page
    assert f'low<i style="background-image:{HEAT}"></i>high' in page and "Gradient map" in page
    assert html.index("50.0 %") < html.index("30.0 %") < html.index("20.0 %")  # the most probable first
