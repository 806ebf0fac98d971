"""VLMEvalKit's own runner on a table that launch/prepare.py wrote."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.scripts import call, done, metrics, predictions
from vlmvqa.errors import InputError
from vlmvqa.evaluation.compare_scores import compare
from vlmvqa.evaluation.vlmevalkit_adapter.run import own_tables, split_arguments

kit = pytest.mark.skipif(
    importlib.util.find_spec("vlmeval") is None,
    reason="VLMEvalKit has an environment of its own: make test-harnesses",
)
TABLE = "vlmvqa_vqav2_val"


@pytest.mark.harness
@kit
def test_answers_and_score_equal_ours(scored: Path) -> None:
    """The score under the variant of its normalisation."""
    tables, output = scored / "vlmevalkit", scored / "outputs"
    data = ("data=vqav2", f"data.root={scored / 'data'}", "harness.format=vlmevalkit")
    done(call("prepare", "harness", *data, f"harness.dir={tables}"))
    command = [sys.executable, "-m", "vlmvqa.evaluation.vlmevalkit_adapter.run", f"checkpoint={scored / 'run'}"]
    command += [f"tables={tables}", "name=ours", "--data", TABLE, "--work-dir", str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    (path,) = (output / "ours").glob(f"*/ours_{TABLE}_results.xlsx")
    text = compare(scored / "eval", path)
    n = len(predictions(scored / "eval"))
    assert f"{n} of {n} answers are equal" in text, ended.stderr[-3000:]
    with next(path.parent.glob("*_acc.csv")).open() as file:
        theirs = float(next(csv.DictReader(file))["Overall"])
    assert metrics(scored / "eval")["metrics"]["vqa_accuracy"]["overall"] < theirs
    assert re.search(rf"^their score +{theirs:.2f}$", text, re.MULTILINE), text
    assert "reason: the harness scores as our normalize=always" in text


def test_arguments_are_ours_or_vlmevalkits() -> None:
    words = ["checkpoint=runs/a", "--data", TABLE, "MMBench", "--work-dir", "out", "name=a", "--judge-args={'a=b': 1}"]
    ours, theirs = split_arguments(words)
    assert ours == {"checkpoint": "runs/a", "name": "a"}
    assert theirs == ["--data", TABLE, "MMBench", "--work-dir", "out", "--judge-args={'a=b': 1}"]
    option, text = own_tables(theirs)
    assert option == "--data-config" and text.count("ImageVQADataset") == 1 and "MMBench" not in text
    assert own_tables([*theirs, option, text]) == []
    for wrong, said in ((["--data", TABLE], "checkpoint=... is missing"), (["chekpoint=a"], "chekpoint= is unknown")):
        with pytest.raises(InputError, match=re.escape(said)):
            split_arguments(wrong)
