"""Run a script of `launch/`: help, completion and checks before PyTorch is imported; a user's error prints one line.

A script looks like this. Under `python launch/train.py`, the `with` block first answers -h and a shell's completion and
stops at a mistake in the command line, all without PyTorch; then it imports what the job needs.

    with cli.script(__name__, __file__):
        from vlmvqa.config.schema import TrainConfig
        from vlmvqa.training.run import train

    if __name__ == "__main__":
        cli.run("train", TrainConfig, train)
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlmvqa.errors import InputError

if TYPE_CHECKING:
    from vlmvqa.config.overrides import Job

Config = TypeVar("Config")
Main = Callable[[Config], "bool | None"]
# Scripts whose config has another name.
CONFIG_NAMES = {"run": "helm"}


# ---- before PyTorch is imported


@contextlib.contextmanager
def script(name: str, file: str) -> Iterator[None]:
    """Prepare the process of a script with this `__name__` and `__file__`; the block holds its imports.

    Ends the process if the command line asks for help or a completion, or holds a mistake. Does nothing where the
    script is imported.
    """
    if name != "__main__":
        yield
        return
    from vlmvqa import startup

    _answer(Path(file).resolve(), sys.argv[1:])
    startup.prepare()
    with startup.fewer_imports():
        yield


def _answer(script: Path, arguments: list[str]) -> None:
    """End the process with what the arguments ask for, or with the mistake in them; else return."""
    from vlmvqa.config.early_checks import refuse_flags

    name = CONFIG_NAMES.get(script.stem, script.stem)
    if {"-sc", "--shell-completion", "--shell_completion"} & set(arguments):
        from vlmvqa.config import hydra_jobs

        hydra_jobs.complete(name)
    if {"-h", "--help"} & set(arguments):
        from vlmvqa.config.help import page

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `-h | head` ends without a traceback
        print(page(name, script, arguments[0]))
        sys.exit()
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:  # of several ranks, one prints the mistake: `run`
        return
    try:
        refuse_flags(arguments, name)  # before Hydra is imported
        from vlmvqa.config import early_checks, overrides

        composition = overrides.compose(arguments, name)
        asking = bool({argument.partition("=")[0] for argument in arguments} & set(overrides.PRINTS))
        for job in [] if asking else composition.jobs:
            early_checks.refuse_mistakes(job.values, name)
    except InputError as error:
        sys.exit(f"error: {error}")
    if asking:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        from vlmvqa.config import hydra_jobs

        hydra_jobs.ask(name, composition.arguments)


# ---- the job


def run(config_name: str, kind: type[Config], main: Main[Config]) -> None:
    """Run `main` with this process's command line, composed over `conf/<config_name>.yaml`.

    Args:
        kind: the class of the configuration that `main` takes.
        main: the job; returns True if a signal stopped it.
    """
    from vlmvqa import ranks
    from vlmvqa.config import overrides

    launcher = ranks.launcher_choice(os.environ, sys.argv[1:])
    if "SLURM_PROCID" in os.environ:
        from vlmvqa.training.rendezvous import slurm_task

        os.environ |= slurm_task(os.environ)
    # `deepspeed` puts --local_rank=0 before the overrides, where Hydra would take it for one.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(("--local_rank", "--local-rank"))]
    try:
        composition = overrides.compose(arguments, config_name)
    except InputError as error:
        from vlmvqa import failures

        failures.stop(f"error: {error}")
    sys.argv[1:] = composition.arguments
    start = partial(_guarded, main, kind, config_name, launcher)
    if any(argument.startswith("-") for argument in arguments):  # Hydra's options: --cfg job, -m
        from vlmvqa.config import hydra_jobs

        hydra_jobs.run(start, config_name, composition)
    else:
        start(composition.jobs[0])
    if ranks.world_size() > 1:
        leave()


def _guarded(
    main: Main[Config], kind: type[Config], config_name: str, launcher: tuple[str, str] | None, job: Job
) -> bool | None:
    """Run `main`; an error that the user can correct ends the process with one sentence."""
    import torch.distributed

    from vlmvqa.config import compose, early_checks

    try:
        early_checks.refuse_mistakes(job.values, config_name)
        return main(compose.build(kind, job.values, job.given, launcher))
    except (Exception, KeyboardInterrupt) as error:
        from vlmvqa import failures

        failures.end(error)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def leave() -> None:
    """End a finished run of several ranks without tearing down the interpreter.

    Threads of process groups that some library still holds can abort Python there, and the launcher would then stop
    the other ranks while they write the results.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
