"""Every command of the tasks' pages, of docs/merging.md and of the README about them: drawn files, tiny models."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import merge as merge_script
import prepare as prepare_script
import pytest

import command_line
from tests.conftest import ROOT
from tests.end_to_end import scripts
from tests.end_to_end.scripts import call, done
from tests.end_to_end.test_readme import OTHERS, TINY
from tests.unit.test_docs import commands
from vlmvqa.data import forms, shapes, shapes_captions, shapes_gqa

scripts.JOBS["prepare"] = prepare_script.start
scripts.JOBS["merge"] = lambda: command_line.run(merge_script.main, "merge")
PAGES = [*sorted((ROOT / "docs" / "tasks").glob("*.md")), ROOT / "docs" / "merging.md"]
FEW = {"train_images": 8, "val_images": 6}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages call /data/..., drawn."""
    home = tmp_path_factory.mktemp("home")
    for name, source in (("vqav2", shapes), ("docvqa", forms), ("gqa", shapes_gqa), ("coco", shapes_captions)):
        source.write(home / name, **FEW)
    mine = home / "mine"
    mine.mkdir()
    for split in ("train", "val"):
        picture = next((home / "vqav2" / f"{split}2014").iterdir())
        line = f'{{"image": "{picture}", "question": "What is it?", "answers": ["a cat", "cat"]}}\n'
        (mine / f"{split}.jsonl").write_text(line)
    return home


def run(command: str, home: Path) -> None:
    script, *arguments = shlex.split(re.sub(r"/data/(\w+)", rf"{home}/\1", command))
    name = Path(script).stem
    if name == "train":
        drawn = {word.partition("synthetic")[0] for word in arguments if "synthetic=true" in word}
        drawn |= {"data."} if "data=shapes" in arguments else set()
        arguments += [f"{data}options={{train_images:8,val_images:6}}" for data in drawn]
        # With the settings of its model; or of classes that have others, and are tiny by themselves.
        saved = any(word.startswith(("start_from=", "model=tiny_")) for word in arguments)
        tiny = [word for word in TINY if "dataloader" not in word and not (saved and word.startswith("model."))]
        arguments += [*tiny, "trainer.eval_strategy=no", "trainer.report_to=none", "run.overwrite=true"]
    elif any("synthetic=true" in word for word in arguments):
        arguments += ["data.options={train_images:8,val_images:6}"]
    if name == "eval":
        arguments += ["run.overwrite=true"]
    done(call(name, *arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_tasks_page(page: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for command in commands(page):
        run(command.removeprefix("python "), home)


def test_the_readmes_commands_of_other_tasks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for command in OTHERS:
        run(command, home)
