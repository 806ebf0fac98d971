"""Command line: `vlmvqa train a=b` or `python -m vlmvqa train a=b` runs `python launch/train.py a=b` from any folder.

The script replaces this process (exec), so that launchers (`accelerate launch -m vlmvqa train`) and signals reach it
directly.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import sys
from pathlib import Path

from vlmvqa import __version__
from vlmvqa.errors import suggest
from vlmvqa.paths import CALLED_AS, HELM, HELM_MODULE, LAUNCH


def main() -> None:
    """Start the script named by the first argument."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a traceback in `vlmvqa | head`
    arguments = sys.argv[1:]
    # `deepspeed --module vlmvqa train` inserts --local_rank first.
    first = next((n for n, argument in enumerate(arguments) if not argument.startswith("--local_rank")), None)
    word = "" if first is None else arguments[first]
    known = commands()
    if word in ("", "-h", "--help"):
        print(listing(known))
    elif word == "--version":
        print(__version__)
    elif word == "-sc":
        complete(arguments, known)
    elif word not in known:
        sys.exit(f"error: vlmvqa has no command '{word}'; run vlmvqa -h for a list{suggest(word, known)}")
    else:
        start(word, [argument for n, argument in enumerate(arguments) if n != first])


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


def listing(known: dict[str, str]) -> str:
    """Return the help text: one line per command."""
    lines = "\n".join(f"  {name:<10}{summary}" for name, summary in known.items())
    return f"""\
vlmvqa {__version__}: train, change and measure vision-language models for visual question answering.

{lines}

  vlmvqa train -h                             settings of a command, with examples
  vlmvqa train run.name=first                 the same as python launch/train.py run.name=first in a checkout
  accelerate launch -m vlmvqa train +dist=fsdp
  eval "$(vlmvqa -sc install=bash)"           let bash complete commands, keys and choices"""


def start(name: str, arguments: list[str]) -> None:
    """Replace this process by the script."""
    script = ["-m", HELM_MODULE] if name == "helm" else [str(LAUNCH / f"{name}.py")]
    os.environ[CALLED_AS] = "vlmvqa"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *script, *arguments])


def complete(arguments: list[str], known: dict[str, str]) -> None:
    """Print shell completions: Hydra completes everything except the command's name."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if not any(argument.startswith("query=") for argument in arguments):
        start("train", arguments)  # installing completion is the same for all scripts
    elif len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(known))
    elif words[1] in known:
        os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
        start(words[1], arguments)


if __name__ == "__main__":
    main()
