"""Where the scripts of `launch/` lie: beside `src/` in a checkout, inside the package where it is installed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
LAUNCH = _HERE / "launch" if (_HERE / "launch").is_dir() else _HERE.parents[1] / "launch"
CALLED_AS = "VLMVQA_CALLED_AS"  # in the environment of a script that was started as `vlmvqa <script>`


def commands() -> dict[str, str]:
    """Each script that can be started, by its name, with how its docstring begins."""
    found = {}
    for path in sorted(LAUNCH.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            documented = ast.get_docstring(ast.parse(text)) or ""
            found[path.stem] = re.split(r"[.:;]", documented.replace("\n", " "))[0]
    return found
