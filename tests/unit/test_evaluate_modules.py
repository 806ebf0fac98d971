"""The modules for `evaluate` load by path without a network and return the same numbers as vlmvqa.metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

for package in ("evaluate", "nltk", "rapidfuzz", "sacrebleu"):
    pytest.importorskip(package)

FOLDER = ROOT / "evaluation" / "metrics"
ANSWERS = {"predictions": ["yes", "a red car"], "references": [["yes"] * 9 + ["no"], ["a red car", "red car"]]}
RECORD = {
    "isBalanced": True,
    "question": "What color is it?",
    "answer": "red",
    "semantic": [{"operation": "query", "argument": "color"}],
    "types": {"structural": "query", "semantic": "attr", "detailed": "color"},
    "groups": {"global": "color"},
}
GQA = {"predictions": ["red", "blue"], "references": ["1", "2"], "questions": {"1": RECORD, "2": RECORD}}
SCRIPT = """
import json, sys, evaluate
given = json.loads(sys.argv[1])
found = {name: evaluate.load(f"evaluation/metrics/{name}").compute(**inputs) for name, inputs in given.items()}
print(json.dumps(found))
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compute every module's scores in a process with an empty cache and no network."""
    given: dict[str, Any] = {
        "vqa_accuracy": {**ANSWERS, "answer_types": ["yes/no", "other"]},
        "anls": ANSWERS,
        "exact_match": ANSWERS,
        "relaxed_accuracy": ANSWERS,
        "caption_scores": {**ANSWERS, "metrics": ["rouge_l"]},
        "gqa_scores": {**GQA, "postprocess": "llava"},
        "helm_bleu_1": ANSWERS,
        "corpus_bleu": ANSWERS,
    }
    home = {
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(given)],
        cwd=ROOT,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return scores


def test_vqa_accuracy(found: dict[str, Any]) -> None:
    assert found["vqa_accuracy"] == {
        "vqa_accuracy": 66.67,
        "per_answer_type": {"yes/no": 100.0, "other": 33.33},
        "per_question_type": {},
        "per_question": [100.0, pytest.approx(100 / 3)],
    }


@pytest.mark.parametrize("name", ["anls", "exact_match", "relaxed_accuracy", "helm_bleu_1"])
def test_scores_of_questions(name: str, found: dict[str, Any]) -> None:
    assert found[name] == {name: 1.0, "per_question": [1.0, 1.0]}


def test_captions(found: dict[str, Any]) -> None:
    assert found["caption_scores"] == {"rouge_l": 1.0, "per_image": [{"rouge_l": 1.0}] * 2}


def test_gqa(found: dict[str, Any]) -> None:
    assert (found["gqa_scores"]["accuracy"], found["gqa_scores"]["consistency"]) == (50, None)
    assert "choices" in found["gqa_scores"]["reasons"]["validity"]


def test_corpus_bleu(found: dict[str, Any]) -> None:
    assert found["corpus_bleu"]["precisions"][:2] == [100, 100]
    assert found["corpus_bleu"]["signature"].startswith("nrefs:var|")


def test_every_module_is_there(found: dict[str, Any]) -> None:
    names = {path.name for path in FOLDER.iterdir() if (path / f"{path.name}.py").is_file()}
    assert names == {*found, "clip_similarity"}  # that one needs a model


def test_modules_are_loaded_as_evaluate_reads_them() -> None:
    """`evaluate` parses lines that begin with "import" or "from" as imports of one name."""
    for path in FOLDER.glob("*/*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                assert "," not in line and "(" not in line, (path, line)
