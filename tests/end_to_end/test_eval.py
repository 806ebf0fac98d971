"""`launch/eval.py` from the command line: a killed evaluation, answers from a file, two runs compared."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.scripts import SHAPES, SMALL, call, done, metrics, sentence, start

DATA = ("data=vqav2", "data.synthetic=true", *SHAPES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.root={tmp_path_factory.mktemp('data') / 'shapes'}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done(call("train", *DATA, root, f"run.dir={folder}", *SMALL))
    return folder


def test_what_a_result_says_of_itself(trained: Path) -> None:
    found = metrics(trained)
    numbers = found["metrics"]["vqa_accuracy"]
    assert numbers["interval"][0] <= numbers["overall"] <= numbers["interval"][1]
    assert found["metric_version"].startswith("vqa_accuracy") and found["split"] == "val"
    assert len(found["data_fingerprint"]) == len(found["checkpoint_fingerprint"]) == 64
    assert {"torch", "transformers", "vlmvqa"} <= set(found["versions"])
    assert not list(trained.glob("answers-*"))  # what was kept while answering goes with the end


def test_a_killed_evaluation_ends_with_the_same_file(tmp_path: Path, trained: Path, root: str) -> None:
    folder = tmp_path / "killed"
    arguments = [f"checkpoint={trained}", *DATA, root, f"run.dir={folder}", "batch_size=1"]
    process = start("eval", *arguments)
    while process.poll() is None and not any(path.stat().st_size for path in folder.glob("answers-*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = [line for path in folder.glob("answers-*") for line in path.read_text().splitlines() if line]
    assert process.returncode == -signal.SIGKILL and kept and not (folder / "metrics.json").exists()
    done(call("eval", *arguments))
    done(call("eval", *arguments[:-2], f"run.dir={tmp_path / 'whole'}", "batch_size=1"))
    for name in ("predictions.jsonl", "submission.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert metrics(folder)["metrics"] == metrics(tmp_path / "whole")["metrics"]
    assert not list(folder.glob("answers-*"))


def test_answers_of_another_program_are_scored_without_a_model(tmp_path: Path, trained: Path, root: str) -> None:
    """From our file of answers and from the benchmark's results file: the same numbers, the controls none with why."""
    expected = metrics(trained)["metrics"]
    for name in ("predictions.jsonl", "submission.json"):
        folder = tmp_path / name
        ended = done(call("eval", f"predictions={trained / name}", *DATA, root, f"run.dir={folder}", "variants=true"))
        assert metrics(folder)["metrics"] == expected
        assert metrics(folder)["controls"]["shuffled_images"]["reason"] == "no model was loaded, only its answers"
        assert metrics(folder)["controls"]["prior"]["overall"] == metrics(trained)["controls"]["prior"]["overall"]
        assert "consensus=min3" in ended.out and (folder / "report.html").exists()


def test_two_runs_are_compared(tmp_path: Path, trained: Path, root: str) -> None:
    records = [json.loads(line) for line in (trained / "predictions.jsonl").open()]
    perfect = [{"question_id": record["question_id"], "answer": record["target"]} for record in records]
    (tmp_path / "perfect.json").write_text(json.dumps(perfect))
    done(call("eval", f"predictions={tmp_path / 'perfect.json'}", *DATA, root, f"run.dir={tmp_path / 'perfect'}"))
    ended = done(call("eval", f"compare=[{trained},{tmp_path / 'perfect'}]", f"run.dir={tmp_path / 'compared'}"))
    found = json.loads((tmp_path / "compared" / "compare.json").read_text())
    before, after = (
        metrics(folder)["metrics"]["vqa_accuracy"]["overall"] for folder in (trained, tmp_path / "perfect")
    )
    assert found["overall"]["difference"] == pytest.approx(after - before, abs=0.006)
    assert found["overall"]["p_permutation"] < 0.05 and found["flipped"] and str(found["n"]) in ended.out


def test_blank_images_are_a_third_control(tmp_path: Path, trained: Path, root: str) -> None:
    ended = done(call("eval", f"checkpoint={trained}", *DATA, root, f"run.dir={tmp_path / 'e'}", "blank_images=true"))
    assert metrics(tmp_path / "e")["controls"]["blank_images"]["overall"] is not None and "blank images" in ended.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "none is given"),
        (("checkpoint=a", "predictions=b"), "checkpoint and predictions are given"),
        (("compare=[a]",), "should name two folders"),
        (("compare=[a,b]",), "compare=a does not exist; the nearest existing path to"),
        (("predictions=nowhere.jsonl", *DATA, "data.root={tmp}/d"), "nowhere.jsonl does not exist"),
    ],
)
def test_what_cannot_be_scored_is_said(tmp_path: Path, given: tuple[str, ...], said: str) -> None:
    arguments = [argument.format(tmp=tmp_path) for argument in given]
    assert said in sentence(call("eval", *arguments, f"run.dir={tmp_path / 'e'}"))
