"""`start_from=` and `launch/merge.py`: a model trained on for two tasks, and both made one."""

from __future__ import annotations

import json
from pathlib import Path

import merge as merge_script
import pytest
import torch
from safetensors.torch import load_file

import command_line
from tests.end_to_end import scripts
from tests.end_to_end.scripts import MODEL, SHAPES, SMALL, call, done, metrics, sentence

scripts.JOBS["merge"] = lambda: command_line.run(merge_script.main, "merge")
ON = tuple(argument for argument in SMALL if argument not in MODEL)  # the model's own settings come with it
FEW = ("data.options.train_images=8", "data.options.val_images=6")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two models that were trained on from it, on other tasks."""
    home = tmp_path_factory.mktemp("merging")
    done(call("train", *SMALL, *SHAPES, f"data.root={home / 'shapes'}", f"run.dir={home / 'base'}"))
    for name in ("gqa", "docvqa"):
        data = (f"data={name}", "data.synthetic=true", f"data.root={home / (name + '-data')}", *FEW)
        done(call("train", f"start_from={home / 'base'}", *data, *ON, f"run.dir={home / name}"))
    return home


def merged(home: Path, *arguments: str) -> dict[str, torch.Tensor]:
    models = f"models=[{home / 'gqa'},{home / 'docvqa'}]"
    done(call("merge", f"base={home / 'base'}", models, f"output={home / 'merged'}", "run.overwrite=true", *arguments))
    found: dict[str, torch.Tensor] = load_file(home / "merged" / "model.safetensors")
    return found


def test_a_model_is_trained_on_from_where_it_was_saved(home: Path) -> None:
    base = json.loads((home / "base" / "model" / "config.json").read_text())
    on = json.loads((home / "gqa" / "model" / "config.json").read_text())
    assert on["model"] == base["model"] and on["started_from"]["model"] == str(home / "base" / "model")
    assert set(on["prompts"]) == {"shapes", "gqa"}
    one, other = (load_file(home / name / "model" / "model.safetensors") for name in ("base", "gqa"))
    moved = [float((other[name] - one[name]).abs().max()) for name in one]
    assert 0 < max(moved) < 0.05  # two steps away, not anew


def test_what_start_from_refuses(home: Path, tmp_path: Path) -> None:
    given = ("train", f"run.dir={tmp_path / 'run'}", f"data.root={home / 'shapes'}", *SHAPES, *ON)
    said = sentence(call(*given, f"start_from={home / 'base'}", "model.mode=causal"))
    assert "model.mode cannot be set here: the model of start_from is as it was saved" in said
    assert "no such folder" in sentence(call(*given, f"start_from={home / 'no' / 'where'}"))


def test_two_tasks_become_one_model(home: Path) -> None:
    ended = merged(home, "method=ties", "density=0.5")
    models = f"models=[{home / 'gqa'},{home / 'docvqa'}]"
    told = done(call("merge", f"base={home / 'base'}", models, f"output={home / 'again'}", "density=0.5"))
    assert "sign conflicts" in told.out and f"model: {home / 'again'}" in told.out
    record = json.loads((home / "again" / "merge.json").read_text())
    assert record["method"] == "ties" and set(record["parts"]) == {"vision", "projector", "language"}
    assert all(
        torch.equal(value, ended[name]) for name, value in load_file(home / "again" / "model.safetensors").items()
    )
    config = json.loads((home / "again" / "config.json").read_text())
    assert set(config["prompts"]) == {"shapes", "gqa", "docvqa"}  # each task is asked as in its training
    assert config["prompts"]["docvqa"] == "{question}\n"
    data = ("data=gqa", "data.synthetic=true", f"data.root={home / 'gqa-data'}", *FEW, "split=val")
    done(call("eval", f"checkpoint={home / 'again'}", *data, f"run.dir={home / 'scored'}"))
    assert metrics(home / "scored")["n"] > 0


def test_what_merging_refuses(home: Path, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        return sentence(call("merge", f"output={tmp_path / 'out'}", *arguments))

    both = f"models=[{home / 'gqa'},{home / 'docvqa'}]"
    assert "base=... must be given" in refused(both)
    assert f"was trained on from {home / 'base' / 'model'}, not from" in refused(f"base={home / 'gqa'}", both)
    assert "did you mean 'density'" in refused(f"base={home / 'base'}", both, "densty=0.3")
    assert "no such folder" in refused(f"base={home / 'base'}", f"models=[{home / 'gqa'},{home}/no/where]")
    onto = f"output={home / 'gqa' / 'model'}"
    assert "is one of the models that are merged" in sentence(call("merge", f"base={home / 'base'}", both, onto))
    assert "models=a should be a list" in refused(f"base={home / 'base'}", "models=a")
    assert "'^visoin' is found in no tensor's name" in refused(
        f"base={home / 'base'}", both, "layers={'^visoin': [1,0]}"
    )
    merged(home, "layers={'^vision': [1,0]}")
    again = sentence(call("merge", f"base={home / 'base'}", both, f"output={home / 'merged'}"))
    assert "is there already; choose another, or set run.overwrite=true" in again
    assert not (tmp_path / "out").exists()
