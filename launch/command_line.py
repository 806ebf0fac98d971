"""Hydra's command line, made kind: one sentence for what the user can mend, a traceback only for our mistakes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmvqa.errors import InputError, suggest

CONF = Path(__file__).resolve().parent.parent / "conf"


def run(main: Callable[[DictConfig], None], config_name: str) -> None:
    """Run `main` as a Hydra job over `conf/<config_name>.yaml`, with this process's command line."""
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], config_name)
    except InputError as error:
        sys.exit(f"error: {error}")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def job(config: DictConfig) -> None:
        try:
            main(config)
        except InputError as error:
            # From a DataLoader's worker the message is a traceback that ends with "...InputError: sentence".
            sys.exit("error: " + str(error).strip().splitlines()[-1].rpartition("InputError: ")[2])
        except KeyboardInterrupt:
            sys.exit("stopped by the keyboard; go on with resume=auto")

    job()


def check_overrides(arguments: list[str], config_name: str) -> list[str]:
    """The arguments as Hydra takes them: trainer.* keys that are TrainingArguments need no `+`.

    Raises:
        InputError: an override names a key or a group's choice that does not exist; the nearest is suggested.
    """
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        known = OmegaConf.to_container(hydra.compose(config_name, _choices(overrides)), resolve=False)
        known_keys = sorted(_flatten(known))
        checked = {override: _check(override, known, known_keys) for override in overrides}
        try:
            hydra.compose(config_name, list(checked.values()), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(str(error).splitlines()[0]) from error
    return [checked.get(argument, argument) for argument in arguments]


def _choices(overrides: list[str]) -> list[str]:
    """The overrides that choose a file of a group (model=tiny, +experiment=x)."""
    chosen = []
    for override in overrides:
        group, _, choice = override.lstrip("+~").partition("=")
        folder = CONF / group
        if folder.is_dir():
            names = sorted(path.stem for path in folder.glob("*.yaml"))
            if choice not in names:
                raise InputError(f"{group}={choice}: there is no conf/{group}/{choice}.yaml{suggest(choice, names)}")
            chosen.append(override)
    return chosen


def _check(override: str, known: object, known_keys: list[str]) -> str:
    from transformers import TrainingArguments

    key = override.lstrip("+~").partition("=")[0]
    if (CONF / key).is_dir() or key.partition(".")[0] == "hydra":
        return override
    if override.startswith("~"):
        return override
    group, _, name = key.partition(".")
    if group == "trainer" and name and key not in known_keys:
        fields = [field.name for field in dataclasses.fields(TrainingArguments)]
        if name.partition(".")[0] in fields:
            return "++" + override.lstrip("+")
        raise InputError(f"there is no key '{key}'{suggest(key, [f'trainer.{f}' for f in fields])}")
    node = known
    for part in key.split("."):
        if not isinstance(node, dict):
            raise InputError(f"there is no key '{key}'{suggest(key, known_keys)}")
        if part not in node:
            if key.split(".")[-2:-1] in (["overrides"], ["options"]):  # arguments of another library, checked by it
                return "++" + override.lstrip("+")
            raise InputError(f"there is no key '{key}'{suggest(key, known_keys)}")
        node = node[part]
    return override


def _flatten(node: object, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [prefix + str(key) for key in node] + [
        name for key, value in node.items() for name in _flatten(value, f"{prefix}{key}.")
    ]
