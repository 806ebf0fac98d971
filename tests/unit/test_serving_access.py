"""Authentication, allowed hosts and routes, the files of the page, and what it reads from the API."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from tests.serving import ask, error_message, numbered_image, serving, vlm_predictor
from vlmvqa.errors import InputError
from vlmvqa.extras.report.gallery import HEAT
from vlmvqa.extras.serving import browse
from vlmvqa.extras.serving.access import AccessMiddleware
from vlmvqa.extras.serving.address import Address, listen
from vlmvqa.extras.serving.api import build
from vlmvqa.extras.serving.batcher import Batcher
from vlmvqa.extras.serving.limits import Limits
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
        for path in ("/", "/page.js", "/docs", "/openapi.json", "/info", "/browse", "/examples/0", "/nothing"):
            assert "requires a token" in error_message(client.get(path), 401)
        assert "token" in error_message(ask(client, numbered_image(0)), 401)
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


def test_pages_of_other_sites_cannot_ask(vlm: Predictor) -> None:
    with serving(vlm) as (client, _):
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 422), ("none", 422)):
            assert client.post("/answer", headers={"sec-fetch-site": site}).status_code == status


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


def test_the_documentation_is_the_schema(client: TestClient) -> None:
    page = client.get("/docs")
    schema = client.get("/openapi.json").json()
    assert page.headers["content-type"].startswith("text/plain") and yaml.safe_load(page.text) == schema
    assert list(schema["paths"]["/answer"]["post"]["requestBody"]["content"]) == ["multipart/form-data"]
    body = schema["components"]["schemas"]["AnswerForm"]
    assert set(body["properties"]) == {"image", "question", "model", "alternatives", "attribution"}
    assert body["required"] == ["image", "question"]
    assert body["properties"]["attribution"]["anyOf"][0]["enum"] == ["attention", "gradient"]
    assert "probability" in schema["components"]["schemas"]["QuestionAnswer"]["properties"]
    assert schema["paths"].keys() == {
        *("/answer", "/health", "/info", "/browse", "/examples/{number}"),
        *("/v1/chat/completions", "/v1/models", "/v1/models/{model}"),
    }
    assert {"200", "413", "415", "503"} <= schema["paths"]["/answer"]["post"]["responses"].keys()


def test_the_page_loads_only_its_own_files(client: TestClient) -> None:
    files = {"/": "text/html", "/page.css": "text/css", "/page.js": "javascript"}
    for path, kind in files.items():
        response = client.get(path)
        assert response.status_code == 200 and kind in response.headers["content-type"]
        assert re.findall(r"https?://|url\(|@import|innerHTML|\beval\b", response.text) == []
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert set(re.findall(r'(?:src|href)="(\w+\.\w+)"', client.get("/").text)) == {"page.css", "page.js"}
    style = " ".join(client.get("/page.css").text.split())
    assert HEAT in style


def test_the_info_and_the_examples(vlm: Predictor) -> None:
    images = [numbered_image(n) for n in range(2)]
    run = browse.Run([], "vqa_accuracy")
    with serving(vlm, run=run, examples=images, questions=3) as (client, _):
        info = client.get("/info").json()
        assert info["models"] == ["model"] and info["question_types"] == [] and info["limits"]["questions"] == 3
        assert [one.startswith("data:image/jpeg;base64,") for one in info["examples"]] == [True, True]
        assert [client.get(f"/examples/{n}").content for n in range(2)] == images
        for number in ("2", "-1"):
            assert f"there is no example {number}" in error_message(client.get(f"/examples/{number}"), 404)
        assert "number: Input should be a valid integer" in error_message(client.get("/examples/x"), 422)


def test_the_browsed_answers(vlm: Predictor) -> None:
    """Filters, pages, counted references, and images that cannot be read."""
    records = [
        {
            "image_id": n,
            "question": f"what is {n}?",
            "answer": "a <dog>" if n else "",
            "answers": ["a", "b", "a"],
            "log_probability": math.log(0.3 if n % 2 else 0.95) if n else None,
            "question_type": "what" if n % 3 else "how",
            "vqa_accuracy": 100.0 * (n % 2),
        }
        for n in range(30)
    ]
    run = browse.Run(records, "vqa_accuracy", {1: numbered_image(1), 2: b"no image"})
    with serving(vlm, run=run) as (client, _):
        assert client.get("/info").json()["question_types"] == ["what", "how"]

        def found(**query: str | int) -> dict[str, Any]:
            return client.get("/browse", params=query).json()

        page = found()
        assert [page[key] for key in ("total", "pages", "page", "first")] == [30, 3, 0, 1]
        first, second, third = page["answers"][:3]
        assert (first["text"], first["probability"], first["right"]) == ("", None, False)
        assert second["thumbnail"].startswith("data:image/jpeg") and third["thumbnail"] is None
        assert second["references"] == ["a x 2", "b"] and second["type"] == "what"
        last = found(page=10**9)
        assert (last["page"], last["first"], len(last["answers"])) == (2, 25, 6)
        assert found(correctness="right")["total"] == 15 and found(type="how")["total"] == 10
        assert found(confidence="over 90 %")["total"] == 14 and found(confidence="50 to 90 %")["total"] == 0
        assert found(correctness="right", confidence="over 90 %")["answers"] == []
        assert found(type="no such type")["total"] == 0
        for query in ("correctness=maybe", "confidence=high", "page=-1", "page=x"):
            message = error_message(client.get(f"/browse?{query}"), 422)
            assert message.startswith(query.partition("=")[0]) and "multipart" not in message


def test_without_a_run_there_is_nothing_to_browse(client: TestClient) -> None:
    assert "start the server with browse=" in error_message(client.get("/browse"), 404)
    assert client.get("/info").json()["question_types"] is None


def test_wrong_methods_and_unknown_paths(client: TestClient) -> None:
    wrong = {"/answer": "GET PUT DELETE PATCH OPTIONS", "/info": "POST", "/health": "POST", "/browse": "POST"}
    wrong |= {"/docs": "POST", "/openapi.json": "PUT", "/": "POST", "/page.js": "POST", "/examples/0": "POST"}
    for path, methods in wrong.items():
        for method in methods.split():
            refused = client.request(method, path)
            assert f"{method} {path} is not allowed; use " in error_message(refused, 405)
            assert refused.headers["allow"] in refused.json()["error"]
    for path in ("/answers", "/answer/", "/v1/answer", "/page.html", "/api.py", "/favicon.ico"):
        assert f"there is no {path}; /docs lists the routes" in error_message(client.get(path), 404)
    assert "there is no /" + "x" * 59 + "...;" in error_message(client.get("/" + "x" * 3000), 404)


def test_no_path_of_a_client_is_opened(client: TestClient) -> None:
    for path in ("../limits.py", "%2e%2e/limits.py", "page.css/../api.py", "..%2f..%2fetc%2fpasswd", "//etc/passwd"):
        for folder in ("", "examples/"):
            assert client.get(f"/{folder}{path}").status_code in (404, 422)


def test_two_models_by_name(vlm: Predictor) -> None:
    batcher = Batcher({"first": vlm, "second": vlm}, Limits())
    client = TestClient(AccessMiddleware(build(batcher), Limits(), local=True), base_url="http://localhost")
    try:
        assert client.get("/info").json()["models"] == ["first", "second"]
        for given, model in (({}, "first"), ({"model": "second"}, "second")):
            assert ask(client, numbered_image(0), **given).json()["model"] == model
        message = error_message(ask(client, numbered_image(0), model="third"), 422)
        assert message == "model=third is not served; use first or second"
    finally:
        batcher.close()
