"""The users' commands on two ranks of this machine, and the score of the saved model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests import forks
from tests.conftest import ROOT
from tests.distributed.harness import BIN, losses, start, train
from tests.end_to_end.scripts import SHAPES, call
from tests.end_to_end.scripts import done as ended


def done(process: subprocess.Popen[str] | forks.Ranks, code: int = 0) -> str:
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == code, printed[-4000:]
    return printed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.root={tmp_path_factory.mktemp('data') / 'shapes'}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """An uninterrupted run in one process with the batch of two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended(call("train", *train(folder, data, "trainer.per_device_train_batch_size=8")[1:]))
    return folder


def follow(process: subprocess.Popen[str] | forks.Ranks, folder: Path, step: int) -> None:
    """Wait until the run has logged this step."""
    while process.poll() is None and max(losses(folder), default=0) < step:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0][-3000:]


def ranks_of(folder: Path, rank: int) -> list[int]:
    """Return the processes on this machine that have this rank in the run of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().split("\0")
            environment = dict(line.split("=", 1) for line in (path / "environ").read_text().split("\0") if "=" in line)
        except (OSError, ValueError):
            continue
        ours = f"run.dir={folder}" in command and environment.get("RANK") == str(rank)
        if ours and any(part.endswith("launch/train.py") for part in command) and "torchrun" not in " ".join(command):
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_accelerate_launch_fsdp(tmp_path: Path, data: str, whole: Path) -> None:
    """`accelerate launch launch/train.py +dist=fsdp`, with two ranks instead of four GPUs."""
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    printed = done(start([*command, "launch/train.py", "+dist=fsdp", *train(tmp_path / "run", data)[1:]]))
    assert "strategy      fsdp, 2 ranks on cpu" in printed and "of which" in printed
    assert printed.count("VQA accuracy (%)") == 1 and printed.count("strategy ") == 1  # only rank 0 prints
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)
    asked = [f"checkpoint={tmp_path}/run", "data=shapes", data, *SHAPES, "split=val", f"run.dir={tmp_path}/scored"]
    assert "VQA accuracy (%)" in ended(call("eval", *asked)).out
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("scored", "run"))
    assert ours["metrics"] == theirs["metrics"] and ours["controls"] == theirs["controls"]


@pytest.mark.slow
def test_deepspeed_picks_zero2(tmp_path: Path, data: str, whole: Path) -> None:
    """`deepspeed launch/train.py`, which passes --local_rank before the overrides."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    printed = done(start([*command, *train(tmp_path / "run", data)]))
    assert "strategy      zero2, 2 ranks on cpu" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dist"]["strategy"] == "zero2"


def test_eval_splits_the_questions(tmp_path: Path, data: str, whole: Path) -> None:
    asked = [f"checkpoint={whole}", "data=shapes", data, *SHAPES, "split=val", f"run.dir={tmp_path}/scored"]
    done(forks.ranks(2, ["launch/eval.py", *asked]))
    ours, theirs = tmp_path / "scored", whole
    assert (ours / "submission.json").read_text() == (theirs / "submission.json").read_text()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (ours, theirs)]
    assert metrics[0]["metrics"] == metrics[1]["metrics"] and metrics[0]["controls"] == metrics[1]["controls"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        pytest.param(
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": False}},
            "fsdp",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "zero3", marks=pytest.mark.long
        ),
        pytest.param({"distributed_type": "MULTI_GPU"}, "ddp", marks=pytest.mark.long),
    ],
)
def test_accelerates_config_file_is_obeyed(
    tmp_path: Path, data: str, whole: Path, written: dict[str, object], expected: str
) -> None:
    file = tmp_path / "accelerate.yaml"
    common = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    file.write_text(yaml.safe_dump({**common, "main_process_port": free_port(), **written}))
    printed = done(start(["accelerate", "launch", "--config_file", str(file), *train(tmp_path / "run", data)]))
    assert f"strategy      {expected}, 2 ranks on cpu" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)
    other = start(["accelerate", "launch", "--config_file", str(file), *train(tmp_path / "x", data, "+dist=zero1")])
    if expected != "ddp":  # accelerate starts ranks for DDP without any setting too
        said = f"accelerate's config file asks for {expected}, the command for zero1"
        assert said in done(other, code=1)


@pytest.mark.parametrize("strategy", [
    "fsdp",
    pytest.param("zero3", marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero1", "zero2")),
])  # fmt: skip
def test_a_killed_run_resumes_with_the_same_losses(tmp_path: Path, data: str, whole: Path, strategy: str) -> None:
    """kill -9 of one rank ends all; the resumed run has the losses of an uninterrupted one."""
    folder = tmp_path / "run"
    process = forks.ranks(2, train(folder, data, f"dist={strategy}", "dist.timeout_minutes=2"))
    follow(process, folder, 7)
    os.kill(process.pids[1], signal.SIGKILL)
    printed = done(process, code=1)
    assert max(losses(folder)) < 12
    assert "error: another rank was killed" in printed
    printed = done(forks.ranks(2, train(folder, data, f"dist={strategy}", "resume=auto")))
    assert ("resuming from" in printed and "checkpoint-6" in printed) or "checkpoint-9" in printed
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dist", sorted(path.stem for path in (ROOT / "conf" / "dist").glob("*.yaml")))
def test_one_process_under(tmp_path: Path, data: str, whole: Path, dist: str) -> None:
    """`python launch/train.py dist=...` runs the strategy with one rank; ddp trains without a process group."""
    batch = "trainer.per_device_train_batch_size=8"
    printed = done(forks.script(train(tmp_path / "run", data, f"+dist={dist}", batch)))
    name = dist.removesuffix("_offload")
    said = "one process" if dist == "ddp" else name + (", offloaded to host memory" if name != dist else "")
    assert f"strategy      {said}, 1 rank on cpu" in printed
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.long
def test_two_machines_and_a_worker_that_comes_back(tmp_path: Path, data: str, whole: Path) -> None:
    """Two torchrun agents with one process each, as on two machines; a worker killed with -9 is restarted."""
    folder, port = tmp_path / "run", free_port()
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=2", "--rdzv_backend=c10d", "--rdzv_id=two",
                  f"--rdzv_endpoint=127.0.0.1:{port}"]  # fmt: skip
    agents = [start([str(BIN / "torchrun"), *rendezvous, *train(folder, data, "dist=fsdp")]) for _ in range(2)]
    follow(agents[0], folder, 7)
    for pid in ranks_of(folder, 1):
        os.kill(pid, signal.SIGKILL)
    printed = [done(agent) for agent in agents]
    assert any("resuming from" in text for text in printed)
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)
    assert (folder / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_preempted_run_saves_and_exits_with_0(tmp_path: Path, data: str, whole: Path, number: signal.Signals) -> None:
    """SLURM's signal: one rank receives it, all stop after the same step, and the run can be resumed."""
    folder = tmp_path / "run"
    more = ("dist=fsdp", "trainer.dataloader_num_workers=1", "trainer.save_total_limit=1")
    process = forks.ranks(2, train(folder, data, *more))
    follow(process, folder, 4)
    os.killpg(process.pids[1], number)  # with its data workers, as SLURM and torchrun do
    printed = done(process)
    assert f"stopped by {number.name}, saved in {folder}/latest" in printed
    stopped = max(losses(folder))
    assert stopped < 12 and (folder / "latest").resolve().name == f"checkpoint-{stopped}"
    assert not (folder / "metrics.json").exists() and (folder / "latest").exists()
    ended(call("train", *train(folder, data, "resume=auto", "trainer.per_device_train_batch_size=8")[1:]))
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
