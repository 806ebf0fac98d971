"""launch/train.slurm, with stand-ins for `srun` and `scontrol` that start two tasks on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed.harness import ENVIRONMENT, LONGER, losses
from tests.distributed.test_launchers import data, done, follow, whole

__all__ = ["data", "whole"]  # fixtures

SRUN = """#!{python}
import os, signal, subprocess, sys
command = sys.argv[2:]  # after --kill-on-bad-exit=1
step = {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "here", "SLURM_STEP_TASKS_PER_NODE": "2"}}
numbers = [{{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}} for number in (0, 1)]
tasks = [subprocess.Popen(command, env=os.environ | step | number) for number in numbers]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in show) echo 127.0.0.1 ;; requeue) echo "$2" >> requeued ;; esac
"""


@pytest.mark.slow
def test_a_slurm_job_saves_and_is_requeued(tmp_path: Path, data: str, whole: Path) -> None:
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in (".venv", "launch"):
        (tmp_path / name).symlink_to(ROOT / name if name != ".venv" else Path(sys.prefix))
    more = [data, *LONGER, "trainer.per_device_train_batch_size=4", "trainer.max_steps=12", "dist=fsdp"]
    environment = ENVIRONMENT | {"PATH": f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    del environment["MASTER_PORT"]
    folder = tmp_path / "runs" / str(os.getpid())

    def submit() -> subprocess.Popen[str]:
        command = ["bash", "launch/train.slurm", *more, "trainer.report_to=none"]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
        )

    job = submit()
    follow(job, folder, 4)
    for path in Path("/proc").glob("[0-9]*/cmdline"):  # SLURM's --signal=USR1@120 reaches the step
        if path.exists() and str(tmp_path / "bin" / "srun") in path.read_text():
            os.kill(int(path.parent.name), signal.SIGUSR1)
    printed = done(job)
    assert "stopped by SIGUSR1" in printed and printed.count("strategy ") == 1
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    done(submit())
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)
