"""Compose the configuration once: check the command line's overrides, let Hydra compose, resolve to plain values.

Imports no PyTorch, so that a mistake is reported at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmvqa.config.early_checks import argument_types, flatten, refuse_flags
from vlmvqa.errors import InputError, suggest
from vlmvqa.paths import CONF

# Nodes that hold another library's arguments: any key may be added, and that library's builder checks it.
OPEN = (
    "overrides",
    "options",
    "weights",
    "metric_options",
    "extra_metrics",
    "runs",
    "space",
    "init_from",
    "stages",
    "tiles",
)
# Keys that may be given several times, by config; their values are taken literally, quotes included.
REPEATABLE = {"predict": ("image", "question"), **dict.fromkeys(("study", "sweep", "plan"), ("base",))}
# Options with which Hydra prints something in place of running a job.
PRINTS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version")


@dataclass(frozen=True)
class Job:
    """One configuration that a command line composes.

    Attributes:
        values: the resolved values; a missing one is `???`.
        given: the keys that the command line sets.
    """

    values: dict[str, Any]
    given: frozenset[str]


@dataclass(frozen=True)
class Composition:
    """A command line, composed.

    Attributes:
        arguments: the command line in Hydra's grammar.
        jobs: its configuration; of a sweep that of the first job, then one for each other value that is swept over.
    """

    arguments: list[str]
    jobs: list[Job]


def compose(arguments: Sequence[str], config_name: str) -> Composition:
    """Compose a command line. Repeated calls with the same one return the same composition.

    Any of TrainingArguments may be given as trainer.x without a `+`; a group may be given with and without it.

    Raises:
        InputError: an override names a key or a group's choice that does not exist; the nearest is suggested.
    """
    composition = _compose(tuple(arguments), config_name)
    if not composition.jobs[0].values.get("stages"):
        return composition
    from vlmvqa.extras.stages.command_line import with_stages

    return with_stages(composition, arguments, lambda given: _compose(tuple(given), config_name).jobs[0])


@lru_cache(maxsize=32)  # of a study also its arms, of a sweep the ends of its space
def _compose(arguments: tuple[str, ...], config_name: str) -> Composition:
    refuse_flags(arguments, config_name)
    given = [_quoted_if_needed(argument) for argument in _collected(arguments, config_name)]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    given = [arg.lstrip("+") if arg.lstrip("+").partition("=")[0] in groups else arg for arg in given]
    _refuse_words(given)
    overrides = [argument for argument in given if "=" in argument and not argument.startswith("-")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            first, *others = [overrides]
            if is_sweep(given):
                from vlmvqa.config.hydra_jobs import sweep_jobs

                first, *others = sweep_jobs(overrides)
            content = OmegaConf.to_container(_with_groups(config_name, tuple(filter(_is_choice, first))), resolve=False)
            # A sweep's overrides as they are given, since Hydra composes its jobs again, one after the other.
            checked = {one: _check_override(config_name, content, one, given) for one in overrides}
            jobs = [_with_values(config_name, job, given) for job in (first, *others)]
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(" ".join(str(error).split())) from error
    return Composition([checked.get(argument, argument) for argument in given], jobs)


@lru_cache(maxsize=32)  # the runs of a study mostly choose the same files; they are not to be changed
def _with_groups(config_name: str, choices: tuple[str, ...]) -> DictConfig:
    """Let Hydra compose the chosen files of the groups."""
    return hydra.compose(config_name, list(choices), return_hydra_config=True)


def _with_values(config_name: str, overrides: Sequence[str], arguments: Sequence[str]) -> Job:
    """Apply the other overrides, as Hydra does after composing the groups: composing again would take as long."""
    config = copy.deepcopy(_with_groups(config_name, tuple(filter(_is_choice, overrides))))
    content = OmegaConf.to_container(config, resolve=False)
    values = [_check_override(config_name, content, one, arguments) for one in overrides if not _is_choice(one)]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    return Job(resolve(config), keys_of(overrides))


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain values, `${...}` resolved, without Hydra's own node; missing ones are `???`."""
    current, before = HydraConfig.instance(), HydraConfig.instance().cfg
    if "hydra" in config:
        current.set_config(config)
    try:
        own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
        values: dict[str, Any] = OmegaConf.to_container(own, resolve=True)  # type: ignore[assignment]
        return values
    except OmegaConfBaseException as error:
        raise InputError(" ".join(str(error).split())) from error
    finally:
        current.cfg = before


def keys_of(overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys that overrides set."""
    return frozenset(override.lstrip("+~").partition("=")[0] for override in overrides)


# ---- the command line in Hydra's grammar


def _collected(arguments: Sequence[str], config_name: str) -> list[str]:
    """Return `question=a question=b` as one list, quoted for Hydra; the first word of prepare.py as `job=word`."""
    if config_name == "prepare" and not (arguments and arguments[0].startswith(PRINTS)):
        from vlmvqa.extras.dataset_tools.command_line import prepare_job

        arguments = [f"job={prepare_job(arguments)}", *arguments[1:]]
    repeatable = REPEATABLE.get(config_name, ())
    kept = [argument for argument in arguments if argument.partition("=")[0] not in repeatable]
    for key in repeatable:
        values = [argument.partition("=")[2] for argument in arguments if argument.partition("=")[0] == key]
        if values:
            kept.append(f"{key}=[{','.join(map(quoted, values))}]")
    return kept


def _quoted_if_needed(argument: str) -> str:
    """Return an override with its value quoted if that is not in Hydra's grammar (split=val[:10%])."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={quoted(value)}"
    return argument


def quoted(value: str) -> str:
    """Return a string in Hydra's grammar, where backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether the command line starts several jobs."""
    return bool({"-m", "--multirun"} & set(arguments))


# ---- checks


def _refuse_words(arguments: Sequence[str]) -> None:
    """Raise at a word without `=`; a word that follows an option may be its value (--cfg job)."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if "=" not in argument and not argument.startswith(("-", "~")) and not before.startswith("-"):
            raise InputError(f"'{argument}' is not a setting; give settings as key=value")


def _is_choice(override: str) -> bool:
    """Return whether an override chooses a file of a group (model=tiny); raise an InputError if it does not exist."""
    key, _, choice = override.lstrip("+~").partition("=")
    if key.startswith("hydra/"):  # Hydra's own groups: hydra/launcher=submitit_slurm
        return True
    group = key.partition("@")[0]  # data@data.parts.gqa=gqa: a choice for another place
    if not (CONF / group).is_dir():
        return False
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if choice not in names:
        raise InputError(f"{group}={choice}: there is no conf/{group}/{choice}.yaml{suggest(choice, names)}")
    return True


def _check_override(config_name: str, content: Any, override: str, arguments: Sequence[str]) -> str:
    """Return an override as Hydra takes it; raise an InputError if its key does not exist in the config's content."""
    key, _, value = override.lstrip("+~").partition("=")
    parts = key.split(".")
    if (CONF / key.partition("@")[0]).is_dir() or parts[0].startswith("hydra"):
        return override
    node = content
    if parts[0] == "stages" and len(parts) > 2:
        from vlmvqa.extras.stages.command_line import stage_override

        return stage_override(parts[1], content["stages"], arguments)
    for depth, part in enumerate(parts):
        if isinstance(node, dict) and part in node:
            node = node[part]
            continue
        opened = depth > 0 and parts[depth - 1] in OPEN and isinstance(node, dict | None)
        if opened or (parts[0] == "trainer" and part in argument_types()):
            return "++" + override.lstrip("+")
        from vlmvqa.config.suggestions import default_keys, suggest_key

        own = {name: inner for name, inner in content.items() if name != "hydra"}
        names = {*flatten(own), *default_keys(config_name, arguments)}
        raise InputError(f"there is no key '{key}'{suggest_key(key, value, names)}")
    if parts[-1] in OPEN and isinstance(node, dict) and not override.startswith("~"):  # a group replaced as one value
        return "++" + override.lstrip("+")
    return override
