"""Mixtures of several tasks: settings, errors, and how often an epoch contains each task."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.configs import data, train_config, values
from tests.end_to_end.scripts import call, sentence
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.mixture import SHARED
from vlmvqa.data.tasks import data_settings, read_tasks
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.synthetic import gqa as synthetic_gqa
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2
from vlmvqa.models.trained_model import build_model
from vlmvqa.training.run import training_set

ROOTS = ("data.parts.vqav2.root=a", "data.parts.gqa.root=b")


def settings(*overrides: str) -> DataSettings:
    return data("data=mixture", *ROOTS, *overrides)


def test_each_part_has_its_own_and_shares_the_rest() -> None:
    data = settings("data.weights.gqa=0.5", "data.max_text_tokens=99", "data.parts.gqa.train_split=train[:10%]")
    assert list(data.tasks) == ["vqav2", "gqa"] and data.weights == {"vqav2": 1.0, "gqa": 0.5}
    vqav2, gqa = data.tasks.values()
    assert (vqav2.metric, gqa.metric, gqa.train_split) == ("vqa_accuracy", "gqa_accuracy", "train[:10%]")
    assert vqav2.max_text_tokens == gqa.max_text_tokens == 99


def test_what_is_shared_is_not_set_for_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in "abc":
        Path(root).mkdir()
    for key in SHARED:
        part = ("+data@data.parts.docvqa=docvqa", "data.parts.docvqa.root=c", f"data.parts.docvqa.{key}=1")
        ended = call("train", "data=mixture", *ROOTS, *part)
        assert "the same for all parts of a mixture" in sentence(ended), key


def test_a_part_is_added_on_the_command_line() -> None:
    data = settings("+data@data.parts.docvqa=docvqa", "data.parts.docvqa.root=c", "data.weights.docvqa=2")
    assert list(data.tasks) == ["vqav2", "gqa", "docvqa"] and data.weights["docvqa"] == 2
    assert data.tasks["docvqa"].metric == "anls"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.weights.gga=2", r"data.weights.gga: there is no such part.*gqa"),
        ("data.weights.gqa=0", "should be above 0"),
        ("data.weights.gqa=-1", "should be above 0"),
        ("data.feature_cache=somewhere", "holds one dataset's images"),
        ("data.parts.gqa=abc", "data.parts.gqa must be a group of keys, not 'abc'"),
        ("data.parts=abc", "data.parts must be a group of keys, not 'abc'"),
        ("data.parts.gqa.prompt=hello", r"data.parts.gqa.prompt='hello' must hold \{question\} once"),
        ("data.parts.gqa.root=null", r"data.parts.gqa.root must be given"),
        ("~data.parts.gqa", "holds 1 datasets; name two or more"),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        if override.startswith("~"):
            parts = values("train", "data=mixture", ROOTS[0])["data"]
            del parts["parts"]["gqa"]
            data_settings(parts)
        settings(override)


def test_two_prompts_of_one_source_are_refused() -> None:
    with pytest.raises(InputError, match="two parts of source gqa have different prompts"):
        settings("+data@data.parts.other=gqa", "data.parts.other.root=c", "data.parts.other.prompt=x {question}")


def test_where_one_data_set_is_wanted_a_mixture_is_refused() -> None:
    with pytest.raises(InputError, match="choose one of them: vqav2, gqa"):
        assert data("data=mixture", *ROOTS).single


def test_an_epoch_sees_each_part_as_often_as_its_weight_says(tmp_path: Path) -> None:
    roots = [
        synthetic_vqav2.write(tmp_path / "a", train_images=20, val_images=2, questions_per_image=3),
        synthetic_gqa.write(tmp_path / "b", train_images=10, val_images=2),
    ]
    given = [f"data.parts.vqav2.root={roots[0]}", f"data.parts.gqa.root={roots[1]}", "data.parts.gqa.eval_split=val"]
    config = train_config("data=mixture", "data.weights.vqav2=0.5", "data.weights.gqa=2", *given, "run.name=x")
    tasks = read_tasks(config.data, BadRecords())
    examples = [example for task in tasks for example in task.train]
    predictor = build_model(config.model, config.data, config.decoding, examples)
    assert predictor.prompts == {"vqav2": "answer en {question}\n", "gqa": "answer en {question}\n"}
    rows = training_set(config, predictor, tasks, BadRecords())
    seen = []
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        order = rows._plan().order.tolist()
        images = [rows.documents[document].example for document in order]
        assert sum(image < 20 for image in images) == 10
        assert sorted(image for image in images if image >= 20) == sorted([*range(20, 30)] * 2)
        seen.append({image for image in images if image < 20})
    assert seen[0] != seen[1]
    assert len(rows[0]) and "weight 0.5" in str(tasks[0])
