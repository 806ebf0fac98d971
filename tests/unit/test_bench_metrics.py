"""The measurement of the metrics runs, and its scores are the official evaluator's where that is installed."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import clock, metrics

pytest.importorskip("rapidfuzz")

SMALL = ["--answers", "20", "--pairs", "20", "--captions", "20", "--repeats", "1"]


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is measured elsewhere; Java's tokenizer takes a second to start."""
    monkeypatch.setattr(clock, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(clock, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)


@pytest.mark.slow
def test_prints_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "metrics.json"
    assert metrics.main([*SMALL, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    printed = capsys.readouterr().out
    assert all(f"| {name}" in printed for name in rows)
    assert {name: row["allowed"] for name, row in rows.items() if row["allowed"]} == {
        "VQA accuracy": 1,
        "ANLS": 0.1,
        "captions, in all": 6,
    }
    assert all(row["seconds"] > 0 and row["scores"] for row in rows.values())
    for name in ("captions: bleu", "captions: rouge_l", "captions: cider"):
        if importlib.util.find_spec("pycocoevalcap"):
            assert rows[name]["difference"] < 1e-9 and rows[name]["times_faster"] > 0
        else:
            assert rows[name]["official_seconds"] is rows[name]["times_faster"] is None


def test_another_score_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = metrics.cases

    def off(args: Any) -> Any:
        first, *_ = drawn(args)
        return [replace(first, official=lambda: {"overall": 0.1})]

    monkeypatch.setattr(metrics, "cases", off)
    assert metrics.main([*SMALL, "--out", str(tmp_path / "metrics.json")]) == 1
