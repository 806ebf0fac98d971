"""Training that starts from parts of several saved models (`init_from.projector=...`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.configs import train_config
from tests.unit.test_predictor import examples, predictor
from vlmvqa import fingerprint
from vlmvqa.config import early_checks
from vlmvqa.config.overrides import compose
from vlmvqa.config.schema import DistSettings, TrainConfig
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.models.interface import PARTS
from vlmvqa.models.loading import load_model
from vlmvqa.models.trained_model import TrainedModel
from vlmvqa.models.vlm import ProjectorSettings
from vlmvqa.training.initial_model import initial_model, with_saved_model
from vlmvqa.training.run import Session, build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one architecture with other weights."""
    root = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate("ab"):
        one = predictor()
        torch.manual_seed(seed)
        for weight in one.model.parameters():
            weight.data = torch.randn_like(weight)
        one.save(root / name)
    return {name: root / name for name in "ab"}


def start(*given: str) -> TrainedModel:
    return initial_model(with_saved_model(train_config(*given)), examples())


def unbuilt(given: str, **vision: int) -> TrainConfig:
    """The config of a new model of the saved ones' architecture, with these changes in the encoder."""
    config, settings = train_config(given), predictor().settings
    overrides = {**settings.vision.overrides, **vision}
    language = replace(settings.language, tokenizer="trained")
    changed = replace(settings, vision=replace(settings.vision, overrides=overrides), language=language)
    return replace(config, model=changed)


def equal_parts(one: TrainedModel, other: TrainedModel) -> set[str]:
    """The parts whose weights are the same to the bit."""
    theirs = dict(other.model.named_parameters())
    same = {name: torch.equal(weight, theirs[name]) for name, weight in one.model.named_parameters()}
    return {part for part in PARTS if all(equal for name, equal in same.items() if name.startswith(f"{part}."))}


def test_each_part_comes_from_its_model(saved: dict[str, Path], tmp_path: Path) -> None:
    a, b = load_model(saved["a"]), load_model(saved["b"])
    found = start(f"init_from.model={saved['a']}", f"init_from.projector={saved['b']}")
    assert equal_parts(found, a) == {"vision", "language"} and equal_parts(found, b) == {"projector"}
    found.save(tmp_path / "mixed")
    recorded = json.loads((tmp_path / "mixed" / "config.json").read_text())
    source = {name: {"model": str(saved[name]), "weights": fingerprint.weights_in(saved[name])} for name in "ab"}
    assert recorded["parts_from"] == {"model": source["a"], "projector": source["b"]}
    assert recorded["started_from"] is None  # no saved model is the base of adapters to these weights
    plain, named = start(f"init_from={saved['a']}"), start(f"init_from.model={saved['a']}")
    assert plain.started_from == named.started_from == source["a"] and equal_parts(plain, named) == set(PARTS)


def test_parts_are_put_into_a_new_model(saved: dict[str, Path]) -> None:
    """With the tokenizer of the language model, which is not the one that the new data would train."""
    b = load_model(saved["b"])
    found = initial_model(with_saved_model(unbuilt(f"init_from={{language: {saved['b']}, vision: {saved['b']}}}")), [])
    assert equal_parts(found, b) == {"vision", "language"}
    assert found.processor.tokenizer.get_vocab() == b.processor.tokenizer.get_vocab()
    assert found.parts_from is not None and found.parts_from.keys() == {"language", "vision"}


@pytest.mark.parametrize(
    ("parts", "times"), [((), 1), (("vision", "language"), 1), (("projector", "vision"), 0), (("model",), 0)]
)
def test_a_new_projector_is_scaled_once(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str], parts: tuple[str, ...], times: int
) -> None:
    """After the parts next to it are loaded, whose outputs the scale depends on; a saved one keeps its scale."""
    sources = ", ".join(f"{part}: {saved['b']}" for part in parts)
    config = unbuilt(f"init_from={{{sources}}}" if parts else "seed=0")
    config = replace(config, model=replace(config.model, projector=ProjectorSettings(scale_to_text=True)))
    config = with_saved_model(config) if parts else config
    tasks: Any = [SimpleNamespace(train=examples())]
    trained, _ = build(Session(config, DistSettings(), None, tasks, BadRecords(), None))  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("projector: output scaled by") == times
    if times:
        model: Any = trained.model.eval()
        documents = [trained.processor.encode(example.with_questions(0, 1), [None]) for example in examples()[:16]]
        batch = trained.processor.collate([[document] for document in documents])
        text = model.language.embed(batch["input_ids"][(batch["image_index"] < 0) & (batch["document"] >= 0)])
        torch.testing.assert_close(model.image_embeddings(batch).std(), text.std(), rtol=1e-3, atol=0)


def test_what_does_not_fit_is_refused(saved: dict[str, Path]) -> None:
    """With the part and the first tensor, also where the saved part is larger."""
    given = f"init_from.vision={saved['a']}"
    for vision, problem in (
        ({"embed_dim": 16}, r"vision\.\S+ is \[.*32.*\] there and \[.*16.*\] in this model"),
        ({"depth": 3}, r"vision\.\S*blocks\.2\.\S+ is missing there and \[.*\] in this model"),
        ({"depth": 1}, r"vision\.\S*blocks\.1\.\S+ is \[.*\] there and missing in this model"),
    ):
        with pytest.raises(InputError, match=f"init_from.vision=.* does not fit: {problem}"):
            initial_model(with_saved_model(unbuilt(given, **vision)), examples())


def test_what_the_command_line_refuses(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'projector'"):
        train_config("init_from.projectr=runs/a")
    with pytest.raises(InputError, match=r"init_from= cannot be set together with init_from\.vision="):
        train_config("init_from=runs/a", "init_from.vision=runs/b")
    (job,) = compose([f"init_from.projector={tmp_path}/none"], "train").jobs
    with pytest.raises(InputError, match=f"no model at {tmp_path}/none"):
        early_checks.refuse_mistakes(job.values, "train")
    with pytest.raises(InputError, match=r"model= cannot be set together with init_from="):
        start(f"init_from.model={saved['a']}", "model=tiny")
    with pytest.raises(InputError, match="a pretrained model has no parts"):
        start(f"init_from.vision={saved['a']}", "model=tiny_paligemma")
