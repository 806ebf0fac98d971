"""The model card, and its upload: to a small server of ours that speaks as much of the hub's protocol as it takes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from vlmvqa.errors import InputError
from vlmvqa.inference.card import write_card
from vlmvqa.inference.publish import refuse_upload, upload

METRICS = {
    "n": 12,
    "data": "vqav2",
    "split": "val",
    "prompt": "answer en {question}\n",
    "metric_version": "official script",
    "metric": "vqa_accuracy",
    "metrics": {"vqa_accuracy": {"overall": 61.5}},
    "controls": {"prior": {"overall": 24.0}, "shuffled_images": {"overall": None}},
}


class Hub(BaseHTTPRequestHandler):
    """Keeps the files of the one commit it is sent."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        self._answer({"name": "somebody", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self) -> None:
        chunks = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                chunks += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            chunks = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/preupload/main"):
            asked = json.loads(chunks)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in chunks.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                {"commitUrl": "https://huggingface.co/somebody/model/commit/1", "commitOid": "1", "success": True}
            )
        else:
            self._answer({"url": "https://huggingface.co/somebody/model", "id": "somebody/model"})

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Hub.files = {}
    yield Hub
    server.shutdown()


def card_config(vision: str, vision_weights: str, language: str, language_weights: str) -> str:
    parts = {"vision": (vision, vision_weights), "language": (language, language_weights)}
    return yaml.safe_dump({"model": {part: {"name": n, "weights": w} for part, (n, w) in parts.items()}}).strip()


def test_the_card_holds_scores_config_and_licences(tmp_path: Path) -> None:
    config = card_config("vit_base_patch14_dinov2.lvd142m", "hub", "google/gemma-2-2b", "hub")
    write_card(tmp_path, "somebody/model", [METRICS], config)
    card = (tmp_path / "README.md").read_text()
    assert (
        "license: gemma" in card and "Gemma terms of use" in card and "vit_base_patch14_dinov2.lvd142m: Apache" in card
    )
    assert "| vqav2 val | VQA accuracy (%) | 12 | 61.50 | 24.00 | - |" in card and config in card
    for given, licence in (
        (("vit_dinov2", "random", "gemma2", "random"), "apache-2.0"),
        (("vit_dinov2", "hub", "gemma2", "random"), "apache-2.0"),
        (("vit_dinov2", "hub", "meta-llama/Llama-3.2-1B", "hub"), "other"),
        (("vit_dinov2", "/weights/encoder.safetensors", "google/gemma-2-2b", "hub"), "other"),
    ):
        write_card(tmp_path, "tiny", [METRICS], card_config(*given))
        assert f"license: {licence}\n" in (tmp_path / "README.md").read_text()
    assert "the terms of /weights/encoder.safetensors" in (tmp_path / "README.md").read_text()


def test_a_model_is_uploaded_whole(tmp_path: Path, hub: type[Hub]) -> None:
    (tmp_path / "tokenizer").mkdir()
    contents = {"model.safetensors": b"\0\1weights", "tokenizer/tokenizer.json": b"{}", "README.md": b"card"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    refuse_upload("somebody/model")
    assert "somebody/model" in upload(tmp_path, "somebody/model")
    assert hub.files == contents


def test_an_adapter_is_uploaded_with_the_base_that_only_its_run_has(tmp_path: Path, hub: type[Hub]) -> None:
    """And the run's own files stay as they are."""
    model, base = tmp_path / "model", tmp_path / "base"
    model.mkdir()
    base.mkdir()
    ours = {"config.json": b'{"adapter": {"base": "../base"}}', "adapter_model.safetensors": b"weights"}
    ours["adapter_config.json"] = b'{"base_model_name_or_path": "../base"}'
    for name, content in ours.items():
        (model / name).write_bytes(content)
    (base / "config.json").write_bytes(b"{}")
    upload(model, "somebody/model")
    assert hub.files.keys() == {*ours, "base/config.json"}
    assert json.loads(hub.files["config.json"]) == {"adapter": {"base": "./base"}}
    assert json.loads(hub.files["adapter_config.json"]) == {"base_model_name_or_path": "./base"}
    assert {path.name: path.read_bytes() for path in model.iterdir()} == ours
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]


@pytest.mark.parametrize(
    ("name", "weights", "named"), [("google/paligemma-3b-pt-224", "hub", True), ("paligemma", "random", False)]
)
def test_the_card_names_what_was_tuned(tmp_path: Path, name: str, weights: str, named: bool) -> None:
    write_card(tmp_path, "tuned", [METRICS], yaml.safe_dump({"model": {"pretrained": name, "weights": weights}}))
    card = (tmp_path / "README.md").read_text()
    assert (f"base_model: {name}\n---" in card) == named


def test_what_could_not_be_uploaded_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="hub_id=model should be"):
        refuse_upload("model")
    with pytest.raises(InputError, match="is there already, and nothing is written over it"):
        refuse_upload(str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(InputError, match="nobody is logged in to the hub, or it cannot be reached"):
        refuse_upload("somebody/model")
