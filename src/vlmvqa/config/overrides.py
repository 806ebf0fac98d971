"""The overrides of a command line, checked before Hydra takes them: a misspelt key is a sentence with the right one.

Nothing here needs PyTorch, so that a mistake is said at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vlmvqa.config.keys import CONF, default_keys, flatten, refuse_flags, suggest_key
from vlmvqa.config.trainer_arguments import argument_types
from vlmvqa.errors import InputError, suggest

# Nodes that hold another library's arguments: any key may be added, and that library's builder checks it.
OPEN = ("overrides", "options", "weights", "metric_options", "extra_metrics")
# Keys that may be given several times, by config; their values are taken as they are, quotes and all.
REPEATABLE = {"predict": ("image", "question")}


def collect(arguments: Sequence[str], config_name: str) -> list[str]:
    """`question=a question=b` as one list, quoted for Hydra."""
    repeatable = REPEATABLE.get(config_name, ())
    kept = [argument for argument in arguments if argument.partition("=")[0] not in repeatable]
    for key in repeatable:
        values = [argument.partition("=")[2] for argument in arguments if argument.partition("=")[0] == key]
        if values:
            kept.append(f"{key}=[{','.join(map(quoted, values))}]")
    return kept


def _quoted_if_needed(argument: str) -> str:
    """An override whose value is not in Hydra's grammar (split=val[:10%]) is taken as the text that it is."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={quoted(value)}"
    return argument


def quoted(value: str) -> str:
    """A string in Hydra's grammar, where backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def check_overrides(arguments: Sequence[str], config_name: str) -> list[str]:
    """The arguments as Hydra takes them; `compose` says more."""
    return compose(arguments, config_name)[0]


def compose(arguments: Sequence[str], config_name: str) -> tuple[list[str], list[DictConfig]]:
    """What `_compose` returns; composed once where a script is checked first and then run."""
    return _compose(tuple(arguments), config_name)


@lru_cache(maxsize=1)
def _compose(arguments: tuple[str, ...], config_name: str) -> tuple[list[str], list[DictConfig]]:
    """The arguments as Hydra takes them: any of TrainingArguments may be given as trainer.x without a `+`.

    A group may be given with and without it: dist=fsdp is +dist=fsdp.

    Returns:
        the arguments; and their config with the `hydra` node. For a sweep: that of its first job, then one for each
        other value that is swept over.

    Raises:
        InputError: an override names a key or a group's choice that does not exist; the nearest is suggested.
    """
    refuse_flags(arguments, config_name)
    given = [_quoted_if_needed(argument) for argument in arguments]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    given = [arg.lstrip("+") if arg.lstrip("+").partition("=")[0] in groups else arg for arg in given]
    _refuse_words(given)
    overrides = [argument for argument in given if "=" in argument and not argument.startswith("-")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            jobs = list(_jobs(overrides)) if is_sweep(given) else [overrides]
            known = Known(config_name, hydra.compose(config_name, _choices(jobs[0])), given)
            checked = {override: known.checked(override) for override in overrides}
            configs = [known.composed(job) for job in jobs]
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(" ".join(str(error).split())) from error
    return [checked.get(argument, argument) for argument in given], configs


@contextmanager
def resolving(config: DictConfig) -> Iterator[DictConfig]:
    """Yield a copy of a composed config as Hydra's job has it: without the `hydra` node, which `${hydra:...}` reads."""
    current, before = HydraConfig.instance(), HydraConfig.instance().cfg
    current.set_config(config)
    job = copy.deepcopy(config)
    with open_dict(job):
        del job["hydra"]
    try:
        yield job
    except OmegaConfBaseException as error:
        raise InputError(" ".join(str(error).split())) from error
    finally:
        current.cfg = before


# ---- sweeps


def is_sweep(arguments: Sequence[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def swept_values(override: str) -> list[str]:
    """The override with each value that a sweep takes from it (a=1,2); one that is not swept as it is."""
    parsed = OverridesParser.create().parse_override(override)
    key = override.partition("=")[0]
    value = parsed.value()
    if isinstance(value, Glob):
        return [f"{key}={name}" for name in value.filter(sorted(path.stem for path in (CONF / key).glob("*.yaml")))]
    return [f"{key}={value}" for value in parsed.sweep_string_iterator()] if parsed.is_discrete_sweep() else [override]


def _jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of a sweep's first job, then those with one other value, which is enough to find every mistake."""
    values = [swept_values(override) for override in overrides]
    first = [choices[0] for choices in values]
    yield first
    for place, choices in enumerate(values):
        yield from ([*first[:place], other, *first[place + 1 :]] for other in choices[1:])


# ---- what is checked


def _refuse_words(arguments: Sequence[str]) -> None:
    """Stop at a word that sets nothing; what follows an option may be its value (--cfg job)."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if "=" not in argument and not argument.startswith(("-", "~")) and not before.startswith("-"):
            raise InputError(f"'{argument}' is no setting; give settings as key=value")


def _choices(overrides: Iterable[str]) -> list[str]:
    """The overrides that choose a file of a group (model=tiny, +experiment=x)."""
    chosen = []
    for override in overrides:
        key, _, choice = override.lstrip("+~").partition("=")
        group = key.partition("@")[0]  # data@data.parts.gqa=gqa: a choice that is put elsewhere
        if (CONF / group).is_dir():
            names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            if choice not in names:
                raise InputError(f"{group}={choice}: there is no conf/{group}/{choice}.yaml{suggest(choice, names)}")
            chosen.append(override)
    return chosen


class Known:
    """The keys that a config has with the groups' files that were chosen."""

    def __init__(self, config_name: str, config: DictConfig, arguments: Sequence[str]) -> None:
        self.config_name, self.arguments = config_name, arguments
        self.content: Any = OmegaConf.to_container(config, resolve=False)

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """The config with the overrides, and its `hydra` node."""
        _choices(overrides)
        return hydra.compose(self.config_name, [self.checked(one) for one in overrides], return_hydra_config=True)

    def checked(self, override: str) -> str:
        """The override as Hydra takes it; refused where its key does not exist."""
        key, _, value = override.lstrip("+~").partition("=")
        parts = key.split(".")
        if (CONF / key.partition("@")[0]).is_dir() or parts[0].startswith("hydra"):
            return override
        node = self.content
        for depth, part in enumerate(parts):
            if isinstance(node, dict) and part in node:
                node = node[part]
                continue
            opened = depth > 0 and parts[depth - 1] in OPEN and isinstance(node, dict)
            if opened or (parts[0] == "trainer" and part in argument_types()):
                return "++" + override.lstrip("+")
            names = {*flatten(self.content), *default_keys(self.config_name, self.arguments)}
            raise InputError(f"there is no key '{key}'{suggest_key(key, value, names)}")
        if parts[-1] in OPEN and isinstance(node, dict) and not override.startswith("~"):  # all of a group at once
            return "++" + override.lstrip("+")
        return override
