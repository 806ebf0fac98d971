"""launch/serve.py's OpenAI-compatible API, with the `openai` client over loopback."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AuthenticationError, BadRequestError, NotFoundError, OpenAI

from tests.conftest import ROOT
from tests.end_to_end.test_serve import started
from tests.pretrained import picture
from tests.serving import numbered_image, vlm_predictor
from vlmvqa.inference.predictor import Predictor, load
from vlmvqa.models.interface import GenerationSettings

QUESTION = "what color is the dog"


@dataclass(frozen=True)
class Server:
    """A running server, the model that it serves, and a client of it."""

    url: str
    folder: Path
    model: Predictor
    client: OpenAI

    def complete(self, number: int, text: str = QUESTION, **fields: Any) -> Any:
        """Ask about a numbered image."""
        return self.client.chat.completions.create(
            model="served", messages=user(text, data_url(numbered_image(number))), **fields
        )

    def answer(self, number: int, text: str = QUESTION, **decoding: Any) -> str:
        """Return the model's answer, outside the server."""
        settings = GenerationSettings(**{"max_new_tokens": 3, **decoding})
        return replace(self.model, decoding=settings).answer(picture(number), text).text


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def user(text: str, url: str) -> Any:
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai") / "served"
    vlm_predictor().save(folder)
    with (
        started(f"checkpoint={folder}", f"run.dir={folder.parent}/run") as url,
        OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield Server(url, folder, load(folder, "cpu"), client)


def test_answers_equal_those_of_the_other_route(server: Server) -> None:
    for number in range(5):
        form = [("image", ("x", numbered_image(number))), ("question", (None, QUESTION))]
        (answer,) = httpx.post(f"{server.url}/answer", files=form).json()["answers"]
        found = server.complete(number)
        assert found.choices[0].message.content == answer["text"] == server.answer(number)
        assert found.choices[0].finish_reason == ("length" if answer["truncated"] else "stop")
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_two_hundred_requests_from_sixteen_clients(server: Server) -> None:
    """No request is lost or mixed up, whatever the settings of the others are."""

    def ask(number: int) -> str:
        fields = {"max_tokens": 2 + number % 2, "temperature": 0}
        return str(server.complete(number, f"what is number {number}?", **fields).choices[0].message.content)

    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(ask, range(200)))
    for number, text in enumerate(found):
        assert text == server.answer(number, f"what is number {number}?", max_new_tokens=2 + number % 2), number
    assert len(set(found)) > 4


def test_sampling_and_log_probabilities(server: Server) -> None:
    sampled = {"temperature": 1.5, "n": 3, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    first, second, other = (server.complete(0, seed=seed, **sampled) for seed in (1, 1, 2))
    assert first.choices == second.choices != other.choices
    assert len({choice.message.content for choice in first.choices}) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    tokens = first.choices[0].logprobs.content
    assert len(tokens) == 6 and all(len(token.top_logprobs) == 2 for token in tokens)


def test_a_stream_equals_the_answer(server: Server) -> None:
    fields = {"temperature": 1.5, "n": 2, "max_tokens": 5, "seed": 4, "logprobs": True}
    whole = server.complete(1, **fields)
    *chunks, last = server.complete(1, **fields, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole.usage
    for choice in whole.choices:
        own = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [token for one in own if one.logprobs for token in one.logprobs.content] == choice.logprobs.content
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason


def test_the_models(server: Server) -> None:
    (listed,) = server.client.models.list()
    assert listed.id == str(server.folder)
    assert server.client.models.retrieve("served") == server.client.models.retrieve(listed.id) == listed
    with pytest.raises(NotFoundError, match="model=other is not served") as refused:
        server.client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "file:///etc/passwd", "/etc/passwd", "data:text/html,x"])
def test_no_url_is_opened(server: Server, url: str) -> None:
    with pytest.raises(BadRequestError, match="the server opens no other URL"):
        server.client.chat.completions.create(model="served", messages=user("what", url))


def test_other_fields_are_refused_by_name(server: Server) -> None:
    with pytest.raises(BadRequestError, match="top_p: Input should be 1") as refused:
        server.complete(0, top_p=0.9)
    assert refused.value.param == "top_p" and refused.value.type == "invalid_request_error"
    assert server.complete(0, top_p=1, presence_penalty=0).choices


def test_a_data_url_of_300_megabytes(server: Server) -> None:
    """The server ends it after 13 MB."""
    with pytest.raises(APIStatusError, match=r"more than 13\.4 MB; send less") as refused:
        server.client.chat.completions.create(
            model="served", messages=user("what", f"data:image/png;base64,{'A' * 300_000_000}")
        )
    assert refused.value.status_code == 413 and refused.value.type == "invalid_request_error"
    assert server.complete(0).choices


MALFORMED = [
    *(b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"model": "served"}', b"a=b&c=d"),
    *(json.dumps({"model": "served", "messages": one}).encode() for one in (None, {}, [1], [{}], [{"role": "user"}])),
    *(
        json.dumps({"model": one, "messages": user("what", data_url(numbered_image(0)))}).encode()
        for one in (1, None, "\ud800", [])
    ),
    json.dumps({"model": "served", "messages": user("what", data_url(numbered_image(0))), "n": 10**4000}).encode(),
    json.dumps(
        {"model": "served", "messages": user("what", data_url(numbered_image(0))), "temperature": float("nan")}
    ).encode(),
]


def test_twenty_malformed_bodies(server: Server) -> None:
    assert len(MALFORMED) >= 20
    for content in MALFORMED:
        refused = httpx.post(
            f"{server.url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert 400 <= refused.status_code < 500, content[:60]
        assert refused.json()["error"].keys() == {"message", "type", "param", "code"}


def test_the_api_key(server: Server) -> None:
    secret = "a long secret"
    with started(f"checkpoint={server.folder}", f"run.dir={server.folder.parent}/run", VLMVQA_TOKEN=secret) as url:
        for key, right in ((secret, True), ("wrong", False)):
            with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                asked = replace(server, client=client)
                if right:
                    assert asked.complete(0).choices[0].message.content == server.answer(0)
                else:
                    with pytest.raises(AuthenticationError, match="requires a token"):
                        asked.complete(0)


@pytest.mark.parametrize("kind", ["chat", "simple"])
def test_lmms_evals_client(server: Server, kind: str) -> None:
    """Both of its OpenAI-compatible models, with the arguments that its tasks give them."""
    found = pytest.importorskip(f"lmms_eval.models.{kind}.openai", reason="lmms-eval is not installed")
    instance = pytest.importorskip("lmms_eval.api.instance").Instance
    model = found.OpenAICompatible(model="served", base_url=f"{server.url}/v1", api_key="any", max_retries=1)
    model.task_dict = {"task": {"val": list(range(40))}}
    options = {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "do_sample": False, "until": ["\n\n"]}

    def messages(number: int) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": picture(number)}, {"type": "text", "text": f"what is {number}"}]
        return [{"role": "user", "content": content}]

    requests = []
    for number in range(40):
        given = (f"what is {number}", options, lambda number: [picture(number)], number, "task", "val")
        given = ("", messages, options, number, "task", "val") if kind == "chat" else given
        about = {"task": "task", "doc_id": number, "repeats": 1}
        requests.append(instance(request_type="generate_until", arguments=given, idx=0, metadata=about))
    texts = [one.text for one in model.generate_until(requests)]
    assert texts == [server.answer(number, f"what is {number}") for number in range(40)]


def test_the_examples_of_the_docs(server: Server, tmp_path: Path) -> None:
    photo, question = tmp_path / "photo.jpg", "What color is the circle?"
    picture(1).save(photo)
    page = (ROOT / "docs" / "serving.md").read_text().partition("## OpenAI's API")[2]
    page = page.replace("http://127.0.0.1:7860", server.url).replace('"demo"', '"served"')
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"```bash\n(curl .*?)```", page, re.DOTALL)
    greedy = replace(server.model, decoding=GenerationSettings(max_new_tokens=3)).answer(photo, question).text
    asked = {"model": "served", "messages": user(question, data_url(photo.read_bytes()))}
    sampled = server.client.chat.completions.create(**asked, temperature=1, n=3, seed=0, logprobs=True)
    lines = [
        f"{choice.message.content} {sum(token.logprob for token in choice.logprobs.content)}\n"
        for choice in sampled.choices
    ]
    assert run([sys.executable, "-c", code], tmp_path) == "".join(lines) + greedy
    if shutil.which("curl"):
        found = json.loads(run(["bash", "-c", command], tmp_path))
        assert found["choices"][0]["message"]["content"] == greedy and found["model"] == str(server.folder)


def run(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
