"""`vlmvqa train a=b`, also `python -m vlmvqa train a=b`: what `python launch/train.py a=b` does, from anywhere.

The script takes this process's place, so that launchers (`accelerate launch -m vlmvqa train`) and
signals meet it alone.
"""

from __future__ import annotations

import os
import signal
import sys

from vlmvqa import __version__
from vlmvqa.errors import suggest
from vlmvqa.places import CALLED_AS, HELM_MODULE, LAUNCH, commands


def main() -> None:
    """Start the script that the first word names."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `vlmvqa | head` ends as other programs do
    arguments = sys.argv[1:]
    # `deepspeed --module vlmvqa train` puts its own before all.
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
        sys.exit(f"error: vlmvqa has no command '{word}', as vlmvqa -h lists them{suggest(word, known)}")
    else:
        start(word, [argument for n, argument in enumerate(arguments) if n != first])


def listing(known: dict[str, str]) -> str:
    """All commands with a line each."""
    lines = "\n".join(f"  {name:<10}{about}" for name, about in known.items())
    return f"""\
vlmvqa {__version__}: train, change and measure vision-language models for visual question answering.

{lines}

  vlmvqa train -h                             what one takes, with examples
  vlmvqa train run.name=first                 the same as python launch/train.py run.name=first in a checkout
  accelerate launch -m vlmvqa train +dist=fsdp
  eval "$(vlmvqa -sc install=bash)"           let bash complete commands, keys and choices"""


def start(name: str, arguments: list[str]) -> None:
    """Become the script."""
    script = ["-m", HELM_MODULE] if name == "helm" else [str(LAUNCH / f"{name}.py")]
    os.environ[CALLED_AS] = "vlmvqa"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *script, *arguments])


def complete(arguments: list[str], known: dict[str, str]) -> None:
    """The shell's questions: Hydra answers them, but for the command's own name."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if not any(argument.startswith("query=") for argument in arguments):
        start("train", arguments)  # what installs completion is the same for all
    elif len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(known))
    elif words[1] in known:
        os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
        start(words[1], arguments)


if __name__ == "__main__":
    main()
