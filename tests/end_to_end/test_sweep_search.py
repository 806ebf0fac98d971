"""A small sweep of launch/sweep.py: pruned, killed and continued, with a trial that fails, and on two ranks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.conftest import ROOT
from tests.end_to_end.scripts import LONGER, call, done, losses, sentence
from tests.pages import blocks

pytestmark = pytest.mark.slow  # its sweep trains three models
SMALL = [*LONGER, "trainer.max_steps=12", "logger=none", "log_samples=0", "model.vision.overrides.embed_dim=32"]
# The second trial, with the low rate, learns nothing and is pruned at its first evaluation.
SPACE = ["seed=20", "sweep.startup_trials=2", "sweep.space.trainer.learning_rate={choices:[3e-3,1e-9]}"]


def arguments(folder: Path, *more: str) -> list[str]:
    """The command of docs/studies.md, for smaller models."""
    page = blocks(ROOT / "docs" / "studies.md")
    commands = [command for block in page if block.language == "bash" for command in block.commands]
    (command,) = (one for one in commands if "launch/sweep.py" in one and "size=smoke" in one)
    base = [f"base={setting}" for setting in (f"data.root={folder.parent / 'shapes'}", *SMALL)]
    small = ["trials=3", f"run.dir={folder}", *SPACE, "sweep.pruning.startup_trials=1"]
    return [*shlex.split(command)[2:], *small, *base, *more]


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that ran without a break."""
    home = tmp_path_factory.mktemp("sweep")
    printed = done(call("sweep", *arguments(home / "sweep"))).out
    assert "trial 1: pruned" in printed and "the same run again:\npython launch/train.py model=tiny" in printed
    return home / "sweep"


def test_the_report_of_a_sweep(sweep: Path) -> None:
    found = result(sweep)
    states = [(trial["state"], trial["steps"]) for trial in found["trials"]]
    assert states == [("complete", 12), ("pruned", 6), ("complete", 12)]
    assert [trial["parameters"]["trainer.learning_rate"] for trial in found["trials"]] == [3e-3, 1e-9, 3e-3]
    for trial in (found["trials"][0], found["trials"][2]):
        scored = json.loads((sweep / f"trial-{trial['number']}" / "metrics.json").read_text())
        assert trial["score"] == scored["metrics"]["vqa_accuracy"]["overall"]
    best = max((trial for trial in found["trials"] if trial["state"] == "complete"), key=lambda one: one["score"])
    assert found["best"]["number"] == best["number"] and "seed=20" in found["best"]["command"]
    assert found["importance"] is None and not (sweep / "trial-1" / "model").exists()
    page = (sweep / "report.html").read_text()
    assert "pruned" in page and "<svg" in page and "it needs 10 complete trials" in page


def test_the_printed_command_trains_the_same_model(sweep: Path, tmp_path: Path) -> None:
    best = result(sweep)["best"]
    ended = call("train", *shlex.split(best["command"])[2:], f"run.dir={tmp_path / 'best'}")
    scored = json.loads((tmp_path / "best" / "metrics.json").read_text())
    assert done(ended) and scored["metrics"]["vqa_accuracy"]["overall"] == best["score"]


def test_later_commands(sweep: Path, tmp_path: Path) -> None:
    """Nothing is trained again, other settings are refused, and the report needs no training."""
    folder = tmp_path / "sweep"
    shutil.copytree(sweep, folder)
    given = [one for one in arguments(sweep) if not one.startswith("run.dir=")] + [f"run.dir={folder}"]
    before = (folder / "journal.log").read_bytes()
    assert "trial 0 (" not in done(call("sweep", *given)).out and result(folder) == result(sweep)
    refused = sentence(call("sweep", *given, "base=trainer.weight_decay=0.5"))
    assert "base differ from the sweep's first start" in refused
    done(call("sweep", "sweep=learning_rate", "run.name=sweep-smoke", f"run.dir={folder}", "only_report=true"))
    assert result(folder) == result(sweep) and (folder / "journal.log").read_bytes() == before
    empty = call("sweep", "sweep=learning_rate", f"run.dir={tmp_path / 'none'}", "only_report=true")
    assert "holds no sweep" in sentence(empty)


def killed(given: list[str], when: Callable[[], bool], number: signal.Signals = signal.SIGKILL) -> str:
    process = forks.ranks(1, ["launch/sweep.py", *given])
    while process.poll() is None and not when():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0][-3000:]
    os.kill(process.pids[0], number)
    return process.communicate(timeout=60)[0]


def test_a_killed_sweep_ends_like_one_that_was_not(sweep: Path, tmp_path: Path) -> None:
    """In the middle of a trial, which resumes from its checkpoint, and right after its last evaluation."""
    (tmp_path / "shapes").symlink_to(sweep.parent / "shapes")
    folder = tmp_path / "sweep"
    given = arguments(folder)
    killed(given, lambda: max(losses(folder / "trial-0"), default=0) >= 5)
    assert not (folder / "trial-0" / "metrics.json").exists()
    killed(given, lambda: max(losses(folder / "trial-2"), default=0) >= 12)
    printed = done(call("sweep", *given)).out
    assert "trial 1 (" not in printed and f"resuming from {folder / 'trial-2' / 'checkpoint-'}" in printed
    continued, whole = result(folder), result(sweep)
    assert continued["trials"] == whole["trials"] and continued["best"]["number"] == whole["best"]["number"]


def test_a_failed_trial_and_a_stop_signal(sweep: Path, tmp_path: Path) -> None:
    """The others continue after a failure, which is in the report; a stopped command is continued."""
    (tmp_path / "shapes").symlink_to(sweep.parent / "shapes")
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "trial-0").write_text("in the way")
    given = arguments(folder, "sweep.pruning=null", "trials=2")
    printed = killed(given, lambda: max(losses(folder / "trial-1"), default=0) >= 2, signal.SIGTERM)
    assert "trial 0 failed: " in printed and "the sweep continues with the same command" in printed
    assert not (folder / "trial-1" / "metrics.json").exists() and (folder / "trial-1" / "latest").exists()
    done(call("sweep", *given))
    failed, complete = result(folder)["trials"]
    assert (failed["state"], failed["score"], complete["state"]) == ("fail", None, "complete")
    assert "trial-0" in failed["error"]


def test_two_ranks_train_and_prune_the_same_trials(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes").symlink_to(sweep.parent / "shapes")
    folder = tmp_path / "sweep"
    process = forks.ranks(2, ["launch/sweep.py", *arguments(folder, "base=trainer.per_device_train_batch_size=4")])
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-3000:]
    found, whole = result(folder)["trials"], result(sweep)["trials"]
    assert [trial["parameters"] for trial in found] == [trial["parameters"] for trial in whole]
    assert [(trial["state"], trial["steps"]) for trial in found] == [("complete", 12), ("pruned", 6), ("complete", 12)]
