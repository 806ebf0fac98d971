"""The model card, and its upload to a local server that implements the needed part of the hub's protocol."""

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
from vlmvqa.extras.hub.upload import refuse_upload, upload
from vlmvqa.extras.report.model_card import write_card

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
    """Store the files of the commit it receives."""

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


def card(folder: Path, config: str, saved: dict[str, Any], name: str = "somebody/model") -> str:
    """Return the card of a model with this saved `config.json`."""
    (folder / "config.json").write_text(json.dumps(saved))
    write_card(folder, name, [METRICS], config)
    return (folder / "README.md").read_text()


def pretrained_config(name: str, weights: str = "hub", **more: Any) -> str:
    return yaml.safe_dump({"model": {"pretrained": name, "weights": weights}, **more}, sort_keys=False)


def adapter(base: str, method: str = "lora", bits: int | None = None) -> dict[str, Any]:
    return {"adapter": {"base": base, "settings": {"method": method, "rank": 16, "bits": bits}}}


def test_the_card_holds_scores_config_and_licences(tmp_path: Path) -> None:
    config = card_config("vit_base_patch14_dinov2.lvd142m", "hub", "google/gemma-2-2b", "hub")
    text = card(tmp_path, config, {})
    assert (
        "license: gemma" in text and "Gemma terms of use" in text and "vit_base_patch14_dinov2.lvd142m: Apache" in text
    )
    assert "| vqav2 val | VQA accuracy (%) | 12 | 61.50 | 24.00 | - |" in text and config in text
    assert "A vision encoder, a projector and a language model" in text and "library_name: vlmvqa\n" in text
    assert "\n- Metric and prompt of vqav2: official script; `'answer en {question}\\n'`.\n" in text
    for given, licence in (
        (("vit_dinov2", "random", "gemma2", "random"), "apache-2.0"),
        (("vit_dinov2", "hub", "gemma2", "random"), "apache-2.0"),
        (("vit_dinov2", "hub", "meta-llama/Llama-3.2-1B", "hub"), "other"),
        (("vit_dinov2", "/weights/encoder.safetensors", "google/gemma-2-2b", "hub"), "other"),
    ):
        text = card(tmp_path, card_config(*given), {})
        assert f"license: {licence}\n" in text
    assert "the terms of encoder.safetensors" in text


def ours(attention_pattern: str = "prefix_lm", language: str = "gemma2", projector: str = "linear") -> dict[str, Any]:
    model = {"attention_pattern": attention_pattern, "projector": {"kind": projector}}
    return {"model_type": "vlmvqa", "model": model, "language_config": {"model_type": language}}


@pytest.mark.parametrize(
    ("saved", "registered", "exported"),
    [
        (ours(), True, True),
        (ours("causal"), True, False),
        (ours(language="llama"), True, False),
        (ours(projector="mlp"), True, False),
        ({"architectures": ["PaliGemmaForConditionalGeneration"], "vlmvqa": {}}, False, False),
    ],
)
def test_the_card_shows_each_way_to_load(
    tmp_path: Path, saved: dict[str, Any], registered: bool, exported: bool
) -> None:
    config = card_config("vit_dinov2", "random", "gemma2", "random")
    (tmp_path / "demo" / "model").mkdir(parents=True)
    text = card(tmp_path / "demo" / "model", config, saved, str(tmp_path / "demo"))
    assert f'vlmvqa.load("{tmp_path}/demo")' in text  # which finds the folder itself
    assert f'AutoModelForImageTextToText.from_pretrained("{tmp_path}/demo/model")' in text
    assert ("import vlmvqa.hf\n" in text) == registered
    command = f"python launch/export.py checkpoint={tmp_path}/demo format=paligemma output=exported"
    assert (command in text) == exported
    assert "from_pretrained" not in card(tmp_path, config, adapter("google/gemma-3"))  # peft's lines are its base's


def test_the_card_holds_intervals_and_where_the_model_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = card_config("vit_dinov2", "random", "gemma2", "random")
    monkeypatch.setitem(METRICS, "metrics", {"vqa_accuracy": {"overall": 61.5, "interval": [60.25, 62.75]}})
    monkeypatch.setitem(METRICS["controls"], "prior", {"overall": 24.0, "interval": [23.0, 25.0]})
    model = tmp_path / "masks" / "causal" / "seed-1" / "model"
    model.mkdir(parents=True)
    text = card(model, config, ours())
    assert "| 12 | 61.50 (60.25 to 62.75) | 24.00 (23.00 to 25.00) | - |" in text
    assert "\n- Trained by the run seed-1.\n" in text
    (tmp_path / "masks" / "study.yaml").touch()
    start = {"time": "2026-01-02T03:04:05+00:00", "git": {"commit": "0123456789abcdef", "changed": False}}
    (model.parent / "run.json").write_text(json.dumps({"starts": [{}, start]}))
    text = card(model, config, ours())
    assert (
        "\n- Trained by seed-1 of causal in the study masks, 2026-01-02, at commit 0123456789ab of the code.\n" in text
    )


def test_a_model_is_uploaded_whole(tmp_path: Path, hub: type[Hub]) -> None:
    (tmp_path / "tokenizer").mkdir()
    contents = {
        "config.json": b"{}",
        "model.safetensors": b"\0\1weights",
        "tokenizer/tokenizer.json": b"{}",
        "README.md": b"card",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    refuse_upload("somebody/model")
    assert "somebody/model" in upload(tmp_path, "somebody/model")
    assert hub.files == contents


def test_an_adapter_is_uploaded_with_the_base_that_only_its_run_has(tmp_path: Path, hub: type[Hub]) -> None:
    """The run's own files are not changed."""
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
    ("base", "method", "bits", "kind", "named"),
    [
        ("google/gemma-3", "lora", 4, "LoRA, rank 16, over a base in 4 bits", "[google/gemma-3]"),
        ("/home/me/runs/vqa/model", "dora", None, "DoRA, rank 16", "a local model (`vqa`)"),
        ("../base", "lora", None, "LoRA, rank 16", "the model in `base/`"),
    ],
)
def test_the_card_of_adapters_says_so(
    tmp_path: Path, base: str, method: str, bits: int | None, kind: str, named: str
) -> None:
    text = card(tmp_path, pretrained_config(base), adapter(base, method, bits))
    assert f"\nAdapters ({kind}) of {named}" in text and "A vision encoder" not in text
    on_hub = base.startswith("google")
    assert ("library_name: peft\n" in text) == on_hub == (f"base_model: {base}\n" in text)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (
            "google/paligemma-3b-pt-224",
            "fine-tuned from [google/paligemma-3b-pt-224](https://huggingface.co/google/paligem",
        ),
        ("/home/me/weights/pali", "fine-tuned from a local model (`pali`)"),
        (None, "trained from random weights"),
    ],
)
def test_the_card_of_a_pretrained_model_names_its_class_and_what_was_tuned(
    tmp_path: Path, base: str | None, said: str
) -> None:
    started = {"started_from": {"model": base} if base else None}
    saved = {"architectures": ["PaliGemmaForConditionalGeneration"], "vlmvqa": started}
    text = card(tmp_path, pretrained_config(base or "paligemma", "hub" if base else "random"), saved)
    assert f"`PaliGemmaForConditionalGeneration` of transformers, {said}" in text and "A vision encoder" not in text
    assert (f"base_model: {base}\n---" in text) == bool(base and base.startswith("google"))
    assert "library_name: vlmvqa\n" in text


def test_the_card_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "data": {"root": "/home/me/data/vqav2"},
        "run": {"dir": "/home/me/out"},
        "init_from": "/home/me/a/model",
    }
    text = card(tmp_path, pretrained_config("/home/me/a/model", **more), adapter("/home/me/a/model"))
    assert "/home" not in text and "The pretrained model's weights, a: the terms of a." in text
    assert "  root: vqav2\n" in text and "init_from: a\n" in text


@pytest.mark.parametrize("name", ["./published", "runs/published", "somebody/published"])
def test_the_card_says_what_to_load(tmp_path: Path, name: str) -> None:
    text = card(tmp_path, pretrained_config("paligemma", "random"), adapter("../base"), name)
    assert "\n# published\n" in text and f'vlmvqa.load("{name}")' in text


def test_a_base_that_stays_behind_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    said = (
        "its base model /data/base is not uploaded; publish it too, or merge first: "
        f"launch/merge.py adapter={model} output=...\n"
    )
    for base, printed in (("google/paligemma-3b-pt-224", ""), ("/data/base", said)):
        (model / "config.json").write_text(json.dumps(adapter(base)))
        upload(model, str(tmp_path / f"published{len(printed)}"))
        assert capsys.readouterr().out == printed


def test_what_could_not_be_uploaded_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="hub_id=model should be"):
        refuse_upload("model")
    with pytest.raises(InputError, match="exists already and is never overwritten"):
        refuse_upload(str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(InputError, match="no user is logged in to the Hub, or it cannot be reached"):
        refuse_upload("somebody/model")
