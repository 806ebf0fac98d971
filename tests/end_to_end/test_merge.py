"""`init_from=` and `launch/merge.py`: a model fine-tuned on two tasks, and both merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.scripts import MODEL, SHAPES, SMALL, call, done, metrics, sentence

ON = tuple(argument for argument in SMALL if argument not in MODEL)  # init_from brings the model's settings
FEW = ("data.options.train_images=8", "data.options.val_images=6")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two models fine-tuned from it on other tasks."""
    home = tmp_path_factory.mktemp("merging")
    done(call("train", *SMALL, *SHAPES, f"data.root={home / 'shapes'}", f"run.dir={home / 'base'}"))
    for name in ("gqa", "docvqa"):
        data = (f"data={name}", "data.synthetic=true", f"data.root={home / (name + '-data')}", *FEW)
        done(call("train", f"init_from={home / 'base'}", *data, *ON, f"run.dir={home / name}"))
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
    assert 0 < max(moved) < 0.05  # two steps from the base, not a new model


def test_what_start_from_refuses(home: Path, tmp_path: Path) -> None:
    given = ("train", f"run.dir={tmp_path / 'run'}", f"data.root={home / 'shapes'}", *SHAPES, *ON)
    said = sentence(call(*given, f"init_from={home / 'base'}", "model.attention_pattern=causal"))
    assert "model.attention_pattern cannot be set here: the model of init_from is as it was saved" in said
    nowhere = home / "no" / "where"
    assert f"no model at {nowhere}; the nearest is {home};" in sentence(call(*given, f"init_from={nowhere}"))


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
    assert set(config["prompts"]) == {"shapes", "gqa", "docvqa"}  # each task keeps its training prompt
    assert config["prompts"]["docvqa"] == "{question}\n"
    data = ("data=gqa", "data.synthetic=true", f"data.root={home / 'gqa-data'}", *FEW, "split=val")
    done(call("eval", f"checkpoint={home / 'again'}", *data, f"run.dir={home / 'scored'}"))
    assert metrics(home / "scored")["n"] > 0


def test_what_merging_refuses(home: Path, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        return sentence(call("merge", f"output={tmp_path / 'out'}", *arguments))

    both = f"models=[{home / 'gqa'},{home / 'docvqa'}]"
    assert "base=... must be set" in refused(both)
    assert f"was trained from {home / 'base' / 'model'}, not" in refused(f"base={home / 'gqa'}", both)
    assert "did you mean 'density=0.3'" in refused(f"base={home / 'base'}", both, "densty=0.3")
    assert "no model at" in refused(f"base={home / 'base'}", f"models=[{home / 'gqa'},{home}/no/where]")
    onto = f"output={home / 'gqa' / 'model'}"
    assert "is one of the models that are merged" in sentence(call("merge", f"base={home / 'base'}", both, onto))
    assert "models=a should be a list" in refused(f"base={home / 'base'}", "models=a")
    assert "'^visoin' matches no tensor name" in refused(f"base={home / 'base'}", both, "layers={'^visoin': [1,0]}")
    merged(home, "layers={'^vision': [1,0]}")
    again = sentence(call("merge", f"base={home / 'base'}", both, f"output={home / 'merged'}"))
    assert "already exists; choose another, or set run.overwrite=true" in again
    assert not (tmp_path / "out").exists()


def test_the_base_of_a_mean_is_the_one_that_is_named(home: Path, tmp_path: Path) -> None:
    """Statistics are computed relative to it, and it is scored."""
    models = f"models=[{home / 'gqa'},{home / 'docvqa'}]"
    data = ("data=gqa", "data.synthetic=true", f"data.root={home / 'gqa-data'}", *FEW, "data.eval_split=val")
    base = f"base={home / 'base'}"
    told = done(call("merge", base, models, "method=linear", *data, "samples=2", f"output={tmp_path / 'told'}"))
    assert "sign conflicts" in told.out
    record = json.loads((tmp_path / "told" / "merge.json").read_text())
    assert set(record["parts"]) == {"vision", "projector", "language"}
    assert record["base"] == str(home / "base" / "model") and str(home / "base") in record["scores"]["gqa"]["scores"]
    assert not {"density", "scale", "trim", "seed"} & set(record)
    done(call("merge", models, "method=linear", f"output={tmp_path / 'untold'}"))
    record = json.loads((tmp_path / "untold" / "merge.json").read_text())
    assert record["base"] is None and record["parts"] == {}


@pytest.fixture(scope="module")
def lora(home: Path) -> Path:
    """Two adapters of the base on other tasks, one of them over 4 bits."""
    for package in ("peft", "bitsandbytes"):
        pytest.importorskip(package, reason=f"{package} is an extra: pip install 'vlmvqa[adapters]'")
    for name, kind in (("gqa", "lora"), ("docvqa", "qlora")):
        data = (f"data={name}", "data.synthetic=true", f"data.root={home / (name + '-data')}", *FEW)
        more = (f"adapt={kind}", "adapt.compute_dtype=float32", "data.eval_split=val", f"run.dir={home / kind}")
        done(call("train", f"init_from={home / 'base'}", *data, *ON, *more))
    return home


def test_adapters_become_one_model_scored_on_both_tasks(lora: Path) -> None:
    models = f"models=[{lora / 'lora'},{lora / 'qlora'}]"
    told = done(call("merge", models, "density=0.5", "samples=4", f"output={lora / 'both'}")).out
    assert (
        "qlora/model was trained over 4-bit weights: the merged model uses the full-precision weights; the logits drift"
        in told
    )
    assert "gqa: GQA accuracy (%), n=4" in told and "docvqa: ANLS (x 100), n=4" in told
    record = json.loads((lora / "both" / "merge.json").read_text())
    assert record["base"] == str(lora / "base" / "model") and len(record["over_four_bits"]) == 1
    scored = record["scores"]["docvqa"]["scores"]
    dtypes = record["scores"]["docvqa"]["dtype"]
    assert dtypes.keys() == scored.keys() and dtypes[str(lora / "lora")] == "bfloat16"
    assert len(scored) == 4 and all(value is not None for value in scored.values())  # base, two models, their merge
    config = json.loads((lora / "both" / "config.json").read_text())
    assert set(config["prompts"]) == {"shapes", "gqa", "docvqa"} and "adapter" not in config


@pytest.mark.slow
def test_an_adapter_becomes_a_whole_model(lora: Path, tmp_path: Path) -> None:
    """Compared on the evaluation data of its run, on data=, or not at all."""
    for number, (kind, into) in enumerate((("lora", "full"), ("qlora", "dequantized"))):
        folder = tmp_path / str(number)
        told = done(call("merge", f"adapter={lora / kind}", f"into={into}", f"output={folder}")).out
        assert "largest logit difference, adapter over its base" in told and "of 16 questions" in told
        rows = {line.split()[0]: line.split() for line in told.splitlines() if kind in line and "%" in line}
        assert rows["vision"][3] == "-" and rows["language"][3] == "100.0%"
        found = json.loads((folder / "merge.json").read_text())["drift"]
        assert found["largest"] < 0.02 * found["range"]  # the adapter's frozen weights may be bfloat16
    moved = f"adapter={shutil.copytree(lora / 'lora' / 'model', tmp_path / 'moved')}"
    told = done(call("merge", moved, f"output={tmp_path / 'untold'}")).out
    assert "nothing was compared:" in told and "whose config.yaml has its evaluation data; give data=" in told
    data = ("data=gqa", "data.synthetic=true", f"data.root={lora / 'gqa-data'}", *FEW, "data.eval_split=val")
    told = done(call("merge", moved, *data, "samples=3", f"output={tmp_path / 'told'}")).out
    assert "of 3 questions" in told


def test_what_adapters_refuse(lora: Path, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        return sentence(call("merge", f"output={tmp_path / 'out'}", *arguments))

    one = f"adapter={lora / 'lora'}"
    assert "density cannot be set here: it is for several models" in refused(one, "density=0.2")
    for more in ((), (f"base={lora / 'base'}",)):
        said = refused(f"adapter={lora / 'gqa'}", *more)
        assert f"adapter={lora / 'gqa'} is a complete model, not an adapter; name the run of an adapter" in said
    assert "into=4 is unknown; use full" in refused(one, "into=4")
    assert "into=dequantized: not all models are adapters over" in refused(one, "into=dequantized")
    assert "remove base= to use its own" in refused(one, f"base={lora / 'gqa'}")
    assert not (tmp_path / "out").exists()
