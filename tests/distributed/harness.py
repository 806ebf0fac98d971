"""Real processes on this machine: ranks over gloo, started as users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests import forks
from tests.conftest import ROOT
from tests.distributed.worker import Case
from tests.end_to_end.scripts import LONGER, losses

__all__ = ["BIN", "ENVIRONMENT", "LONGER", "losses", "start", "torchrun", "train", "work"]

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PYTHONFAULTHANDLER": "1",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "MASTER_PORT": "0",
}


def start(command: Sequence[str], **more: str) -> subprocess.Popen[str]:
    """Start a command, with stderr redirected to stdout."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT | more,
        cwd=ROOT,
    )


def torchrun(ranks: int, *more: str) -> list[str]:
    """Return a torchrun command with its own free port, so that tests can run in parallel."""
    return [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={ranks}", *more]


def train(folder: Path, data: str, *more: str) -> list[str]:
    """Return the arguments of a small training: 12 steps of 8 images over 2 ranks."""
    batch = "trainer.per_device_train_batch_size=4"
    steps = "trainer.max_steps=12"
    return ["launch/train.py", f"run.dir={folder}", data, *LONGER, batch, steps, "trainer.report_to=none", *more]


def work(folder: Path, cases: Sequence[Case], ranks: int) -> dict[str, Any]:
    """Run cases of `worker.py` one after the other in one process group; return their results by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    process = forks.ranks(ranks, ["-m", "tests.distributed.worker", str(folder), str(folder / "cases.json")])
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed[-3000:]
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    for name, result in results.items():
        assert "failed" not in result, f"{name}: {result.get('failed', '')[-3000:]}"
        for key in ("losses", "norms"):
            result[key] = {int(step): value for step, value in result.get(key, {}).items()}
    return results
