"""Mistakes that are found before PyTorch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from PIL import Image
from transformers import EarlyStoppingCallback, TrainingArguments

from vlmvqa.config.early_checks import NUMBERS, OURS, _kinds, argument_types, problems, refuse_mistakes
from vlmvqa.config.overrides import compose
from vlmvqa.errors import InputError
from vlmvqa.extras.dataset_tools.command_line import prepare_job
from vlmvqa.paths import nearest, refuse_missing_model


def refused(name: str, *given: str) -> str:
    """The sentence, or nothing."""
    script, *first = name.split()
    try:
        for job in compose([*first, *given], script).jobs:
            refuse_mistakes(job.values, script)
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are given in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    return tmp_path


ASK = ("checkpoint=runs/demo", "question=what?")


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("predict", (), "checkpoint must be given; add checkpoint=... to the command"),
        ("predict", ("checkpoint=runs/demo",), "nothing to ask: give image=..."),
        ("predict", (*ASK, "image=foto.jpg"), "image=foto.jpg does not exist; the nearest existing path to {}/"),
        ("predict", (*ASK, "image=foto.jpg"), " is {}/photo.jpg"),
        ("predict", ("checkpoint=runs/dmeo", *ASK[1:], "image=photo.jpg"), "at {}/runs/dmeo; the nearest is {}/runs/d"),
        ("predict", (*ASK, "image=data"), "data holds no image files"),
        ("predict", (*ASK[:1], "image=photo.jpg", "questions=q.txt"), "questions=q.txt does not exist"),
        ("train", ("data=vqav2", "data.root=dat"), "data.root=dat does not exist; the nearest existing path to {}/dat"),
        ("train", ("data=vqav2",), "data.root must be given; add data.root=... to the command"),
        ("train", ("data=mixture", "data.parts.vqav2.root=data", "data.parts.gqa.root=x"), "parts.gqa.root=x does not"),
        ("train", ("trainer.per_device_train_batch_size=0",), "per_device_train_batch_size=0 must be at least 1"),
        ("train", ("trainer.learning_rate=fast",), "trainer.learning_rate=fast should be of type float"),
        ("train", ("trainer.bf16=maybe",), "trainer.bf16=maybe should be of type bool"),
        ("train", ("-m", "trainer.max_steps=1,many"), "trainer.max_steps=many should be of type int"),
        ("train", ("log_samples=-1",), "log_samples=-1 should be a whole number, at least 0"),
        ("train", ("init_from=runs/dmeo",), "no model at {}/runs/dmeo"),
        ("eval", ("checkpoint=runs/demo", "data=shapes", "batch_size=0"), "batch_size=0 should be a whole number, at"),
        ("eval", ("checkpoint=runs/demo",), "data=... must be given"),
        ("eval", (), "choose what to score"),
        ("merge", ("output=x", "models=[runs/demo,runs/dmeo]"), "no model at {}/runs/dmeo"),
        ("serve", ("checkpoint=demo",), "no model at {}/demo"),
        ("prepare check", ("data=gqa", "data.root=dat"), "data.root=dat does not exist"),
    ],
)
def test_it_is_named(home: Path, name: str, given: tuple[str, ...], said: str) -> None:
    assert said.format(home, home) in refused(name, *given)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("predict", (*ASK, "image=photo.jpg")),
        ("predict", ("checkpoint=google/paligemma", *ASK[1:], "image=photo.jpg")),
        ("train", ()),  # its data is generated
        ("train", ("data=vqav2", "data.root=later", "data.synthetic=true")),
        ("train", ("data=vqav2", "data.hub=lmms-lab/VQAv2")),
        ("plan", ("data=vqav2",)),
        ("prepare download", ("data=gqa", "data.root=later")),
        ("merge", ("output=x", "models=[runs/demo]", "samples=null")),
    ],
)
def test_what_is_right_is_not(name: str, given: tuple[str, ...]) -> None:
    assert refused(name, *given) == ""


def test_a_hub_id_beside_a_folder_of_the_same_owner(home: Path) -> None:
    (home / "google" / "other").mkdir(parents=True)
    refuse_missing_model("google/paligemma")
    (home / "google" / "other" / "run.json").touch()  # a run: names beside it are runs, too
    with pytest.raises(InputError, match=r"no model at .*google/paligemma; the nearest is .*google;"):
        refuse_missing_model("google/paligemma")


def test_the_nearest_path_has_similar_names(home: Path) -> None:
    assert nearest(home / "rusn" / "demo") == home / "runs" / "demo"
    assert nearest(home / "runs" / "other" / "model") == home / "runs"


def test_prepare_names_its_jobs() -> None:
    assert prepare_job(["check", "data=gqa"]) == "check"
    wrong = (([], "no job given"), (["chek"], "did you mean 'check'"), (["pack", "x"], "'x' is"))
    for words, said in wrong:
        with pytest.raises(InputError, match=said):
            prepare_job(words)


def test_types_are_those_that_transformers_declares() -> None:
    """Read from the source, and as Python understands it."""
    hints = get_type_hints(EarlyStoppingCallback.__init__) | get_type_hints(TrainingArguments)
    for name, annotation in argument_types().items():
        kinds = {kind.__name__ for kind in get_args(hints[name]) or [hints[name]] if hasattr(kind, "__name__")}
        assert (_kinds(annotation) <= NUMBERS) == (kinds - {"NoneType"} <= NUMBERS), name


@pytest.mark.parametrize("key", OURS)
def test_an_argument_that_another_setting_replaces_is_refused(key: str) -> None:
    (sentence,) = problems({key: True})
    assert sentence.startswith(f"trainer.{key} cannot be set: ")


@pytest.mark.parametrize(
    ("trainer", "sentence"),
    [
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "counts evaluations, and there are none"),
        ({"early_stopping_patience": 0, "eval_strategy": "steps"}, "early_stopping_patience=0 must be at least 1"),
        ({"early_stopping_patience": "many", "eval_strategy": "steps"}, "should be of type int"),
        ({"early_stopping_threshold": 0.5}, "needs trainer.early_stopping_patience"),
    ],
)
def test_early_stopping_without_evaluations_is_refused(trainer: dict[str, Any], sentence: str) -> None:
    assert sentence in next(problems(trainer))
    assert not list(problems({"early_stopping_patience": 2, "early_stopping_threshold": 0.1, "eval_strategy": "epoch"}))


def test_a_key_that_only_a_recipe_has_is_refused() -> None:
    assert list(problems({"learning_rte": 1})) == ["trainer has no key 'learning_rte'; did you mean 'learning_rate'?"]
