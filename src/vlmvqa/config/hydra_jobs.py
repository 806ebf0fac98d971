"""What Hydra does by itself: shell completion, printing the config (--cfg job), and the jobs of a sweep (-m)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vlmvqa import ranks
from vlmvqa.config.overrides import Composition, Job, is_sweep, keys_of, resolve
from vlmvqa.config.sweep import Sweep
from vlmvqa.paths import CALLED_AS, CONF


def complete(name: str) -> NoReturn:
    """Let Hydra complete a command line of this config."""
    sys.argv[0] = os.environ.get(CALLED_AS, sys.argv[0])  # the command that Hydra tells the shell to complete
    if name == "prepare" and "COMP_LINE" in os.environ:  # its first word is no override
        os.environ["COMP_LINE"] = re.sub(r"(prepare\.py|vlmvqa) +\w+ ", r"\1 ", os.environ["COMP_LINE"])
    ask(name, sys.argv[1:])


def ask(name: str, arguments: list[str]) -> NoReturn:
    """Let Hydra print something about this config."""
    sys.argv[1:] = arguments
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(lambda config: None)()
    sys.exit()


def run(start: Callable[[Job], bool | None], config_name: str, composition: Composition) -> None:
    """Let Hydra compose and run the jobs of a sweep one after the other, or print the config."""
    sweep = None
    if is_sweep(sys.argv):
        sweep = Sweep.of(composition, config_name)
        first = next((place for place, argument in enumerate(sys.argv) if place and "=" in argument), len(sys.argv))
        sys.argv[first:first] = sweep.overrides  # next to the others: argparse takes only one group of them
        sweep.begin()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def job(config: DictConfig) -> None:
        one = Job(resolve(config), keys_of(HydraConfig.get().overrides.task))
        if sweep is None:
            start(one)
        else:
            sweep.run(one, start)

    done = True
    try:
        job()
    finally:
        if sweep is not None and ranks.is_first():
            done = sweep.finish()
    if not done:
        sys.exit(1)
