"""Authentication, allowed hosts and routes, the image cache, and the pages' HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from tests.pretrained import picture
from tests.serving import answered, ask, error_message, numbered_image, serving, vlm_predictor
from vlmvqa.errors import InputError
from vlmvqa.extras.report.gallery import HEAT
from vlmvqa.extras.serving import browse, html, page
from vlmvqa.extras.serving.access import AccessMiddleware
from vlmvqa.extras.serving.api import build
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.extras.serving.server import Address, listen
from vlmvqa.extras.serving.service import Service
from vlmvqa.extras.serving.uploads import ImageCache
from vlmvqa.inference.predictor import Predictor


@pytest.fixture(scope="module")
def vlm() -> Predictor:
    return vlm_predictor()


@pytest.fixture(scope="module")
def client(vlm: Predictor) -> Iterator[TestClient]:
    with serving(vlm, megabytes=0.3, megapixels=1) as (found, _):
        yield found


# --- authentication and addresses ----------------------------------------------------------------------------------


def test_a_token_protects_all_routes_but_health(vlm: Predictor) -> None:
    with serving(vlm, token="a long secret") as (client, _):
        assert client.get("/health").status_code == 200
        for path in ("/", "/docs", "/openapi.json", "/image/x", "/config", "/gradio_api/queue/data"):
            assert "requires a token" in error_message(client.get(path), 401)
        assert "token" in error_message(ask(client, numbered_image(0)), 401)
        assert "token" in error_message(client.post("/image", content=numbered_image(0)), 401)
        assert client.get("/docs", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/docs", headers={"authorization": "Bearer a long secret"}).status_code == 200
        assert client.get("/docs", headers={"authorization": "Bearer a long secr\xe9t".encode()}).status_code == 401


def test_a_browser_sends_the_token_as_a_password(vlm: Predictor) -> None:
    with serving(vlm, token="a long secret") as (client, _):
        assert client.get("/docs").headers["www-authenticate"].startswith("Basic realm=")
        assert client.get("/docs", auth=("anyone", "a long secret")).status_code == 200
        for user, password in (("a long secret", ""), ("anyone", "a wrong one"), ("", "a long secr\u00e9t")):
            assert client.get("/docs", auth=(user, password)).status_code == 401
        for broken in ("Basic", "Basic %%%", "Basic YQ==", "Digest a long secret", "Bearer"):
            assert client.get("/docs", headers={"authorization": broken}).status_code == 401


def test_without_a_token_only_local_hosts_are_answered(vlm: Predictor) -> None:
    """This prevents DNS rebinding."""
    with serving(vlm) as (client, _):
        for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            assert "only as localhost" in error_message(client.get("/health", headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "gpu-box"])
def test_a_public_host_needs_a_token_or_open(host: str) -> None:
    with pytest.raises(InputError, match=r"there is no token; set token=\.\.\., or open=true"):
        Address(host)
    assert Address(host, open=True) and Address(host, token="a long secret")
    with pytest.raises(InputError, match="open=no is unknown; use open=true or open=false"):
        Address(host, open="no")  # type: ignore[arg-type] # Hydra's value
    for token in ("short", "a long secr\u00e9t"):
        with pytest.raises(InputError, match="shorter than 8 characters or contains non-ASCII"):
            Address(host, token=token)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_local_hosts(host: str) -> None:
    assert Address(host).local


def test_bad_ports_and_hosts() -> None:
    with listen(Address(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is already in use; .* as in port={port + 1} "):
            listen(Address(port=port))
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1:0 \(.+\); correct host="):
        listen(Address("192.0.2.1", 0, open=True))
    for port in (99_999_999, -1, "ssh"):
        with pytest.raises(InputError, match=f"port={port} is not a port; use a number below 65536"):
            Address(port=port)


@pytest.mark.parametrize(("name", "value"), [("queue", 0), ("timeout_s", -1), ("megapixels", 200), ("clients", "many")])
def test_bad_limits(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"limits.{name} is {value}"):
        Limits(**{name: value})


# --- pages ---------------------------------------------------------------------------------------------------------


def test_the_api_documentation_loads_nothing_from_other_hosts(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200 and "POST /answer" in page.text and "GET /health" in page.text
    assert "//" not in re.sub(r"/\*.*?\*/", "", page.text) and "<script" not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    schema = client.get("/openapi.json").json()
    (shown,) = re.findall("<pre>(.*)</pre>", page.text, re.DOTALL)
    assert yaml.safe_load(unescape(shown)) == schema
    assert list(schema["paths"]["/answer"]["post"]["requestBody"]["content"]) == ["multipart/form-data"]
    body = schema["components"]["schemas"]["AnswerForm"]
    assert set(body["properties"]) == {"image", "question", "alternatives", "attribution"}
    assert body["required"] == ["image", "question"]
    assert body["properties"]["attribution"]["anyOf"][0]["enum"] == ["attention", "gradient"]
    assert "probability" in schema["components"]["schemas"]["QuestionAnswer"]["properties"]
    assert schema["paths"].keys() == {"/answer", "/health"}
    assert {"200", "413", "415", "503"} <= schema["paths"]["/answer"]["post"]["responses"].keys()


def test_uploaded_images_are_cached(client: TestClient) -> None:
    content = numbered_image(5)
    kept = client.post("/image", content=content).json()
    assert (kept["width"], kept["height"]) == picture(5).size
    found = client.get(f"/image/{kept['name']}")
    assert found.content == content and found.headers["content-type"] == "image/png"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "not an image" in error_message(client.post("/image", content=b"<svg/>"), 415)
    for name in ("0" * 32, "..%2f..%2fetc%2fpasswd", "x" * 3000):
        assert client.get(f"/image/{name}").status_code == 404


def test_the_least_recently_used_images_are_evicted() -> None:
    images = ImageCache(max_bytes=100)
    example = images.add(b"e" * 90, pinned=True)
    first, second = images.add(b"a" * 40), images.add(b"b" * 40)
    assert images.add(b"a" * 40) == first  # uploaded again
    third = images.add(b"c" * 40)
    assert images.get(second) is None
    assert all(images.get(name) for name in (first, third, example))


def test_events_that_name_files_and_other_gradio_routes_are_blocked(vlm: Predictor) -> None:
    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"gradio: " + body})

    client = TestClient(AccessMiddleware(gradio, Limits(), local=True), base_url="http://localhost")
    event = {"data": ["a question", 3], "fn_index": 0}
    assert client.post("/gradio_api/queue/join", json=event).text.startswith('gradio: {"data"')
    for hidden in ({"path": "/etc/passwd"}, [{"a": {"path": "http://elsewhere.example", "meta": {}}}]):
        refused = client.post("/gradio_api/queue/join", json={**event, "data": [hidden]})
        assert "may not name files" in error_message(refused, 400)
    for broken in (b"{", b"[" * 100_000, b"\xff"):
        assert "must be JSON" in error_message(client.post("/gradio_api/queue/join", content=broken), 400)
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
        assert client.get(f"/gradio_api/{path}").status_code == 404
        assert client.post(f"/gradio_api/{path}", json=event).status_code == 404
    for path in ("/", "/config", "/assets/index.js", "/theme.css", "/gradio_api/heartbeat/abc"):
        assert client.get(path).status_code == 200


def test_wrong_methods_and_unknown_paths(vlm: Predictor, tmp_path: Path) -> None:
    """With the page mounted at /, which receives all requests that no route of the API matches."""
    service = Service({"model": vlm}, Limits())
    app = build(service)
    page.mount(app, service, None, [], tmp_path)
    client = TestClient(AccessMiddleware(app, Limits(), local=True), base_url="http://localhost")
    wrong = {"/answer": "GET PUT DELETE PATCH OPTIONS", "/image": "GET", "/image/x": "POST", "/health": "POST"}
    try:
        for path, methods in (
            wrong | {"/docs": "POST", "/openapi.json": "PUT", "/": "POST", "/config": "POST"}
        ).items():
            for method in methods.split():
                refused = client.request(method, path)
                assert f"{method} {path} is not allowed; use " in error_message(refused, 405)
                assert refused.headers["allow"] in refused.json()["error"]
        for path in ("/answers", "/answer/", "/v1/answer", "/gradio_api/upload"):
            assert f"there is no {path}; /docs lists the routes" in error_message(client.get(path), 404)
    finally:
        service.close()


def test_empty_answers_have_a_placeholder() -> None:
    record = {"image_id": 1, "question": "what is it?", "answers": ["a <dog>"], "log_probability": None}
    run = browse.Run("run", [{**record, "answer": "", "vqa_accuracy": 0.0}], "vqa_accuracy")
    html, _, _ = browse.page(run, "wrong", "any", "any", 0)
    assert "(no word)" in html and "References: a &lt;dog&gt;" in html


def test_cards_explain_truncation_and_the_color_scale() -> None:
    shown = answered("what is it?", "a do", 0.5, ("b", 0.2), ("c", 0.3), truncated=True, attribution="cG5n")
    cards = html.cards([shown], "gradient")
    assert "(truncated at max_new_tokens)" in cards
    assert f'low<i style="background-image:{HEAT}"></i>high' in cards and "Gradient map" in cards
    assert cards.index("50.0 %") < cards.index("30.0 %") < cards.index("20.0 %")  # the most probable first
