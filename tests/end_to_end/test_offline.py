"""With HF_HUB_OFFLINE=1, as all tests run, no path waits for a network: none opens a connection."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from PIL import Image

import vlmvqa
import vlmvqa.hub
from tests.end_to_end.scripts import SMALL, call, done, sentence
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.datasets import vqav2
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.hub.dataset import read_hub
from vlmvqa.extras.hub.upload import refuse_upload
from vlmvqa.extras.pretrained.build import pretrained_config
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.hub import load_tokenizer
from vlmvqa.metrics import clip_similarity
from vlmvqa.models.build import build_vision_encoder, language_config
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Every address that was asked for or connected to; none, when the test is over."""
    asked: list[object] = []

    def connect(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError(f"a connection to {address}")

    def look_up(host: Any, *rest: Any, **more: Any) -> None:
        asked.append(host)
        raise socket.gaierror(f"a look-up of {host}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setenv("HF_TOKEN", "hf_none")  # as of a user who is logged in
    yield asked
    assert asked == []


def test_training_scoring_and_asking_need_no_network(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    done(call("train", "data=vqav2", f"data.root={whole}", f"run.dir={folder}", *SMALL))
    picture = next((whole / "val2014").iterdir())
    asking = (f"image={picture}", "question=how many?", f"run.dir={tmp_path / 'asked'}")
    done(call("predict", f"checkpoint={folder}", *asking))


PLACES: dict[str, Callable[[], object]] = {
    "load": lambda: vlmvqa.load("no/where"),
    "language": lambda: language_config(LanguageSettings("no/where")),
    "pretrained": lambda: pretrained_config(PretrainedSettings("no/where")),
    "processor": lambda: load_processor("no/where"),
    "tokenizer": lambda: load_tokenizer("no/where"),
    "encoder": lambda: build_vision_encoder(VisionSettings("vit_tiny_patch16_224.augreg_in21k", weights="hub")),
    "clip": lambda: clip_similarity({1: "a dog"}, {1: Image.new("RGB", (8, 8))}, model="no/where"),
    "data": lambda: read_hub(DataSettings("vqav2", None, hub="no/where"), vqav2, "train", None, BadRecords()),
    "publish": lambda: refuse_upload("no/where"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_cached_ends_in_a_sentence_that_says_why(place: str) -> None:
    if place == "data":
        pytest.importorskip("datasets")
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set, so nothing is downloaded"):
        PLACES[place]()


@pytest.mark.parametrize("place", PLACES)
def test_a_silent_hub_is_asked_once(place: str, asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of five seconds at most; huggingface_hub and transformers would retry for a minute."""
    if place == "data":
        pytest.importorskip("datasets")
    heads = []

    def head(url: str, timeout: int) -> None:
        heads.append((url, timeout))
        raise HTTPError("timed out")

    monkeypatch.setattr(vlmvqa.hub, "_unreached", (float("-inf"), ""))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    with pytest.raises(InputError, match=f"{constants.ENDPOINT} cannot be reached: timed out"):
        PLACES[place]()
    assert heads == [(constants.ENDPOINT, vlmvqa.hub.SECONDS)] and not constants.HF_HUB_OFFLINE


def test_a_command_ends_in_the_same_sentence(tmp_path: Path, whole: Path) -> None:
    asked = (f"data.root={whole}", "split=val", f"run.dir={tmp_path}")
    said = sentence(call("eval", "checkpoint=no/where", "data=vqav2", *asked))
    assert "HF_HUB_OFFLINE is set" in said
