"""What a script answers before it imports PyTorch: -h, --cfg job, a shell's completion, a mistake in its command line.

Each script imports this first. Where the command line is one of these, the import answers and ends the process.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import yaml

from vlmvqa import startup
from vlmvqa.config.help import PAGES
from vlmvqa.places import CALLED_AS  # and with it `vlmvqa`, which quietens what transformers' imports would say

HERE = Path(__file__).resolve().parent
CONF = HERE.parent / "conf"
# Where a config's name is not its script's.
OTHERS = {"run": "helm"}
WIDTH = 120
# What is asked of Hydra, in place of a run.
ASKING = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version")


def answer(script: Path, arguments: list[str]) -> None:
    """End the process with what the arguments ask for, or with what is wrong with them; else return."""
    name = OTHERS.get(script.stem, script.stem)
    if {"-sc", "--shell-completion", "--shell_completion"} & set(arguments):
        _complete(name)
    if {"-h", "--help"} & set(arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `-h | head` ends as other programs do
        print(page(script, arguments[0]))
        sys.exit()
    if "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:  # of several, one says it: `command_line.run`
        given = _refuse(name, arguments)
        if {argument.partition("=")[0] for argument in arguments} & set(ASKING):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            _ask_hydra(name, given)


def page(script: Path, word: str = "") -> str:
    """What -h prints: what the script does, examples, its most used keys, the groups' choices, where to read on.

    Args:
        word: its first argument; of `prepare`, what is to be made.
    """
    name = OTHERS.get(script.stem, script.stem)
    documented = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    shown = PAGES[f"{name} {word}"] if f"{name} {word}" in PAGES else f"{documented}\n\n{PAGES.get(name, '')}"
    choices = "\n".join(_choices(name))
    every = "vlmvqa helm" if name == "helm" else f"python launch/{script.name}"
    more = f"Everything that can be set, and what it is now: {every} --cfg job"
    text = "\n\n".join([shown.strip(), f"Groups, as group=choice:\n{choices}", more])
    return as_called(text) if CALLED_AS in os.environ else text


def as_called(text: str) -> str:
    """A page's commands as the installed package takes them; columns stay columns."""
    lines = []
    for line in text.splitlines():
        new = re.sub(r"\bpython launch/(\w+)\.py", r"vlmvqa \1", line)
        new = re.sub(r"\baccelerate launch launch/(\w+)\.py", r"accelerate launch -m vlmvqa \1", new)
        new = re.sub(r"\bdeepspeed launch/(\w+)\.py", r"deepspeed --module vlmvqa \1", new)
        gap = re.search(r"(?<=\S) {3,}(?=\S)", new)
        if new != line and gap:
            about = new[gap.end() :]
            new = new[: gap.start()].ljust(len(line) - len(about) - 1) + " " + about
        lines.append(new)
    return "\n".join(lines)


def _choices(name: str) -> Iterator[str]:
    """Each config group that a script takes, with the names of its files."""
    for group in _groups(name):
        names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        yield textwrap.fill(names, WIDTH, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)


def _groups(name: str) -> Iterator[str]:
    for entry in yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            yield from entry
        elif (CONF / f"{entry}.yaml").exists() and entry != "hydra_quiet":  # plan takes all that train takes
            yield from _groups(entry)


def _complete(name: str) -> NoReturn:
    """Hydra's shell completion of this config."""
    sys.argv[0] = os.environ.get(CALLED_AS, sys.argv[0])  # what Hydra tells the shell to complete
    if name == "prepare" and "COMP_LINE" in os.environ:  # its first word is no override
        os.environ["COMP_LINE"] = re.sub(r"(prepare\.py|vlmvqa) +\w+ ", r"\1 ", os.environ["COMP_LINE"])
    _ask_hydra(name, sys.argv[1:])


def _ask_hydra(name: str, arguments: list[str]) -> NoReturn:
    """Let Hydra answer about this config."""
    import hydra

    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(lambda config: None)()
    sys.exit()


def _refuse(name: str, arguments: list[str]) -> list[str]:
    """End with a sentence where the command line cannot be meant; else return what Hydra takes of it."""
    from vlmvqa.config.keys import refuse_flags
    from vlmvqa.errors import InputError

    try:
        refuse_flags(arguments, name)  # before Hydra is imported
        return _checked(name, arguments)
    except InputError as error:
        sys.exit(f"error: {error}")


def _checked(name: str, arguments: list[str]) -> list[str]:
    """What Hydra takes of the arguments, after the checks that need no PyTorch."""
    from vlmvqa.config.early_checks import prepare_job, refuse_mistakes
    from vlmvqa.config.overrides import collect, compose, resolving

    asking = {argument.partition("=")[0] for argument in arguments} & set(ASKING)
    script = name
    if name == "prepare" and not (asking and arguments[0].startswith("-")):
        script, arguments = f"{name} {prepare_job(arguments)}", arguments[1:]
    given, configs = compose(collect(arguments, name), name)
    for config in [] if asking else configs:
        with resolving(config) as job:
            refuse_mistakes(job, script)
    return given


_script = Path(sys.argv[0]).resolve()
IMPORTS = contextlib.ExitStack()  # closed by `command_line.run`
if _script.parent == HERE or _script.parts[-3:] == ("evaluation", "helm", "run.py"):
    answer(_script, sys.argv[1:])
    startup.prepare()
    IMPORTS.enter_context(startup.fewer_imports())
