"""What the pages say: each command's script and keys exist, and each link leads somewhere.

The commands themselves are run by tests/end_to_end/test_readme.py, test_docs_tasks.py and
tests/distributed/test_launchers.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from command_line import check_overrides, collect
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    blocks = page.read_text().split("```")[1::2]
    lines = [line for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    scripts = r"launch/\w+\.(py|slurm)|-m evaluation\.helm\.run"
    return [line.split("  #")[0].strip() for line in lines if re.search(scripts, line)]


ALL = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page.stem}: {command}" for page, command in ALL])
def test_every_command_is_understood(page: Path, command: str) -> None:
    words = shlex.split(command)
    place = next(n for n, word in enumerate(words) if word.startswith(("launch/", "evaluation.")))
    script = ROOT / words[place]
    if words[place] == "evaluation.helm.run":
        script = ROOT / "evaluation" / "helm" / "run.py"
    assert script.exists()
    config = {"run": "helm"}.get(script.stem, "train" if script.suffix == ".slurm" else script.stem)
    arguments = collect(words[place + 1 :], ["image", "question"] if config == "predict" else [])
    check_overrides(arguments, config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_there_are_commands() -> None:
    assert len(ALL) >= 20
