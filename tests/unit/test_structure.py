"""The structure: what the core may import, how large it is, and where Hydra is used."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vlmvqa.config import overrides
from vlmvqa.config.overrides import compose
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2

# Imports an extra, as an entry point: users import it, nothing in the core does.
ENTRY = "vlmvqa.hf"
# Files and lines that a script imports at module level, with all that these import.
LIMITS = {
    "launch/train.py": (50, 7500),
    "launch/eval.py": (45, 6500),
    "launch/predict.py": (30, 4500),
    "src/vlmvqa/models/vlm.py": (14, 1500),
}
LOADED = (55, 8500)  # modules and lines in sys.modules after a training step


def module_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.dump(node.test):
                yield from module_level(node.body)
            yield from module_level(node.orelse)
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from module_level(node.body)


def names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that an import may load; ours have no relative imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0 and node.module
    return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name for node in module_level(tree.body) for name in names(node)}


def source(module: str) -> Path | None:
    if module == "vlmvqa.evaluation" or module.startswith("vlmvqa.evaluation."):
        place = ROOT.joinpath(*module.split(".")[1:])
    else:
        place = (ROOT / "src").joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def closure(path: Path) -> dict[Path, int]:
    """The project's files that a file imports, itself included, with their lines."""
    found: dict[Path, int] = {}
    waiting = [path]
    while waiting:
        here = waiting.pop()
        if here in found:
            continue
        found[here] = here.read_text(encoding="utf-8").count("\n")
        for name in imported(here):
            parts = name.split(".")
            waiting += filter(None, (source(".".join(parts[:end])) for end in range(1, len(parts) + 1)))
    return found


def test_no_core_module_imports_an_extra() -> None:
    core = [path for path in (ROOT / "src" / "vlmvqa").rglob("*.py") if "extras" not in path.parts]
    for path in [path for path in core if path != source(ENTRY)]:
        extras = [name for name in imported(path) if f"{name}.".startswith(("vlmvqa.extras.", f"{ENTRY}."))]
        assert not extras, f"{path.relative_to(ROOT)} imports {extras[0]} at module level"


@pytest.mark.parametrize("entry", LIMITS)
def test_the_core_stays_small(entry: str) -> None:
    found, (files, lines) = closure(ROOT / entry), LIMITS[entry]
    largest = sorted(((count, str(path.relative_to(ROOT))) for path, count in found.items()), reverse=True)
    assert len(found) <= files and sum(found.values()) <= lines, f"{len(found)} files, {sum(found.values())}: {largest}"


@pytest.mark.parametrize("entry", LIMITS)
def test_the_architecture_page_prints_the_size(entry: str) -> None:
    """Lines are rounded there, so that not every change of the code changes the page."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{entry}` |"))
    _, now, most = (
        (int(n.replace(",", "")) for n in re.findall(r"[\d,]+(?= files| lines)", cell)) for cell in row.split("|")[2:5]
    )
    found = closure(ROOT / entry)
    files, lines = now
    assert len(found) == files and abs(sum(found.values()) - lines) <= 0.03 * lines, (len(found), sum(found.values()))
    assert tuple(most) == LIMITS[entry]


TRAIN_A_STEP = """\
import json, runpy, sys
from transformers import trainer_callback

def report(*_, **__):
    modules = {{name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "vlmvqa"}}
    print(json.dumps({{name: path for name, path in modules.items() if path}}))
    sys.stdout.flush()

trainer_callback.CallbackHandler.on_train_end = report
sys.argv = ["launch/train.py", *{arguments!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_training_step_loads_little_more(tmp_path: Path) -> None:
    """So that imports were removed, not moved into functions."""
    root = synthetic_vqav2.write(tmp_path / "data", train_images=6, val_images=4, questions_per_image=2)
    arguments = ["data=vqav2", f"data.root={root}", "trainer.max_steps=1", "trainer.eval_strategy=no", "report=false"]
    arguments += ["attributions=0", "logger=none", "log_samples=0", f"run.dir={tmp_path / 'run'}"]
    program = TRAIN_A_STEP.format(arguments=arguments, script=str(ROOT / "launch" / "train.py"))
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    loaded: dict[str, str] = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith('{"vlmvqa')))
    lines = {name: Path(path).read_text(encoding="utf-8").count("\n") for name, path in loaded.items()}
    assert len(lines) <= LOADED[0] and sum(lines.values()) <= LOADED[1], sorted(lines.items(), key=lambda one: -one[1])


def test_hydra_is_used_by_the_command_line_alone() -> None:
    """And OmegaConf: every other function takes plain values or frozen dataclasses."""
    users = {
        path.relative_to(ROOT).parts[:3]
        for folder in ("src", "launch", "evaluation", "bench")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(name.split(".")[0] in ("hydra", "omegaconf") for name in names(node))
    }
    assert users == {("src", "vlmvqa", "config")}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("train", ["model=tiny_paligemma", "data=gqa", "data.root=x", "seed=1", "trainer.max_steps=3"]),
        ("eval", ["checkpoint=a", "data=shapes", "decoding.max_new_tokens=3"]),
        ("prepare", ["check", "data=gqa", "data.root=x"]),
    ],
)
def test_a_command_composes_its_config_once(name: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    composed, really = [], overrides.hydra.compose

    def count(*arguments: object, **named: object) -> object:
        composed.append(arguments)
        return really(*arguments, **named)

    monkeypatch.setattr(overrides.hydra, "compose", count)
    for cached in (overrides._compose, overrides._with_groups):  # of tests that ran before
        cached.cache_clear()
    first = compose(given, name)  # before PyTorch is imported
    assert compose(given, name) is first and len(composed) == 1  # and when the job runs
    assert {argument.partition("=")[0] for argument in given if "=" in argument} <= first.jobs[0].given


def test_scripts_are_short() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 60, f"{path.name} has {text.count(chr(10))} lines"
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(functions) <= 1, f"{path.name} holds library code"
