"""The public API is what docs/api.md says, its examples run, and importing it is cheap."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import vlmvqa
from tests.conftest import ROOT
from tests.unit.test_predictor import predictor

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `(\w+)(?:\((.*?)\))?(?: -> .*)?`$", PAGE, re.MULTILINE)
HEAVY = ("torch", "transformers", "timm", "deepspeed", "helm", "fastapi", "peft", "bitsandbytes", "wandb", "mlflow")
TRAINS = ("transformers.trainer", "peft", "bitsandbytes")
OPTIONAL = ("deepspeed", "helm", "fastapi", "mlflow", *TRAINS)  # timm imports wandb itself, where it is installed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture and a run's folder, as the page's examples want them."""
    home = tmp_path_factory.mktemp("home")
    predictor().save(home / "runs" / "demo" / "model")
    Image.new("RGB", (40, 30), "red").save(home / "photo.jpg")
    return home


def test_the_page_lists_what_is_public() -> None:
    assert sorted(name for name, _ in HEADINGS) == sorted(vlmvqa.__all__)
    assert set(vlmvqa.__all__) <= set(dir(vlmvqa))
    with pytest.raises(AttributeError, match="module 'vlmvqa' has no attribute 'lod'"):
        vlmvqa.lod  # noqa: B018


@pytest.mark.parametrize(("name", "arguments"), [one for one in HEADINGS if one[1]])
def test_the_page_has_the_arguments_of_each(name: str, arguments: str) -> None:
    taken = inspect.signature(getattr(vlmvqa, name)).parameters.values()
    written = [one.split("=")[0].split(":")[0].strip() for one in re.split(r", (?![^\[]*\])", arguments)]
    assert written == [one.name for one in taken]
    for one, text in zip(taken, re.split(r", (?![^\[]*\])", arguments), strict=True):
        default = text.partition("=")[2].strip()
        assert (default != "") == (one.default is not inspect.Parameter.empty), text
        if default and one.default is not None:
            assert default.strip('"') == str(one.default), text


def test_the_pages_examples_run_in_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    known: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), known)
    assert len(examples) >= 7 and isinstance(known["answer"], vlmvqa.Answer)
    assert Image.open(home / "heat.png").size == (40, 30)


def test_a_folder_of_the_users_home_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    assert vlmvqa.load("~/runs/demo").prompt == "{question}\n"


@pytest.mark.slow
def test_importing_is_cheap() -> None:
    """The package imports nothing heavy; what answers questions, nothing that answering does not need."""
    program = f"""
import sys
import vlmvqa, vlmvqa.metrics
print(*(name for name in {HEAVY} if name in sys.modules))
sys.path.insert(0, "{ROOT / "launch"}")
import vlmvqa.inference.predictor, predict, eval, serve, show, prepare
print(*(name for name in {OPTIONAL} if name in sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("\n\n", "")
