"""The wheel and the source distribution, installed where no checkout is: train, ask, look at the config."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.scripts import MODEL
from vlmvqa import __version__

NEEDED = ("src", "launch", "conf", "evaluation", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
LEFT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
SMALL = (
    *MODEL,
    *("trainer.max_steps=2", "trainer.per_device_train_batch_size=4", "trainer.report_to=none", "trainer.use_cpu=true"),
    *("trainer.eval_strategy=no", "decoding.max_new_tokens=4"),
    *("data.options.train_images=8", "data.options.val_images=3", "data.options.questions_per_image=2"),
)


pytestmark = pytest.mark.long


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, in an environment that knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ with a source distribution and the wheel made of it; direct/ with the wheel made of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT)
        else:
            shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--wheel", "--outdir", folder / "direct", source, cwd=folder)
    run(*build, "--outdir", folder / "dist", source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ folder of an environment that holds the wheel, and borrows what it depends on from this one."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (wheel,) = (built / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    run(*pip, "--no-index", "--no-deps", wheel, cwd=folder)
    # After it, so that pip does not take our own development install, whose .pth file is not read there, for it.
    here = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (here / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/RECORD")}


def test_the_source_distribution_builds_the_same_wheel_and_holds_all(built: Path) -> None:
    (first,), (second,) = (list((built / name).glob("*.whl")) for name in ("direct", "dist"))
    assert members(first) == members(second)
    names = set(members(first))
    for folder in ("conf", "launch"):
        there = {f"vlmvqa/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"}
        assert there <= names
    assert {name.partition("/")[0] for name in names} == {"vlmvqa", f"vlmvqa-{__version__}.dist-info"}
    assert {
        "vlmvqa/py.typed",
        "vlmvqa/extras/report/report.html.j2",
        *(f"vlmvqa/extras/serving/page.{kind}" for kind in ("css", "html", "js")),
        "vlmvqa/evaluation/helm/schema_vqav2_bleu.yaml",
    } <= names
    (archive,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert all(name.startswith(f"vlmvqa-{__version__}/") for name in file.getnames() if "/" in name)


def test_its_metadata_is_whole(built: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    found = email.message_from_string(members(wheel)[f"vlmvqa-{__version__}.dist-info/METADATA"].decode())
    assert (found["Name"], found["Version"], found["License"]) == ("vlmvqa", __version__, "Apache-2.0")
    assert found["Description-Content-Type"] == "text/markdown"
    assert str(found.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_it_trains_and_answers_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """By the command; then `vlmvqa.load` on what it left, and a look that this is not the checkout's code."""
    command = installed / "vlmvqa"
    assert "  train     Train a model, score it and write a report\n" in run(command, cwd=tmp_path)
    assert "model=dinov2_gemma2_2b" in run(command, "train", "-h", cwd=tmp_path)
    assert "vit_base_patch14_dinov2.lvd142m" in run(command, "show", "--cfg", "job", cwd=tmp_path)
    said = run(command, "train", "run.name=first", *SMALL, cwd=tmp_path)
    assert "model:  runs/first/model" in said
    picture = next((tmp_path / "data" / "shapes" / "val2014").iterdir())
    asked = ["checkpoint=runs/first", f"image={picture}", "question=how many?", "question=which color?"]
    assert run(command, "predict", *asked, cwd=tmp_path).startswith(f"{picture}\n  how many?  ")
    program = (
        "import vlmvqa, sys; print(vlmvqa.__file__); "
        f"print(type(vlmvqa.load('runs/first').answer({str(picture)!r}, 'how many?')).__name__)"
    )
    where, kind = run(installed / "python", "-c", program, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent) and kind == "Answer"
    assert "HELM's score" in run(command, "helm", "-h", cwd=tmp_path)
