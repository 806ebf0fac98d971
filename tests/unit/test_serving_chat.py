"""The OpenAI-compatible API on tiny real models: answers, tokens, streams, and errors in OpenAI's format."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.pretrained import picture
from tests.serving import HeldPredictor, ask, error_message, numbered_image, serving
from tests.unit.test_serving import model, post, vlm, wait_until
from vlmvqa.data.example import Example, Question
from vlmvqa.extras.serving.api import build
from vlmvqa.extras.serving.batcher import Batcher, PendingRequest
from vlmvqa.extras.serving.completions import CompletionRequest, text_pieces
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.interface import GenerationSettings

__all__ = ["model", "vlm"]  # fixtures

CHAT = "/v1/chat/completions"
QUESTION = "what color is the dog"
JSON = [(b"content-type", b"application/json"), (b"host", b"localhost")]


@pytest.fixture(scope="module")
def client(vlm: Predictor) -> Iterator[TestClient]:
    with serving(vlm, megabytes=0.3, megapixels=1, questions=5, new_tokens=50) as (found, _):
        yield found


def data_url(number: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(numbered_image(number)).decode()}"


def user(*parts: str) -> list[dict[str, Any]]:
    """Return the messages of a question: texts, and images as URLs."""
    content = [
        {"type": "image_url", "image_url": {"url": part}} if ":" in part else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def body(number: int = 0, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """Return the body of a request about a numbered image."""
    return {"model": "model", "messages": user(text, data_url(number)), **fields}


def send(client: TestClient, content: dict[str, Any]) -> Any:
    """Send a body that httpx would not encode: with NaN, or with half a surrogate pair."""
    return client.post(CHAT, content=json.dumps(content), headers={"content-type": "application/json"})


def complete(client: TestClient, number: int = 0, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json=body(number, text, **fields))
    assert response.status_code == 200, response.text
    return dict(response.json())


def texts(found: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in found["choices"]]


def events(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """Return the data of a stream's events, without the last one."""
    response = client.post(CHAT, json=body(**fields, stream=True))
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *sent, end, nothing = response.text.split("\n\n")
    assert end == "data: [DONE]" and nothing == ""
    return [json.loads(event.removeprefix("data: ")) for event in sent]


def openai_error(response: Any, status: int) -> dict[str, Any]:
    """Return the error of a response in OpenAI's format."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"} and "Traceback" not in response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return dict(error)


# --- answers -------------------------------------------------------------------------------------------------------


def test_the_text_equals_that_of_answer(model: Predictor) -> None:
    with serving(model) as (client, _):
        for number in range(6):
            found = complete(client, number)
            (row,) = ask(client, numbered_image(number), QUESTION).json()["answers"]
            assert texts(found) == [row["text"]] == [model.answer(picture(number), QUESTION).text]
            (choice,) = found["choices"]
            assert choice["finish_reason"] == ("length" if row["truncated"] else "stop")
            assert choice["message"]["role"] == "assistant" and choice["logprobs"] is None and choice["index"] == 0
    assert found["object"] == "chat.completion" and found["model"] == "model" and found["id"].startswith("chatcmpl-")


def test_the_usage_counts_image_tokens(model: Predictor) -> None:
    question = Question(0, QUESTION, model.prompt.replace("{question}", QUESTION), "dog")
    columns = model.batch([model.processor.encode(Example(picture(0), 0, (question,)), [None])])
    with serving(model) as (client, _):
        usage = complete(client, n=2, max_tokens=3, temperature=1)["usage"]
        assert usage["prompt_tokens"] == int((columns["document"] >= 0).sum()) == usage["total_tokens"] - 6
        assert usage["completion_tokens"] == 6


def test_max_tokens_and_its_newer_name(client: TestClient, vlm: Predictor) -> None:
    longer = replace(vlm, decoding=GenerationSettings(max_new_tokens=9))
    for name in ("max_tokens", "max_completion_tokens"):
        found = complete(client, **{name: 9})
        assert texts(found) == [longer.answer(picture(0), QUESTION).text]
        assert found["usage"]["completion_tokens"] == 9 and found["choices"][0]["finish_reason"] == "length"


def test_sampling_follows_the_seed(model: Predictor) -> None:
    """Equal seeds give equal answers, whatever else is in the batch, and each of n answers has its own stream."""
    sampled = {"temperature": 1.5, "n": 4, "max_tokens": 5}
    with serving(model) as (client, _), ThreadPoolExecutor(8) as clients:
        alone = [texts(complete(client, seed=seed, **sampled)) for seed in (1, 2)]
        assert alone[0] != alone[1] and len(set(alone[0])) == 4
        first = complete(client, seed=1, temperature=1.5, max_tokens=5)
        assert texts(first) == alone[0][:1]
        together = clients.map(lambda n: texts(complete(client, n % 2, seed=1 + n % 4 // 2, **sampled)), range(16))
        for number, found in enumerate(together):
            if number % 2 == 0:
                assert found == alone[number % 4 // 2]
        greedy = complete(client, temperature=0, n=2, seed=3)
        assert texts(greedy) == [model.answer(picture(0), QUESTION).text] * 2
        assert texts(complete(client, temperature=1e-40)) == texts(greedy)[:1]


def test_the_servers_own_decoding_is_the_default(vlm: Predictor) -> None:
    sampling = replace(vlm, decoding=GenerationSettings(max_new_tokens=4, temperature=1.2, seed=5))
    with serving(sampling) as (client, _):
        (row,) = ask(client, numbered_image(0), QUESTION).json()["answers"]
        assert texts(complete(client)) == [row["text"]]
        assert texts(complete(client, temperature=0)) == [vlm.answer(picture(0), QUESTION).text] != [row["text"]]
    beams = replace(vlm, decoding=GenerationSettings(max_new_tokens=4, num_beams=3))
    with serving(beams) as (client, _):
        assert (
            texts(complete(client))
            == texts(complete(client, temperature=0))
            == [beams.answer(picture(0), QUESTION).text]
        )
        assert complete(client, temperature=1, seed=1)


def test_requests_with_equal_settings_share_a_batch(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[tuple[int, float]]] = []
    predict = CompletionRequest.predict.__func__  # type: ignore[attr-defined]

    def watched(cls: Any, predictor: Predictor, batch: Sequence[Any], max_rows: int) -> Any:
        batches.append([(one.decoding.max_new_tokens, one.decoding.temperature) for one in batch])
        return predict(cls, predictor, batch, max_rows)

    monkeypatch.setattr(CompletionRequest, "predict", classmethod(watched))
    held = HeldPredictor(monkeypatch)
    # Two of three are greedy: their seeds don't matter.
    settings = [{"max_tokens": 2 + n % 2, "temperature": n % 3 // 2, "seed": n % 3} for n in range(12)]
    with serving(vlm) as (client, batcher), ThreadPoolExecutor(12) as clients:
        first = batcher.submit(PendingRequest("model", picture(9), ["first"]))
        assert held.started.wait(30)
        waiting = [clients.submit(complete, client, n, **fields) for n, fields in enumerate(settings)]
        wait_until(lambda: batcher.num_waiting == 12)
        held.release.set()
        found = [texts(future.result(60)) for future in waiting]
        assert first.result(30)
        assert sorted(map(len, batches)) == [2, 2, 4, 4] and all(len(set(batch)) == 1 for batch in batches)
        assert found == [texts(complete(client, n, **fields)) for n, fields in enumerate(settings)]


def test_stop_texts(client: TestClient) -> None:
    sampled = {"temperature": 1.5, "seed": 1, "max_tokens": 8}
    (text,) = texts(complete(client, **sampled))
    assert "\ufffd" not in text[1:5] and text.find(text[3]) == 3
    for stop, first in ((text[3], 3), (["no such text", text[4:], text[3:5]], 3), (text[0], 0)):
        found = complete(client, stop=stop, logprobs=True, **sampled)
        assert texts(found) == [text[:first]] and found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] == len(found["choices"][0]["logprobs"]["content"]) < 8
    unstopped = complete(client, stop="no such text", **sampled)
    assert texts(unstopped) == [text] and unstopped["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 2}], ids=["greedy", "sampled"])
def test_log_probabilities(model: Predictor, settings: dict[str, Any]) -> None:
    """Those of k tokens add up to that of an answer of k tokens, which generation computes with its cache."""
    with serving(model) as (client, _):
        found = complete(client, logprobs=True, top_logprobs=3, max_tokens=4, n=2, **settings)
    for choice in found["choices"]:
        tokens = choice["logprobs"]["content"]
        assert len(tokens) == 4 and choice["finish_reason"] == "length"
        for token in tokens:
            assert [one["logprob"] for one in token["top_logprobs"]] == sorted(
                (one["logprob"] for one in token["top_logprobs"]), reverse=True
            )
            assert len(token["top_logprobs"]) == 3 and token["logprob"] <= token["top_logprobs"][0]["logprob"]
            assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
        if not settings:
            assert all(token["token"] == token["top_logprobs"][0]["token"] for token in tokens)
    tokens = found["choices"][0]["logprobs"]["content"]
    for length in range(1, 5):
        total = summed_log_probability(model, max_new_tokens=length, **settings)
        assert sum(token["logprob"] for token in tokens[:length]) == pytest.approx(total, abs=1e-4)


def summed_log_probability(model: Predictor, **decoding: Any) -> float:
    """Return the log-probability of the first answer to the question, by the generation loop."""
    request = CompletionRequest("model", picture(0), [QUESTION], decoding=GenerationSettings(**decoding))
    question = Question(request.ids[0], QUESTION, model.prompt.replace("{question}", QUESTION))
    answers = replace(model, decoding=request.decoding).answer_examples([Example(picture(0), 0, (question,))])
    return answers[request.ids[0]].log_probability


def test_an_answer_without_tokens(model: Predictor) -> None:
    """Every token ends an answer."""
    processor = replace(model.processor)
    processor.__dict__["end_token_ids"] = set(range(len(processor.tokenizer)))
    with serving(replace(model, processor=processor)) as (client, _):
        found = complete(client, n=2, logprobs=True, top_logprobs=1, max_tokens=1)
        assert texts(found) == ["", ""] and found["usage"]["completion_tokens"] == 0
        assert all(one["finish_reason"] == "stop" and one["logprobs"] == {"content": []} for one in found["choices"])
        assert [one["choices"][0]["delta"] for one in events(client)] == [{"role": "assistant", "content": ""}, {}]


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1.5, "logprobs": True, "top_logprobs": 1}], ids=str)
def test_a_stream_has_the_same_tokens(client: TestClient, fields: dict[str, Any]) -> None:
    whole = complete(client, **fields)
    *sent, usage = events(client, stream_options={"include_usage": True}, **fields)
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in sent} == {"chat.completion.chunk"} and len(
        {chunk["id"] for chunk in sent}
    ) == 1
    for choice in whole["choices"]:
        own = [one for chunk in sent for one in chunk["choices"] if one["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        listed = [token for one in own if one["logprobs"] for token in one["logprobs"]["content"]]
        assert listed == (choice["logprobs"]["content"] if choice["logprobs"] else [])
    assert all("usage" not in chunk or chunk["usage"] is None for chunk in sent)
    assert all(chunk["choices"] for chunk in events(client, **fields))  # no usage unless requested


def test_characters_of_several_tokens_are_not_divided(vlm: Predictor) -> None:
    """The tokenizer's tokens are bytes here."""
    tokenizer = vlm.processor.tokenizer
    for text in ("a caf\u00e9 \U0001f415", " the dog ", "", "\u00e9"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = text_pieces(tokenizer, tokens)
        assert len(pieces) == len(tokens) and "".join(pieces) == text.strip() and "\ufffd" not in "".join(pieces)
    broken = tokenizer("\u00e9", add_special_tokens=False)["input_ids"][:1]
    assert text_pieces(tokenizer, broken) == ["\ufffd"]


# --- models --------------------------------------------------------------------------------------------------------


def test_models_by_name_or_folder(vlm: Predictor) -> None:
    batcher = Batcher({"runs/a": vlm, "runs/b": vlm, "old/b": vlm}, Limits())
    client = TestClient(build(batcher), base_url="http://localhost")
    try:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list" and [one["id"] for one in listed["data"]] == ["runs/a", "runs/b", "old/b"]
        for name in ("runs/a", "a", "runs%2Fa"):
            assert client.get(f"/v1/models/{name}").json() == listed["data"][0]
        assert complete(client, model="a")["model"] == "runs/a" == complete(client, model="runs/a")["model"]
        for name in ("b", "c"):  # two models share the first
            for response in (client.get(f"/v1/models/{name}"), client.post(CHAT, json=body(model=name))):
                error = openai_error(response, 404)
                assert (error["param"], error["code"]) == ("model", "model_not_found")
                assert error["message"] == f"model={name} is not served; use runs/a or runs/b or old/b"
    finally:
        batcher.close()


# --- what clients send ---------------------------------------------------------------------------------------------

NEUTRAL = {"top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0, "n": 1, "seed": 42, "stop": None}
NEUTRAL |= {"logit_bias": {}, "response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": "medium"}
NEUTRAL |= {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": None, "metadata": {}}
NEUTRAL |= {"store": False, "service_tier": "auto", "verbosity": "medium", "user": "me", "logprobs": False}
NEUTRAL |= {"stream": False, "safety_identifier": "x", "prompt_cache_key": "y", "function_call": "none"}
NEUTRAL |= {"chat_template_kwargs": {"enable_thinking": False}}  # lmms-eval's enable_thinking_kwarg


def test_neutral_fields_change_nothing(client: TestClient) -> None:
    assert (
        texts(complete(client, **NEUTRAL))
        == texts(complete(client))
        == texts(complete(client, **dict.fromkeys(NEUTRAL)))
    )


@pytest.mark.parametrize("name", ["runs/demo", "o1"])
@pytest.mark.parametrize("order", [1, -1])
def test_the_requests_of_lmms_eval(client: TestClient, vlm: Predictor, name: str, order: int) -> None:
    """lmms_eval/models/chat/openai.py and simple/openai.py, 0.7.3; the second form is sent to names with an "o1"."""
    parts = ["Answer the question using a single word.\n", f"{QUESTION}?", data_url(1)][::order]
    payload: dict[str, Any] = {"messages": user(*parts), "model": "model"}
    if name == "o1":
        payload |= {"response_format": {"type": "text"}, "max_completion_tokens": 16, "reasoning_effort": "medium"}
    else:
        payload |= {"max_tokens": 16, "temperature": 0}
    payload |= {"top_p": 1.0, "seed": 0, "presence_penalty": 0, "frequency_penalty": 0, "n": 1}
    response = send(client, payload)
    question = " ".join(" ".join(part for part in parts if "data:" not in part).split())
    answer = replace(vlm, decoding=GenerationSettings(max_new_tokens=16)).answer(picture(1), question)
    assert texts(response.json()) == [answer.text]


UNSUPPORTED: dict[str, list[Any]] = {
    "top_p": [0.9, "1"],
    "frequency_penalty": [0.5],
    "presence_penalty": [-1],
    "logit_bias": [{"50256": -100}],
    "response_format": [{"type": "json_object"}],
    "reasoning_effort": ["high"],
    "tools": [[{"type": "function", "function": {"name": "f"}}], {}],
    "tool_choice": ["required"],
    "store": [True],
    "metadata": [{"a": "b"}],
    "modalities": [["audio"]],
    "temperature": [-1, 2.1, "0", True, float("nan"), float("inf")],
    "n": [0, 6, 1.5, "2", 10**30, True],
    "max_tokens": [0, 51, 1e3, 10**400],
    "max_completion_tokens": [51],
    "seed": ["a", 0.5],
    "stop": ["", ["a"] * 5, [1], {}],
    "logprobs": [1],
    "top_logprobs": [21, -1, 3],
    "stream": ["yes"],
    "stream_options": [{"include_usage": True}, {"include_obfuscation": True}],
    "user": [1],
    "best_of": [1],
    "audio": [{"voice": "alloy"}],
    "chat_template_kwargs": [{"enable_thinking": True}],
    "model": [1, None, ["model"]],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_values_are_refused_by_name(client: TestClient, name: str) -> None:
    for value in UNSUPPORTED[name]:
        error = openai_error(send(client, body(**{name: value})), 400)
        assert error["param"].startswith(name) and error["message"].startswith(name), (value, error)


def test_fields_that_exclude_each_other(client: TestClient) -> None:
    for fields, name in (
        ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    ):
        assert openai_error(client.post(CHAT, json=body(**fields)), 400)["param"] == name


ONE = "messages: the models answer single questions, without a system message or earlier turns; send one message"
MESSAGES = {
    "none": ([], ONE),
    "a system message": ([{"role": "system", "content": "be short"}, *user("what", data_url(0))], ONE),
    "two turns": ([*user("what", data_url(0)), {"role": "assistant", "content": "dog"}, *user("why")], ONE),
    "a role in a list": ([{"role": ["user"], "content": "what"}], ONE),
    "no image": ([{"role": "user", "content": "what is it"}], "0 image_url and 1 text parts"),
    "two images": (user("what", data_url(0), data_url(1)), "2 image_url and 1 text parts"),
    "no text": (user(data_url(0)), "1 image_url and 0 text parts"),
    "an empty text": (user(" \n", data_url(0)), "question 1 is empty"),
    "a long text": (user("x" * 501, data_url(0)), "at most 500"),
    "half a character": (user("what \ud800", data_url(0)), "control characters"),
    "a special token": (user("what <eos>", data_url(0)), "<eos>"),
    "a video": ([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}], "'video_url'"),
    "a detail": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(0), "detail": "low"}}]}],
        "messages[0].content[0].image_url.detail: Input should be 'auto'",
    ),
    "http": (user("what", "http://127.0.0.1/x.png"), "opens no other URL"),
    "a file": (user("what", "file:///etc/passwd"), "opens no other URL"),
    "no data": (user("what", "data:image/png;base64,"), "empty"),
    "a page": (user("what", "data:text/html;base64,YQ=="), "opens no other URL"),
    "not in base64": (user("what", "data:image/png,abc"), "opens no other URL"),
    "bad base64": (user("what", "data:image/png;base64,a$b="), "not valid base64"),
    "not an image": (user("what", "data:image/png;base64,YWJjZA=="), "not an image in a supported format"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_cannot_be_answered(client: TestClient, name: str) -> None:
    messages, words = MESSAGES[name]
    assert words in openai_error(send(client, body(messages=messages)), 400)["message"]


def test_limits_of_the_image(client: TestClient) -> None:
    large = base64.b64encode(bytes(310_000)).decode()
    response = client.post(CHAT, json=body(messages=user("what", f"data:image/png;base64,{large}")))
    assert "over 0.3 MB" in openai_error(response, 413)["message"]


MALFORMED = [
    *(b"", b"{", b"[]", b"null", b"1", b'"text"', b"{}", b"\xff\xfe{}", b"[" * 50_000, b'{"a":' * 50_000),
    *(b'{"model": "model"}', b'{"model": "model", "messages": {}}', b'{"model": "model", "messages": [1]}'),
    *(b'{"model": "model", "messages": [{"role": "user"}]}', b'{"model": "model", "messages": [[]]}'),
    b'{"model": "model", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b'{"model": "model", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
    b'{"\\ud800": 1}',
    b'{"model": "\\ud800", "messages": [{"role": "\\ud800", "content": "x"}]}',
    b'{"model": "model", "n": ' + b"9" * 5000 + b"}",
    b'{"model": "model", "temperature": NaN}',
    b"image=x&question=y",
]


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data; boundary=x"])
def test_malformed_bodies(client: TestClient, kind: str) -> None:
    for content in MALFORMED:
        openai_error(client.post(CHAT, content=content, headers={"content-type": kind}), 400)


def test_a_model_name_that_is_no_unicode(client: TestClient) -> None:
    openai_error(send(client, body(model="\ud800")), 404)


def test_wrong_paths_and_methods(client: TestClient) -> None:
    assert "use POST" in openai_error(client.get(CHAT), 405)["message"]
    assert "/docs lists the routes" in openai_error(client.post("/v1/embeddings", json={}), 404)["message"]
    assert "there is no /v2" in error_message(client.get("/v2"), 404)


# --- access --------------------------------------------------------------------------------------------------------


def test_the_token_is_the_api_key(vlm: Predictor) -> None:
    with serving(vlm, token="a long secret") as (client, _):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            for response in (
                client.post(CHAT, json=body(), headers=headers),
                client.get("/v1/models", headers=headers),
            ):
                assert openai_error(response, 401)["code"] == "invalid_api_key"
        right = {"authorization": "Bearer a long secret"}
        assert client.post(CHAT, json=body(), headers=right).status_code == 200


def test_pages_and_names_of_other_sites(client: TestClient) -> None:
    openai_error(client.post(CHAT, json=body(), headers={"host": "evil.example"}), 421)
    openai_error(client.post(CHAT, json=body(), headers={"sec-fetch-site": "cross-site"}), 403)


def test_an_image_at_the_limit_fits_into_the_body(vlm: Predictor) -> None:
    content = numbered_image(1)
    with serving(vlm, megabytes=len(content) / 1e6, characters=1) as (client, _):
        assert complete(client, 1, "x" * 1)
        padded = data_url(1) + "=" * 30_000
        assert "MB; send less" in openai_error(client.post(CHAT, json=body(messages=user("x", padded))), 413)["message"]


def test_a_large_body_is_refused_while_it_arrives(client: TestClient) -> None:
    """A data URL of 300 MB, sent to a server for images of 0.3 MB."""
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 50_000
        beginning = json.dumps(body(messages=user("what", "data:image/png;base64,"))).encode()[:-6]
        chunk = (beginning if taken == 50_000 else b"").ljust(50_000, b"A")
        return {"type": "http.request", "body": chunk, "more_body": taken < 300e6}

    status, content = post(client.app, CHAT, receive, JSON)
    assert status == 413 and "MB; send less" in json.loads(content)["error"]["message"]
    assert taken <= 600_000


def test_a_full_queue(vlm: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldPredictor(monkeypatch)
    with serving(vlm, queue=1, max_batch=1) as (client, batcher), ThreadPoolExecutor(2) as clients:
        first = clients.submit(ask, client, numbered_image(0))
        assert held.started.wait(30)
        waiting = clients.submit(complete, client)
        wait_until(lambda: batcher.num_waiting == 1)
        refused = client.post(CHAT, json=body())
        assert (
            "try again in a moment" in openai_error(refused, 503)["message"] and refused.headers["retry-after"] == "1"
        )
        held.release.set()
        assert first.result(60).status_code == 200 and waiting.result(60)["choices"]


def test_a_failing_model(vlm: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the secret of the server")

    monkeypatch.setattr(type(vlm.model), "generate", fail)
    with serving(vlm) as (client, _):
        response = client.post(CHAT, json=body())
        assert "see the server's log" in openai_error(response, 500)["message"] and "secret" not in response.text
    assert "the secret of the server" in caplog.text


# --- the schema ----------------------------------------------------------------------------------------------------


def test_the_schema_describes_the_routes(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert {CHAT, "/v1/models", "/v1/models/{model}"} <= schema["paths"].keys()
    operation = schema["paths"][CHAT]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert operation["responses"].keys() == {"200", "4XX", "503"}
    assert {"application/json", "text/event-stream"} == operation["responses"]["200"]["content"].keys()
    parts = schema["components"]["schemas"]
    assert {"ChatCompletion", "ChatCompletionChunk", "TokenLogprob", "Usage", "ErrorResponse"} <= parts.keys()
    fields = parts["ChatRequest"]["properties"]
    assert {*NEUTRAL, "model", "messages", "max_tokens", "stream_options"} <= fields.keys()
    assert parts["ChatRequest"]["required"] == ["model", "messages"]
    content = parts["UserMessage"]["properties"]["content"]["anyOf"]
    assert [one["type"] for one in content] == ["string", "array"]


def test_paths_of_the_schema_are_routes(client: TestClient) -> None:
    assert client.get("/docs").text.count("/v1/") >= 3
    assert Path(CHAT).name == "completions"
