"""What the pages say: blocks are run or say what they need, commands are understood, links lead somewhere.

The rules are in tests/pages.py; blocks are run by tests/end_to_end/test_docs.py, and by what `BY_OTHERS` names there.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.end_to_end.test_docs import BY_OTHERS, is_run_here
from tests.pages import LANGUAGES, PAGES, SCRIPT, STAND_INS, Block, blocks, commands, script
from vlmvqa.config.overrides import compose

BLOCKS = [block for page in PAGES for block in blocks(page)]
ALL = [(page, command) for command, page in {one: page for page in PAGES for one in commands(page)}.items()]
# What a block may need beyond what the tests stand in for: something that is not in every machine.
LACKING = (
    *("GPU", "machines", "SLURM", "network", "token", "weights", "minutes", "hours", "Jupyter", "helm-run", "space"),
    ".venv-harnesses",  # made by make test-harnesses
    *("all of", "as published", "1,000 questions"),  # of a data set
)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_run_or_says_what_it_needs(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block}: name its language, one of {LANGUAGES}"
    if block.needs is not None:
        unknown = [what for what in block.lacks if what not in STAND_INS and not any(one in what for one in LACKING)]
        assert not unknown, f"{block}: needs {unknown}, which is known neither in tests/pages.py nor here"
    if block.language == "bash" and block.can_be_run:
        for command in block.commands:
            by = [test for pattern, test in BY_OTHERS.items() if re.search(pattern, command)]
            assert is_run_here(command) or by, f"{block}: nothing runs {command!r}; run it, or say what it *Needs ....*"
    elif block.language == "json":
        assert [json.loads(line) for line in block.text.splitlines()]
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    elif block.language == "text":
        prompt = re.search(r"^ *(\$|python|make|pip|accelerate|torchrun|deepspeed) ", block.text, re.MULTILINE)
        assert not prompt, f"{block} holds a command; make it bash"


def test_what_runs_other_blocks_is_there() -> None:
    assert all((ROOT / test).exists() for test in BY_OTHERS.values())


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.excerpt_of], ids=str)
def test_an_excerpt_stands_in_its_file(block: Block) -> None:
    """Word by word and in order; `...` leaves lines out."""
    assert block.excerpt_of
    lines = (ROOT / block.excerpt_of).read_text().splitlines()
    for piece in re.split(r"^\.\.\.\n", block.text, flags=re.MULTILINE):
        length = len(piece.splitlines())
        found = (at for at in range(len(lines)) if same("\n".join(lines[at : at + length]), piece))
        at = next(found, None)
        assert at is not None, f"{block}: {block.excerpt_of} has changed; copy from there what begins with\n{piece}"
        lines = lines[at + length :]


def same(one: str, other: str) -> bool:
    return textwrap.dedent(one).strip() == textwrap.dedent(other).strip()


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page.stem}: {command}" for page, command in ALL])
def test_every_command_is_understood(page: Path, command: str) -> None:
    words = [word for word in shlex.split(command) if word != "&"]
    place = next(n for n, word in enumerate(words) if word == "helm" or SCRIPT.fullmatch(word))
    assert words[place] == "helm" or (ROOT / words[place]).exists()
    config = "train" if words[place].endswith(".slurm") else script(command)
    given = [word for word in words[place + 1 :] if word not in ("--cfg", "job")]
    if config == "prepare":
        assert given[0] in ("download", "check", "pack", "features", "harness")
    added = {"model=tiny_conv", "model/projector=convolution", "experiment=f1", "data=textvqa", "data.metric=word_f1"}
    if page.stem == "extending" and added & set(given):
        return  # its own choices are not in conf/: tests/end_to_end/test_docs_extending.py runs them
    compose(given, config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_extra_that_is_named_exists() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for page in PAGES:
        for extra in re.findall(r"vlmvqa\[(\w+)\]", page.read_text()):
            assert extra in setup["options.extras_require"], f"{page}: {extra}"


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)) <= targets, page


def test_the_readme_has_every_step() -> None:
    """Demo, own pictures, own data, resume, evaluate, HELM, several GPUs, adapters, merging: one command each."""
    text = "\n".join(line for block in blocks(ROOT / "README.md") for line in block.commands)
    for step in (
        *(
            "make demo",
            "make test",
            "predict.py checkpoint=runs/demo image=photo.jpg",
            "show.py",
            "eval.py checkpoint=",
        ),
        *("data=jsonl data.root=mine", "resume=auto", "vlmvqa helm", "accelerate launch", "adapt=", "merge.py"),
    ):
        assert step in text, step
    assert len((ROOT / "README.md").read_text().splitlines()) < 200  # five minutes
