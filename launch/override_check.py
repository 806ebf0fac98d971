"""The overrides of a command line, checked before Hydra takes them: a misspelt key is a sentence with the right one.

Nothing here needs PyTorch, so that a mistake is said at once.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmvqa.errors import InputError, suggest

CONF = Path(__file__).resolve().parent.parent / "conf"
# Nodes that hold another library's arguments: any key may be added, and that library's builder checks it.
OPEN = ("overrides", "options", "weights", "scoring", "also")
# Keys that may be given several times, by config; their values are taken as they are, quotes and all.
REPEATABLE = {"predict": ("image", "question")}


def collect(arguments: Sequence[str], config_name: str) -> list[str]:
    """`question=a question=b` as one list, quoted for Hydra."""
    repeatable = REPEATABLE.get(config_name, ())
    kept = [argument for argument in arguments if argument.partition("=")[0] not in repeatable]
    for key in repeatable:
        values = [argument.partition("=")[2] for argument in arguments if argument.partition("=")[0] == key]
        quoted = ",".join(_quote(value) for value in values)
        if values:
            kept.append(f"{key}=[{quoted}]")
    return kept


def _quoted_if_needed(argument: str) -> str:
    """An override whose value is not in Hydra's grammar (split=val[:10%]) is taken as the text that it is."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={_quote(value)}"
    return argument


def _quote(value: str) -> str:
    """A string in Hydra's grammar, where backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def check_overrides(arguments: Sequence[str], config_name: str) -> list[str]:
    """The arguments as Hydra takes them: any of TrainingArguments may be given as trainer.x without a `+`.

    A group may be given with and without it: dist=fsdp is +dist=fsdp.

    Raises:
        InputError: an override names a key or a group's choice that does not exist; the nearest is suggested.
    """
    if {"-m", "--multirun"} & set(arguments):  # a sweep: Hydra composes its jobs, and says what is wrong with them
        return list(arguments)
    arguments = [_quoted_if_needed(argument) for argument in arguments]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    arguments = [arg.lstrip("+") if arg.lstrip("+").partition("=")[0] in groups else arg for arg in arguments]
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            known = OmegaConf.to_container(hydra.compose(config_name, _choices(overrides)), resolve=False)
            checked = {override: _checked(override, known) for override in overrides}
            hydra.compose(config_name, list(checked.values()), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(" ".join(str(error).split())) from error
    return [checked.get(argument, argument) for argument in arguments]


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


def _checked(override: str, known: Any) -> str:
    key = override.lstrip("+~").partition("=")[0]
    parts = key.split(".")
    if (CONF / key.partition("@")[0]).is_dir() or parts[0].startswith("hydra"):
        return override
    node = known
    for depth, part in enumerate(parts):
        if isinstance(node, dict) and part in node:
            node = node[part]
            continue
        opened = depth > 0 and parts[depth - 1] in OPEN and isinstance(node, dict)
        if opened or (parts[0] == "trainer" and part in trainer_keys()):
            return "++" + override.lstrip("+")
        names = [*_flatten(known), *(f"trainer.{name}" for name in trainer_keys() if "trainer" in known)]
        raise InputError(f"there is no key '{key}'{suggest(key, names)}")
    if parts[-1] in OPEN and isinstance(node, dict) and not override.startswith("~"):  # all of a group at once
        return "++" + override.lstrip("+")
    return override


@cache
def trainer_keys() -> list[str]:
    """The names of transformers' TrainingArguments, read in its source: an import takes seconds."""
    package = importlib.util.find_spec("transformers")
    assert package and package.submodule_search_locations
    source = Path(package.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    (of,) = (one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == "TrainingArguments")
    fields = [one.target for one in of.body if isinstance(one, ast.AnnAssign)]
    return [field.id for field in fields if isinstance(field, ast.Name)]


def _flatten(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    children = [name for key, value in node.items() for name in _flatten(value, f"{prefix}{key}.")]
    return [prefix + str(key) for key in node] + children
