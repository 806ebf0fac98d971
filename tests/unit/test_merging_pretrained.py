"""Merging full pretrained models, as published (older names, sharded) or as trained here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests import pretrained
from vlmvqa import fingerprint
from vlmvqa.errors import InputError
from vlmvqa.extras.merging.merge import Merge
from vlmvqa.extras.merging.settings import MergeSettings
from vlmvqa.inference.predictor import load

FAMILIES = ("paligemma", "idefics2")


def tuned(base: Path, folder: Path, seed: int, **more: Any) -> Path:
    """Save a copy of the base with noise added to each weight, as if fine-tuned here."""
    predictor = load(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in predictor.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    predictor.prompts = {f"task{seed}": f"{seed} {{question}}\n"}
    predictor.prompt = predictor.prompts[f"task{seed}"]
    predictor.started_from = {"model": str(base), "weights": fingerprint.weights_in(base)}
    for name, value in more.items():
        setattr(predictor, name, value)
    predictor.save(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base as published, sharded, and two models fine-tuned from it."""
    root = tmp_path_factory.mktemp(request.param)
    base = pretrained.save(request.param, root / "base")
    net = AutoModelForImageTextToText.from_pretrained(base)
    (base / "model.safetensors").unlink()
    net.save_pretrained(base, max_shard_size="200KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    return {"base": base, "a": tuned(base, root / "a", 1), "b": tuned(base, root / "b", 2)}


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())


def test_it_is_what_the_tensors_say(saved: dict[str, Path], tmp_path: Path) -> None:
    """Independent of the names in the files."""
    base, one, two = (weights(saved[name]) for name in ("base", "a", "b"))
    Merge(None, [saved["a"], saved["b"]], MergeSettings("linear", weights=(1, 3))).run(tmp_path / "linear")
    found = weights(tmp_path / "linear")
    assert found.keys() == base.keys()
    assert all(torch.allclose(found[name], (one[name] + 3 * two[name]) / 4, atol=1e-6) for name in base)
    merging = Merge(saved["base"], [saved["a"], saved["b"]], MergeSettings("task_arithmetic", scale=0.5))
    merging.run(tmp_path / "sum")
    found = weights(tmp_path / "sum")
    for name, value in base.items():
        assert torch.allclose(found[name], value + 0.5 * (one[name] + two[name] - 2 * value), atol=1e-6)
    assert set(merging.statistics) == {"vision", "projector", "language"}


def test_what_is_loaded(saved: dict[str, Path], tmp_path: Path) -> None:
    """We load it with both tasks' prompts, transformers under the names of the base's files."""
    Merge(saved["base"], [saved["a"], saved["b"]], MergeSettings()).run(tmp_path)
    merged = load(tmp_path)
    assert merged.prompts == {"task1": "1 {question}\n", "task2": "2 {question}\n"}
    assert len(merged.answer_examples(pretrained.examples())) == 7
    assert merged.started_from == {"model": str(saved["base"]), "weights": fingerprint.weights_in(saved["base"])}
    places = json.loads((saved["base"] / "model.safetensors.index.json").read_text())["weight_map"]
    assert load_file(tmp_path / "model.safetensors").keys() == places.keys()
    assert not (tmp_path / "model.safetensors.index.json").exists()
    again = Merge(saved["base"], [tmp_path, saved["a"]], MergeSettings())  # it knows its base
    assert again.config["vlmvqa"]["prompts"] == merged.prompts


def test_weights_of_a_pattern_are_of_paths(saved: dict[str, Path], tmp_path: Path) -> None:
    settings = MergeSettings("linear", weights=(0, 1), layers={r"^vision\.": (1, 0)})
    Merge(None, [saved["a"], saved["b"]], settings).run(tmp_path)
    one, two, found = weights(saved["a"]), weights(saved["b"]), weights(tmp_path)
    seen = [name for name in found if "vision" in name]
    assert seen and all(torch.equal(found[name], (one if name in seen else two)[name]) for name in found)


def test_what_does_not_fit(saved: dict[str, Path], tmp_path: Path) -> None:
    other = pretrained.save("idefics2" if "paligemma" in str(saved["base"]) else "paligemma", tmp_path / "other")
    with pytest.raises(InputError, match=r"don't have the same base|differ in"):
        Merge(saved["base"], [saved["a"], other], MergeSettings())
    elsewhere = tuned(saved["base"], tmp_path / "c", 3, started_from={"model": "x/y", "weights": "0"})
    with pytest.raises(InputError, match=r"c was trained from x/y, not .*/base; set that as base"):
        Merge(saved["base"], [saved["a"], elsewhere], MergeSettings())
    asked = tuned(saved["base"], tmp_path / "d", 3, prompts={"task1": "other {question}\n"})
    with pytest.raises(InputError, match=r"d has the prompt 'other .* for task1, another model"):
        Merge(saved["base"], [saved["a"], asked], MergeSettings())


def test_other_words_or_pixels(saved: dict[str, Path], tmp_path: Path) -> None:
    words = shutil.copytree(saved["b"], tmp_path / "words")
    read = json.loads((words / "tokenizer.json").read_text())
    vocabulary = read["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (words / "tokenizer.json").write_text(json.dumps(read))
    with pytest.raises(
        InputError, match=r"words and .*base differ in their tokenizers; merge models fine-tuned from the same base"
    ):
        Merge(saved["base"], [saved["a"], words], MergeSettings())
    pixels = shutil.copytree(saved["b"], tmp_path / "pixels")
    path = pixels / "processor_config.json"
    read = json.loads(path.read_text())
    read["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(read))
    with pytest.raises(InputError, match=r"pixels and .*/a differ in image_mean of their image processors"):
        Merge(saved["base"], [saved["a"], pixels], MergeSettings())
