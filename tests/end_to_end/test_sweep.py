"""A sweep: every job in its own folder, and a table of all jobs at the end."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.end_to_end.scripts import SMALL, call, content, done, losses, metrics, sentence, start
from vlmvqa.config.overrides import compose
from vlmvqa.config.sweep import Sweep

RATES = "trainer.learning_rate=1e-3,1e-4"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are given in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")  # which a sweep changes
    return tmp_path


def test_each_job_has_its_own_run(home: Path, whole: Path) -> None:
    """A job that is refused is in the table, and the others are trained."""
    data = ("data=vqav2", f"data.root={whole}", *SMALL, "attributions=0", "log_samples=0")
    ended = call(
        "train",
        "-m",
        "run.name=s",
        "model.attention_pattern=causal,prefix_lm,prefixlm",
        "data.questions_per_row=1",
        *data,
    )
    assert ended.status == 1 and "Traceback" not in ended.err
    names = [
        f"model.attention_pattern={attention_pattern}" for attention_pattern in ("causal", "prefix_lm", "prefixlm")
    ]
    table = ended.out.rpartition("\n\n")[2].splitlines()
    assert table[0].split() == ["job", "score", "[95", "%", "interval]", "report"] and len(table) == 4
    for name, row in zip(names[:2], table[1:], strict=False):
        score = metrics(home / "runs" / "s" / name)["metrics"]["vqa_accuracy"]
        low, high = score["interval"]
        assert row.split()[0] == name and f"vqa_accuracy {score['overall']:.2f} [{low:.2f}, {high:.2f}]" in row
        assert row.endswith(f"runs/s/{name}/report.html")
        assert OmegaConf.load(home / "runs" / "s" / name / "config.yaml").run.name == f"s/{name}"
    assert table[3].split()[:3] == [names[2], "refused", "error:"]
    assert [path.name for path in home.iterdir()] == ["runs"]

    before = content(home / "runs" / "s" / names[0])
    again = call(
        "train", "-m", "run.name=s", "model.attention_pattern=causal,prefix_lm", "data.questions_per_row=1", *data
    )
    assert again.status == 1 and again.out.count("already holds a run") == 2
    assert content(home / "runs" / "s" / names[0]) == before


@pytest.mark.slow
def test_sigterm_ends_the_sweep(home: Path, whole: Path) -> None:
    """What a scheduler sends before it takes the machine: the job at work saves, and no other starts."""
    given = ("data=vqav2", f"data.root={whole}", *SMALL, "attributions=0", "log_samples=0", "trainer.max_steps=2000")
    process = start("train", "-m", f"run.dir={home / 's'}", RATES, *given)
    first, second = (home / "s" / f"trainer.learning_rate={rate}" for rate in ("0.001", "0.0001"))
    while process.poll() is None and not losses(first):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in printed + errors
    assert f"stopped by SIGTERM, saved in {first}/latest" in printed
    assert (first / "latest").exists() and not second.exists()


@pytest.mark.long
def test_jobs_of_a_launcher_are_in_the_table(home: Path, whole: Path) -> None:
    """Submitit's local executor: each job in a process of its own."""
    given = ("data=vqav2", f"data.root={whole}", *SMALL, "attributions=0", "log_samples=0")
    ended = done(call("train", "-m", "hydra/launcher=submitit_local", "run.name=s", "seed=0,1", *given))
    rows = ended.out.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["seed=0", "seed=1"]
    assert all((home / "runs" / "s" / f"seed={seed}" / "metrics.json").is_file() for seed in range(2))


def test_a_misspelt_key_is_named(home: Path) -> None:
    said = sentence(call("train", "-m", "trainer.lerning_rate=1e-3,1e-4"))
    assert "no key 'trainer.lerning_rate'; did you mean 'trainer.learning_rate=1e-3,1e-4'?" in said
    said = sentence(call("train", "model=tiny,tinny", "-m"))
    assert "model=tinny: there is no conf/model/tinny.yaml; did you mean 'tiny'?" in said
    assert not list(home.iterdir())


@pytest.mark.parametrize(
    ("script", "given", "folder", "named"),
    [
        ("train", ("run.name=s", RATES), "runs/s", True),
        ("train", (RATES,), "runs/tiny-shapes", True),
        ("train", ("run.dir=/else/where", RATES), "/else/where", True),
        ("train", ("run.name='seed-${seed}'", "seed=0,1"), "runs/sweeps/train-", False),
        ("train", ("model=glob(tiny*)",), "runs/sweeps/train-", False),  # a part of the usual name
        ("train", ("run.name='seed-${seed}'", "seed=range(3)", RATES), "runs/seed-0", True),
        ("train", ("hydra/launcher=submitit_local", "run.name=s", RATES), "runs/s", True),
        ("merge", ("models=[a,b]", "output=runs/merged", "density=0.2,0.5"), "runs/merged", True),
        ("prepare", ("split=train,val",), "runs/sweeps/prepare-", False),
    ],
)
def test_jobs_that_would_share_a_folder_get_their_own(
    script: str, given: tuple[str, ...], folder: str, named: bool
) -> None:
    given = ("pack", *given, "-m") if script == "prepare" else ("-m", *given)
    sweep = Sweep.of(compose(given, script), script)
    assert str(sweep.folder).startswith(folder) and (sweep.output is not None) == named


def test_a_run_is_not_deleted_with_the_sweep_below_it(home: Path, whole: Path) -> None:
    (home / "runs" / "s").mkdir(parents=True)
    for file in ("multirun.yaml", "log.jsonl"):
        (home / "runs" / "s" / file).write_text("x")
    given = ("data=vqav2", f"data.root={whole}", *SMALL, "run.name=s", "run.overwrite=true")
    assert "runs/s also holds the runs of a sweep" in sentence(call("train", *given))
