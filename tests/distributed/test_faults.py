"""Failures on real machines: a rank that fails, hangs or is killed, a full disk, a damaged checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import forks
from tests.distributed.harness import losses, train
from tests.distributed.test_launchers import data, done, follow, whole
from tests.end_to_end.scripts import call, sentence
from tests.end_to_end.scripts import done as ended
from vlmvqa.training.checkpoints import complete_checkpoints
from vlmvqa.training.hang_monitor import is_stalled
from vlmvqa.training.log import read_log

__all__ = ["data", "whole"]  # fixtures


# Runs the script in its arguments, on rank 0 two seconds later.
LATE = """\
import os, runpy, sys, time
if os.environ["LOCAL_RANK"] == "0":
    time.sleep(2)
sys.argv = sys.argv[1:]
sys.path.insert(0, "launch")
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Runs the script in its arguments; what describes the saved model is written two seconds late.
LATE_FILES = """\
import runpy, sys, time
from vlmvqa.models.trained_model import TrainedModel
describe = TrainedModel.describe
TrainedModel.describe = lambda self, folder: (time.sleep(2), describe(self, folder))
sys.argv = sys.argv[1:]
sys.path.insert(0, "launch")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_no_rank_loads_the_model_before_it_is_complete(tmp_path: Path, data: str) -> None:
    late = tmp_path / "late.py"
    late.write_text(LATE_FILES)
    given = train(tmp_path / "run", data, "dist=fsdp", "trainer.max_steps=1", "trainer.save_strategy=no")
    done(forks.ranks(2, [str(late), *given]))


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_that_error(tmp_path: Path, data: str, whole: Path) -> None:
    """Truncate an image that only one rank reads: expect one error, from that rank."""
    root = tmp_path / "shapes"
    subprocess.run(["cp", "-r", data.removeprefix("data.root="), root], check=True)
    for picture in sorted((root / "train2014").iterdir())[:1]:
        picture.write_bytes(picture.read_bytes()[:200])
    printed = done(forks.ranks(2, train(tmp_path / "run", f"data.root={root}", "dist=zero3")), code=1)
    said = [line for line in printed.splitlines() if "error: " in line and "elastic" not in line]
    assert len(said) == 1 and ".jpg" in said[0] and "data.on_bad_record=skip" in said[0], printed
    assert "InputError" not in printed  # no traceback except torchrun's


def test_a_user_error_is_printed_once(tmp_path: Path, data: str) -> None:
    """By the first rank, however late it is: the launcher ends all ranks at the first exit."""
    late = tmp_path / "late.py"
    late.write_text(LATE)
    given = train(tmp_path / "run", data, "dist=fsdp", "trainer.optim=lion")
    printed = done(forks.ranks(2, [str(late), *given]), code=1)
    assert printed.count("trainer.optim=lion") == 1


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long)])
def test_a_rank_that_hangs_is_named(tmp_path: Path, data: str, whole: Path, which: int) -> None:
    """A stopped process neither answers nor exits; the other ranks do not wait for it forever."""
    folder = tmp_path / "run"
    process = forks.ranks(2, train(folder, data, "dist=fsdp", "dist.timeout_minutes=0.3"))
    follow(process, folder, 4)
    os.kill(process.pids[which], signal.SIGSTOP)
    printed = done(process, code=1)
    assert f"error: rank {which} has not answered for 0.3 minutes" in printed


def test_a_quiet_rank_is_waited_for_until_it_can_be_named() -> None:
    """The others stall with it, and their timeouts end at about the same time."""
    assert is_stalled({"0": 2.0, "1": 1.0}, stalled=19.0, timeout=18.0)
    assert not is_stalled({"0": 2.0, "1": 1.0}, stalled=17.0, timeout=18.0)
    assert not is_stalled({"0": 17.9, "1": 1.0}, stalled=19.0, timeout=18.0)


@pytest.mark.parametrize(
    "strategy",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero3")),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero2")),
    ],
)
def test_a_rank_killed_while_it_saves(tmp_path: Path, data: str, whole: Path, strategy: str) -> None:
    """An incomplete checkpoint is never resumed from."""
    folder = tmp_path / "run"
    process = forks.ranks(2, train(folder, data, f"dist={strategy}", "trainer.save_steps=1"))
    follow(process, folder, 3)
    while process.poll() is None and not list(folder.glob("*.partial/model.safetensors")):
        pass
    os.kill(process.pids[0], signal.SIGKILL)
    done(process, code=1)
    assert complete_checkpoints(folder)
    printed = done(forks.ranks(2, train(folder, data, f"dist={strategy}", "resume=auto", "trainer.save_steps=1")))
    assert "resuming from" in printed
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, data: str, whole: Path) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, folder], check=True)
    newest = folder / "checkpoint-12" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = train(folder, data, "resume=auto", "trainer.per_device_train_batch_size=8")
    printed = ended(call("train", *again[1:])).out
    assert "checkpoint-12 is damaged (optimizer.safetensors has changed since it was written)" in printed
    assert f"resuming from {folder}/checkpoint-9" in printed
    assert losses(folder) == losses(whole)
    assert (folder / "latest").resolve().name == "checkpoint-12"


def test_a_run_with_changed_settings_is_not_resumed(tmp_path: Path, data: str, whole: Path) -> None:
    """The error names the changed keys, and the run's files are unchanged."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, folder], check=True)

    def refused(*more: str) -> str:
        return sentence(call("train", *train(folder, data, *more)[1:]))

    batch = "trainer.per_device_train_batch_size=8"
    changed = ("resume=auto", batch, "trainer.learning_rate=1e-4", "trainable.vision=none")
    said = refused(*changed)
    assert "trainable.vision was all and is now none; trainer.learning_rate was 0.001 and is now 0.0001" in said
    said = refused("resume=auto")
    assert "was trained with 8 rows a step, now it would be 4: set trainer.gradient_accumulation_steps=2" in said
    assert losses(folder) == losses(whole)
    (folder / "config.yaml").unlink()
    said = refused("resume=auto", batch)
    assert "config.yaml is missing" in said and "resume_force=true" in said
    forced = train(folder, data, *changed, "resume_force=true", "trainer.max_steps=14")
    assert "resuming from" in ended(call("train", *forced[1:])).out and max(losses(folder)) == 14
    rates = {record["step"]: record["learning_rate"] for record in read_log(folder / "log.jsonl") if "loss" in record}
    assert rates[1] == 0 < rates[14] < rates[13] < 1e-4  # the schedule's step of before, with the new base rate


@pytest.mark.slow
def test_a_full_disk_while_two_ranks_save(tmp_path: Path, data: str, whole: Path) -> None:
    """One error, and the previous checkpoint is complete."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (whole / "checkpoint-12").iterdir())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.7 * size)}", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        folder = disk / "run"
        printed = done(forks.ranks(2, train(folder, data, "dist=fsdp")), code=1)
        assert "is full: checkpoint 6 was not kept" in printed and "checkpoint-3 is complete" in printed
        assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-3"]
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", disk], check=True)
        done(forks.ranks(2, train(folder, data, "dist=fsdp", "resume=auto")))
        assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)
    finally:
        subprocess.run(["umount", disk], check=True)
