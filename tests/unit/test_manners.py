"""What a contributor and a packager rely on: the hooks, the changelog, one version, a typed package."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import vlmvqa
from tests.conftest import ROOT

HOOKS = ROOT / ".pre-commit-config.yaml"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BIN = Path(sys.executable).parent


def test_the_hooks_run_what_make_lint_runs() -> None:
    from pre_commit.clientlib import load_config

    (repository,) = load_config(str(HOOKS))["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    linted = re.findall(r"^\t\$\(BIN\)/((?:ruff|mypy)[^.\n]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert entries == [line.replace("--check", "").strip() for line in linted]
    assert all((BIN / entry.split()[0]).exists() for entry in entries)


def test_a_commit_with_a_fault_is_stopped(tmp_path: Path) -> None:
    """In a repository of its own, with the hooks of this one."""
    hooks = yaml.safe_load(HOOKS.read_text())
    (tmp_path / HOOKS.name).write_text(yaml.safe_dump(hooks))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(BIN)
    (tmp_path / "bad.py").write_text("import os\n")
    environment = {**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "home"), "GIT_CONFIG_GLOBAL": os.devnull}
    for command in (["git", "init", "-q"], ["git", "add", "bad.py", HOOKS.name]):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    run = [str(BIN / "pre-commit"), "run", "ruff", "--files", "bad.py"]
    ended = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "F401" in ended.stdout, ended.stdout + ended.stderr
    (tmp_path / "bad.py").write_text('"""Nothing."""\n')
    assert subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode == 0


def test_the_version_is_said_in_one_place() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: vlmvqa.__version__" and "project" not in PYPROJECT
    released = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == vlmvqa.__version__


def test_the_package_is_typed_and_strict_where_it_says_so() -> None:
    assert (ROOT / "src" / "vlmvqa" / "py.typed").exists()
    (strict,) = (one for one in PYPROJECT["tool"]["mypy"]["overrides"] if "follow_imports" not in one)
    packages = ("sequence", "metrics", "models", "extras.pretrained", "extras.adapters")
    assert strict["module"] == [f"vlmvqa.{package}.*" for package in packages]
    said = subprocess.run([str(BIN / "mypy"), "--help"], capture_output=True, text=True, check=True).stdout
    flags = re.search(r"--strict +Strict mode; enables the following flags:(.*?)\n  --", said, re.DOTALL)
    assert flags
    named = {flag.removeprefix("--") for flag in re.sub(r"\s", "", flags[1]).split(",")}
    here = {f"no-{name}" if value is False else name for name, value in strict.items() if name != "module"}
    everywhere = {name for name, value in PYPROJECT["tool"]["mypy"].items() if value is True}
    assert named - {name.replace("_", "-") for name in here | everywhere} == set()


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target
