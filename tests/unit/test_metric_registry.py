"""The metric registry: lazy imports, and public names that do not depend on the import order."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlmvqa import metrics
from vlmvqa.metrics.registry import METRICS, metric

PROGRAM = """
import sys
import vlmvqa.metrics.registry
print(*sorted(name for name in sys.modules if name.startswith("vlmvqa")))
"""


def test_importing_the_registry_imports_no_metric() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    expected = {"vlmvqa", "vlmvqa.errors", "vlmvqa.metrics", "vlmvqa.metrics.registry"}
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_is_found(name: str) -> None:
    assert metric(name).version.split(":")[0] == name
    assert set().union(*metric(name).variants.values()) <= set(metric(name).options)


def test_public_names_are_functions_and_classes_after_all_imports() -> None:
    for name in METRICS:
        metric(name)  # imports its module, which must not replace a function of the same name
    assert all(callable(getattr(metrics, name)) for name in metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'accuracy'"):
        metrics.accuracy  # noqa: B018
