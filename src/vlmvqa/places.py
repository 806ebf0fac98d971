"""Paths of the scripts in `launch/` and `evaluation/`: next to `src/` in a checkout, inside the package in a wheel."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE if (_HERE / "launch").is_dir() else _HERE.parents[1]
LAUNCH, CONF = _ROOT / "launch", _ROOT / "conf"
# Run as a module. A helm.py in launch/ would shadow crfm-helm's package `helm`.
HELM, HELM_MODULE = _ROOT / "evaluation" / "helm" / "run.py", "vlmvqa.evaluation.helm.run"
CALLED_AS = "VLMVQA_CALLED_AS"  # environment variable of scripts that were started as `vlmvqa <script>`


def scripts() -> dict[str, Path]:
    """Return the path of each script by its name."""
    found = {path.stem: path for path in LAUNCH.glob("*.py") if '\nif __name__ == "__main__":' in _text(path)}
    return dict(sorted({**found, "helm": HELM}.items()))


def commands() -> dict[str, str]:
    """Return the beginning of each script's docstring by the script's name."""
    documented = {name: ast.get_docstring(ast.parse(_text(path))) or "" for name, path in scripts().items()}
    return {name: re.split(r"[.:;]", text.replace("\n", " "))[0] for name, text in documented.items()}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
