"""Hydra's own functions: shell completion, printing the config (--cfg job), and the jobs of a sweep (-m).

Imports no PyTorch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from omegaconf import DictConfig

from vlmvqa.config.overrides import Composition, Job, compose, is_sweep, keys_of, resolve
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
    from vlmvqa import ranks
    from vlmvqa.config.sweep import Sweep

    sweep = None
    if is_sweep(sys.argv):
        sweep = Sweep.of(composition, config_name)
        first = next((place for place, argument in enumerate(sys.argv) if place and "=" in argument), len(sys.argv))
        sys.argv[first:first] = sweep.overrides  # next to the others: argparse takes only one group of them
        sweep.begin()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def job(config: DictConfig) -> None:
        one = Job(resolve(config), keys_of(HydraConfig.get().overrides.task))
        with outside_hydra():
            if one.values.get("stages"):
                one = compose(HydraConfig.get().overrides.task, config_name).jobs[0]
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


@contextmanager
def outside_hydra() -> Iterator[None]:
    """Let a job compose further configs, as a study does for its arms: Hydra refuses that while it runs a job."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def swept_values(override: str) -> list[str]:
    """Return the override with each value that a sweep takes from it (a=1,2); without a sweep, itself."""
    parsed = OverridesParser.create().parse_override(override)
    key = override.partition("=")[0]
    value = parsed.value()
    if isinstance(value, Glob):
        return [f"{key}={name}" for name in value.filter(sorted(path.stem for path in (CONF / key).glob("*.yaml")))]
    return [f"{key}={value}" for value in parsed.sweep_string_iterator()] if parsed.is_discrete_sweep() else [override]


def sweep_jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield the overrides of a sweep's first job, then those with one other value: enough to find every mistake."""
    values = [swept_values(override) for override in overrides]
    first = [choices[0] for choices in values]
    yield first
    for place, choices in enumerate(values):
        yield from ([*first[:place], other, *first[place + 1 :]] for other in choices[1:])
