"""A small study: killed and resumed, with an arm that fails, and compared again without training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.end_to_end.scripts import LONGER, call, done, losses, sentence
from tests.unit.test_report import Page

pytestmark = pytest.mark.slow  # its study trains four models
SMALL = [*LONGER, "trainer.num_train_epochs=5", "logger=none", "log_samples=0", "model.vision.overrides.embed_dim=32"]


def arguments(folder: Path, data: Path, *more: str) -> list[str]:
    base = [f"base={setting}" for setting in (f"data.root={data}", *SMALL)]
    return ["study=mask", "size=smoke", "arms=[causal]", "seeds=[0,1]", f"run.dir={folder}", *base, *more]


def result(folder: Path) -> dict[str, Any]:
    """The content of study.json without what is measured."""
    found: dict[str, Any] = json.loads((folder / "study.json").read_text())
    for arm in found["arms"].values():
        assert arm.pop("measured")["questions_per_second"] > 0
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran without a break; next to it the folder of its data."""
    home = tmp_path_factory.mktemp("study")
    printed = done(call("study", *arguments(home / "study", home / "shapes"))).out
    assert "Attention patterns: 2 arms x 2 seeds = 4 runs, 4 left" in printed and "run 4 of 4: causal/seed-1" in printed
    return home / "study"


def test_the_table_of_a_study(study: Path) -> None:
    found = result(study)
    assert list(found["arms"]) == ["blockwise_prefix", "causal"] and found["failed"] == {}
    causal = found["arms"]["causal"]
    for seed, part in causal["folders"].items():
        scored = json.loads((study / part / "metrics.json").read_text())["metrics"]["vqa_accuracy"]
        assert causal["scores"][seed] == pytest.approx(scored["overall"], abs=0.01)
    assert causal["difference"]["interval"] is None  # two seeds
    assert causal["parameters"]["trained"] == causal["parameters"]["total"] > 0
    page, latex = (study / "study.md").read_text(), (study / "study.tex").read_text()
    assert "| causal | 2 |" in page and "conditional on these seeds" in page and r"\toprule" in latex
    assert (study / "causal" / "seed-1" / "model").is_dir()
    shown = Page((study / "report.html").read_text(encoding="utf-8"))
    assert "VQA accuracy (%) by questions seen" in shown.text and "causal model.attention_pattern=causal" in shown.text
    answers = [
        [json.loads(line)["answer"] for line in (study / arm / "seed-0" / "predictions.jsonl").read_text().splitlines()]
        for arm in found["arms"]
    ]
    different = sum(before != after for before, after in zip(*answers, strict=True))
    assert f"answer {different} differently" in shown.text
    assert shown.tags.count("article") == shown.tags.count("img") == min(different, 12)


def test_nothing_is_trained_again(study: Path) -> None:
    before, newest = result(study), max(path.stat().st_mtime for path in study.glob("*/*/*"))
    printed = done(call("study", *arguments(study, study.parent / "shapes"))).out
    assert "4 runs, 0 left" in printed and "run 1 of" not in printed
    assert result(study) == before and max(path.stat().st_mtime for path in study.glob("*/*/*")) == newest


def test_another_study_in_the_folder_is_refused(study: Path) -> None:
    more = arguments(study, study.parent / "shapes", "base=trainer.learning_rate=1e-2")
    assert "settings differ from the study's first start" in sentence(call("study", *more))


def test_an_arm_that_fails_does_not_stop_the_others(study: Path, tmp_path: Path) -> None:
    """Its error is in the table, and the same command tries it again."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    shutil.rmtree(folder / "causal" / "seed-0")
    (folder / "causal" / "seed-0").write_text("in the way")
    printed = done(call("study", *arguments(folder, study.parent / "shapes"))).out
    assert "causal/seed-0 failed" in printed
    assert result(folder)["failed"].keys() == {"causal/seed-0"}
    (folder / "causal" / "seed-0").unlink()
    done(call("study", *arguments(folder, study.parent / "shapes")))
    assert result(folder) == result(study)


def test_later_commands_add_arms_and_report_all(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    given = [one.replace("seeds=[0,1]", "seeds=[2]") for one in arguments(folder, study.parent / "shapes")]
    done(call("study", *given))
    found = result(folder)
    assert list(found["arms"]["causal"]["scores"]) == ["0", "1", "2"] and found["failed"] == {}
    assert found["arms"]["causal"]["difference"]["interval"] is not None
    done(call("study", "study=mask", f"run.dir={folder}", "only_report=true"))  # with the settings of the record
    assert result(folder) == found and found["size"] == "smoke"
    empty = call("study", "study=mask", f"run.dir={tmp_path / 'none'}", "only_report=true")
    assert "holds no study" in sentence(empty)


def test_overwriting_deletes_the_runs(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    given = [one.replace("seeds=[0,1]", "seeds=[0]") for one in arguments(folder, study.parent / "shapes")]
    printed = done(call("study", *given, "base=trainer.learning_rate=1e-2", "run.overwrite=true")).out
    assert "2 runs, 2 left" in printed and not (folder / "causal" / "seed-1").exists()


def killed(arguments: list[str], when: Callable[[], bool]) -> None:
    process = forks.ranks(1, ["launch/study.py", *arguments])
    while process.poll() is None and not when():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0][-3000:]
    os.kill(process.pids[0], signal.SIGKILL)
    process.communicate(timeout=60)


def test_a_killed_study_ends_like_one_that_was_not(study: Path, tmp_path: Path) -> None:
    """In the middle of a run and between two runs."""
    folder = tmp_path / "study"
    given = arguments(folder, study.parent / "shapes")
    first, second = folder / "blockwise_prefix" / "seed-0", folder / "causal" / "seed-0"
    killed(given, lambda: max(losses(first), default=0) >= 5)
    assert not (first / "metrics.json").exists()
    killed(given, lambda: (second / "metrics.json").exists())
    done(call("study", *given))
    assert result(folder) == result(study)
