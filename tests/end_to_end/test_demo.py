"""`make demo`, whole: the longest of all tests, so it is the first to start (conftest.py)."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_make_demo_keeps_its_promise() -> None:
    """At least 95 % on pictures never seen, at most 55 % with the pictures shuffled."""
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((ROOT / "runs" / "demo" / "metrics.json").read_text())
    print(done.stdout[-900:])
    assert metrics["metrics"]["vqa_accuracy"]["overall"] >= 95
    assert metrics["controls"]["shuffled_images"]["overall"] <= 55
    assert "report: runs/demo/report.html" in done.stdout
