"""Each recipe of conf/experiment on a tiny model of its family: trained, saved, published, scored, gone on with."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import vlmvqa
from tests import forks, pretrained
from tests.end_to_end.scripts import call, content, done, losses, metrics, predictions, sentence
from tests.unit.test_clip import folder as clip  # noqa: F401
from vlmvqa.config.inference_schema import Expected
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2

pytest.importorskip("peft", reason="peft is an extra: pip install 'vlmvqa[adapters]'")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: pip install 'vlmvqa[adapters]'")

FAMILIES = {"paligemma_qlora_docvqa": "paligemma", "idefics2_qlora_docvqa": "idefics2"}  # one of each
OTHERS = (
    *(f"paligemma_{name}" for name in ("qlora_vqav2_10pct", "lora_docvqa", "qlora_coco", "qlora_gqa", "qlora_vqav2")),
    "paligemma_transfer",
)
RECIPES = FAMILIES | dict.fromkeys(OTHERS, "paligemma")
BESIDE = {"idefics2_qlora_docvqa": {"cider", "bleu_1", "bleu_4", "rouge_l", "clip_similarity"}}
SMALL = ("data.options.val_images=4", "decoding.max_new_tokens=4", "trainer.use_cpu=true")


def tier(recipe: str) -> pytest.MarkDecorator:
    """One recipe more of each kind in CI."""
    return pytest.mark.slow if recipe in ("idefics2_qlora_docvqa", "paligemma_transfer") else pytest.mark.long


def arguments(recipe: str, home: Path, clip: Path) -> list[str]:  # noqa: F811
    given = [f"experiment={recipe}", f"smoke={RECIPES[recipe]}", f"data.root={home / 'data'}", *SMALL]
    if recipe in BESIDE:
        given.append(f"data.extra_metrics.clip_similarity={{model:{clip}}}")
    return given


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=() if name == "paligemma_qlora_docvqa" else tier(name)) for name in RECIPES],
)
def test_a_recipe_runs(recipe: str, tmp_path: Path, clip: Path) -> None:  # noqa: F811
    """Trained, published, and the published folder alone scores what the run scored."""
    run, published = tmp_path / "run", tmp_path / "published"
    given = arguments(recipe, tmp_path, clip)
    printed = done(call("train", *given, f"run.dir={run}", f"hub_id={published}")).out
    found = metrics(run)
    assert sorted(losses(run)) == [1, 2, 3, 4] and f"hub:    {published}" in printed
    assert set(found["metrics"]) >= {found["metric"], *BESIDE.get(recipe, ())}
    adapted = recipe != "paligemma_transfer"
    assert (run / "model" / "adapter_model.safetensors").exists() == adapted
    if adapted:
        weights = load_file(run / "model" / "adapter_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        shutil.rmtree(run / "base")  # what is published needs nothing else of the run
    before = content(published)
    again = call("train", *given, f"run.dir={tmp_path / 'other'}", f"hub_id={published}")
    assert "exists already and is never overwritten" in sentence(again)
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    scored = [
        f"data={data['source']}",
        f"data.root={data['root']}",
        "data.synthetic=true",
        f"split={data['eval_split']}",
    ]
    scored += ["data.options={train_images:120,val_images:4}", f"run.dir={tmp_path / 'scored'}"]
    done(call("eval", f"checkpoint={published}", *scored))
    assert metrics(tmp_path / "scored")["metrics"][found["metric"]] == found["metrics"][found["metric"]]
    assert [one["answer"] for one in predictions(tmp_path / "scored")] == [one["answer"] for one in predictions(run)]
    assert content(published) == before and (published / "README.md").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("paligemma_qlora_docvqa", marks=pytest.mark.slow),
        pytest.param("idefics2_qlora_docvqa", marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed_is_never_stopped(recipe: str, tmp_path: Path, clip: Path) -> None:  # noqa: F811
    """A run as a kill leaves it after its first checkpoint; the rest of it is the same to the last digit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = [*arguments(recipe, tmp_path, clip), "trainer.save_total_limit=2", "trainer.eval_strategy=no"]
    done(call("train", *given, f"run.dir={whole}"))
    shutil.copytree(whole, parts, symlinks=True)
    for folder in ("checkpoint-4", "model"):
        shutil.rmtree(parts / folder)
    (parts / "metrics.json").unlink()
    done(call("train", *given, f"run.dir={parts}", "resume=auto"))
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    ours, theirs = (load_file(run / "model" / "adapter_model.safetensors") for run in (parts, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert predictions(parts) == predictions(whole)


@pytest.mark.slow
def test_weights_and_biases_has_the_run(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Offline, as without a network: name, folder and configuration are the run's, resumed or not."""
    wandb = pytest.importorskip("wandb", reason="wandb is an extra: pip install 'vlmvqa[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = []
    start = wandb.init

    def init(**options: object) -> object:
        seen.append(options)
        return start(**options)

    monkeypatch.setattr(wandb, "init", init)
    run = tmp_path / "run"
    given = [*arguments("paligemma_qlora_docvqa", tmp_path, clip), "logger=wandb", f"run.dir={run}", "run.name=mine"]
    done(call("train", *given))
    assert wandb.run is None
    (offline,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert offline.stem.removeprefix("run-") == (run / ".wandb_run").read_text()
    assert (seen[0]["name"], seen[0]["dir"], seen[0]["id"]) == ("mine", run, None)
    assert seen[0]["config"] == yaml.safe_load((run / "config.yaml").read_text())
    (run / "metrics.json").unlink()
    done(call("train", *given, "resume=auto"))
    assert seen[1]["id"] == (run / ".wandb_run").read_text()


@pytest.mark.slow
def test_all_ranks_hear_that_weights_and_biases_refuses(tmp_path: Path) -> None:
    """It is asked by the first, and before a base is written."""
    pytest.importorskip("wandb", reason="wandb is an extra: pip install 'vlmvqa[wandb]'")
    small = ("adapt=lora", "model.dtype=float32", "trainer.use_cpu=true", "dist=ddp", "logger=wandb")
    data = ("data.options={train_images:40,val_images:4}", f"data.root={tmp_path / 'shapes'}")
    command = ["launch/train.py", *small, *data, f"run.dir={tmp_path / 'run'}"]
    alone = {"WANDB_API_KEY": "too short", "WANDB_MODE": "online", "HOME": str(tmp_path)}
    process = forks.ranks(2, command, patience=120, **alone)
    printed, _ = process.communicate()
    assert process.statuses == [1, 1], printed[-3000:]
    assert "Weights & Biases opens no run" in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "base").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda package, *more: None if package == name else find(package, *more)
    )
    ended = call("train", f"logger=[csv,{name}]", f"run.dir={tmp_path / 'run'}")
    assert f"logger={name} needs {name}; install it with: pip install 'vlmvqa[{name}]'" in sentence(ended)


def test_a_logger_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    ended = call("train", "logger=[csv,tensorbord]", f"run.dir={tmp_path / 'run'}")
    assert "logger=tensorbord is unknown; did you mean 'tensorboard'?" in sentence(ended)
    assert not (tmp_path / "run").exists()


def test_a_published_adapter_brings_the_base_that_only_its_run_has(tmp_path: Path) -> None:
    """Of our own model too, and what is published may be published again."""
    run = tmp_path / "run"
    small = ["data.options={train_images:40,val_images:4}", "trainer.max_steps=2", "trainer.use_cpu=true"]
    small += ["trainer.report_to=none", "trainer.eval_strategy=no", f"data.root={tmp_path / 'shapes'}"]
    done(call("train", "adapt=lora", "model.dtype=float32", *small, f"run.dir={run}", f"hub_id={tmp_path / 'a'}"))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["adapter"]["base"] == "./base"
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    picture = next((tmp_path / "shapes" / "val2014").iterdir())
    answers = [vlmvqa.load(folder, "cpu").answer(picture, "How many?") for folder in (run, tmp_path / "b")]
    assert answers[0] == answers[1]


def test_a_published_score_is_compared(tmp_path: Path) -> None:
    """With a tiny model of the class: scored where the split has answers, else to be uploaded."""
    pretrained.save("paligemma", tmp_path / "model")
    synthetic_vqav2.write(tmp_path / "data", train_images=2, val_images=2, questions_per_image=2)
    recipe = (
        "experiment=reproduce_paligemma_vqav2",
        f"checkpoint={tmp_path / 'model'}",
        f"data.root={tmp_path / 'data'}",
    )
    small = ("decoding.max_new_tokens=4", "report=false", "attributions=0")
    printed = done(call("eval", *recipe, *small, "split=val", f"run.dir={tmp_path / 'val'}")).out
    overall = metrics(tmp_path / "val")["metrics"]["vqa_accuracy"]["overall"]
    published = "expected 83.19 ± 0.3 (Beyer et al. 2024, VQAv2 at 224 pixels, on the test server)"
    assert f"{published}, found {overall:.2f}: NOT reproduced" in printed
    near = ("expected.score=" + str(overall + 0.2), "split=val", f"run.dir={tmp_path / 'near'}")
    assert done(call("eval", *recipe, *small, *near)).out.rstrip().endswith(": reproduced")


def test_a_published_score_of_a_split_without_answers() -> None:
    said = Expected(83.19, 0.3, "its paper").compare(None)
    assert said.startswith("expected 83.19 ± 0.3 (its paper)") and "submission.json must be uploaded" in said
