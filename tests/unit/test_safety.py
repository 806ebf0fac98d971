"""No file from a user's folder or the Hub runs code: pickles are not read, custom model code is not imported."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vlmvqa
from tests import pretrained, tiny
from tests.conftest import ROOT
from tests.unit.test_predictor import predictor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.pretrained.build import build_pretrained, pretrained_config
from vlmvqa.extras.pretrained.hf_processor import load_processor
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.hub import load_tokenizer
from vlmvqa.models.build import build_language_model, build_vision_encoder, language_config
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.training import checkpoint_loading

FILES = sorted(path for folder in ("src", "launch", "evaluation", "bench") for path in (ROOT / folder).rglob("*.py"))
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")

# --- source code ---------------------------------------------------------------------------------------


def dangers(code: str) -> Iterator[str]:
    """Yield the constructs in a file that could execute the data they read."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from (f"import {name}" for name in named if name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not is_false(value):
                    yield "trust_remote_code"
        elif isinstance(node, ast.Call):
            yield from call_dangers(node)


def call_dangers(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {each.arg: each.value for each in call.keywords if each.arg}
    spread = {ast.unparse(each.value) for each in call.keywords if each.arg is None}
    if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    if name == "torch.load" and not is_true(given.get("weights_only")):
        yield "torch.load without weights_only=True"
    for option in ("shell", "allow_pickle", "trust_remote_code"):
        if option in given and not is_false(given[option]):
            yield option
    if name.endswith(".from_pretrained"):
        wanted = {"SAFE_WEIGHTS"} if "Model" in name else {"OWN_CODE", "SAFE_WEIGHTS"}
        if not spread & wanted:
            yield f"{name} without {' or '.join(sorted(wanted))}"


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_source_file_has_a_danger() -> None:
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text(encoding="utf-8"))) for path in FILES}
    assert len(FILES) > 80
    assert {path: each for path, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, yaml.Loader)",
        "AutoConfig.from_pretrained(name)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True, **OWN_CODE)",
        "AutoModelForCausalLM.from_pretrained(name, **OWN_CODE)",
        "{'trust_remote_code': True}",
    ],
)
def test_each_danger_is_detected(code: str) -> None:
    assert list(dangers(code))


# --- loading -------------------------------------------------------------------------------------------


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that executed code would create; it must not exist after the test."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def plant(file: Path, marker: Path) -> Path:
    torch.save({"weight": Bomb(marker)}, file)
    return file


def test_the_bomb_creates_the_file(tmp_path: Path) -> None:
    torch.load(plant(tmp_path / "x.bin", tmp_path / "it-ran"), weights_only=False)
    assert (tmp_path / "it-ran").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained.save("paligemma", tmp_path_factory.mktemp("published"))


@pytest.fixture
def folder(tmp_path: Path, published: Path) -> Path:
    """A copy of the pretrained model to modify."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def test_pickled_weights_of_a_pretrained_model_are_not_read(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin", marker)
    settings = PretrainedSettings(str(folder))
    with pytest.raises(InputError, match=r"has no .safetensors, and pickled weights, .* are never read"):
        build_pretrained(settings, pretrained_config(settings))
    with pytest.raises(InputError, match="pickled weights"):
        vlmvqa.load(folder)


def test_pickled_weights_of_a_language_model_are_not_read(tmp_path: Path, marker: Path) -> None:
    language_config(LanguageSettings("llama", "random", tiny.FAMILIES["llama"])).save_pretrained(tmp_path)
    plant(tmp_path / "pytorch_model.bin", marker)
    with pytest.raises(InputError, match=r"model.language.name=.* has no .safetensors"):
        build_language_model(LanguageSettings(str(tmp_path)))


@pytest.mark.parametrize("name", ["x.bin", "x.pth", "x.safetensors"])
def test_pickled_weights_of_an_encoder_are_not_read(name: str, tmp_path: Path, marker: Path) -> None:
    """Nor with another file suffix."""
    said = "cannot be read" if name == "x.safetensors" else "is no .safetensors, and pickled weights"
    with pytest.raises(InputError, match=said):
        build_vision_encoder(VisionSettings("test_vit", 32, weights=str(plant(tmp_path / name, marker))))


def test_pickled_adapters_are_not_read(tmp_path: Path, marker: Path) -> None:
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        plant(tmp_path / name, marker)
        with pytest.raises(InputError, match=r"adapter_model.safetensors cannot be read"):
            peft_adapters.load(tmp_path, tiny.model())


def test_a_model_of_ours_is_not_read_from_a_pickle(tmp_path: Path, marker: Path) -> None:
    predictor().save(tmp_path / "model")
    plant(tmp_path / "model" / "model.safetensors", marker)
    with pytest.raises(InputError, match="does not hold this model's weights"):
        vlmvqa.load(tmp_path / "model")


def test_resuming_a_checkpoint_runs_no_code(tmp_path: Path, marker: Path) -> None:
    """Weights and optimizer state are .safetensors; only numbers are read from the other files."""
    plant(tmp_path / "scheduler.pt", marker)
    trainer: Any = SimpleNamespace(lr_scheduler=None)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint_loading._load_schedule(trainer, tmp_path)


def own_code(folder: Path, file: str, entry: dict[str, str], marker: Path, **more: str) -> None:
    """Make a file in a model's folder refer to code in the same folder."""
    path = folder / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **more, "auto_map": entry}))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Own: pass\n")


def test_a_model_with_a_custom_class_is_refused_without_a_prompt(folder: Path, marker: Path) -> None:
    """By default transformers waits for input at the terminal."""
    own_code(folder, "config.json", {"AutoConfig": "own.Own"}, marker, model_type="own")
    said = "requires running its own code, which is never done"
    with pytest.raises(InputError, match=said):
        language_config(LanguageSettings(str(folder)))
    with pytest.raises(InputError, match=said):
        pretrained_config(PretrainedSettings(str(folder)))
    with pytest.raises(InputError, match=said):
        vlmvqa.load(folder)


def test_custom_code_of_a_known_model_class_is_ignored(folder: Path, marker: Path) -> None:
    entry = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}
    own_code(folder, "config.json", entry, marker)
    assert vlmvqa.load(folder).model is not None


def test_custom_code_of_a_processor_or_tokenizer_is_not_run(folder: Path, marker: Path) -> None:
    """transformers' own class is used if there is one; otherwise loading fails."""
    own_code(folder, "processor_config.json", {"AutoProcessor": "own.Own"}, marker)
    own_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}, marker)  # type: ignore[dict-item]
    load_processor(str(folder))
    load_tokenizer(str(folder))
    own_code(folder, "processor_config.json", {"AutoProcessor": "own.Own"}, marker, processor_class="Own")
    with pytest.raises(InputError, match=r"the processor of .* requires running its own code"):
        load_processor(str(folder))


def test_a_tokenizer_with_a_custom_class_is_refused(tmp_path: Path, marker: Path) -> None:
    train_tokenizer(pretrained.examples(), 400).save_pretrained(tmp_path)
    entry: Any = {"AutoTokenizer": ["own.Own", "own.Own"]}
    own_code(tmp_path, "tokenizer_config.json", entry, marker, tokenizer_class="Own")
    with pytest.raises(InputError, match=r"the tokenizer of .* requires running its own code"):
        load_tokenizer(str(tmp_path))


def test_safe_weights_are_read(tmp_path: Path) -> None:
    encoder = build_vision_encoder(VisionSettings("test_vit", 32, weights="random"))
    save_file(encoder.encoder.state_dict(), tmp_path / "x.safetensors")
    again = build_vision_encoder(VisionSettings("test_vit", 32, weights=str(tmp_path / "x.safetensors")))
    assert torch.equal(again.encoder.norm.weight, encoder.encoder.norm.weight)
