"""Compose and check the settings of a run, given in a file of conf/ and with `base=...`; without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmvqa.config import early_checks, overrides
from vlmvqa.config.overrides import Job
from vlmvqa.errors import InputError
from vlmvqa.paths import CONF

SIZES = ("full", "smoke")
PER_RUN = ("run.name", "run.dir", "run.overwrite", "resume", "seed", "hub_id")  # settings that runs cannot share


def chosen_file(values: Mapping[str, Any], command: str) -> Mapping[str, Any]:
    """Return the group of the command's own name, a file of conf/<command>.

    Raises:
        InputError: none is chosen, or `size` is unknown.
    """
    if values.get(command) is None:
        names = ", ".join(sorted(path.stem for path in (CONF / command).glob("*.yaml")))
        raise InputError(f"{command} must be given; use {command}=... with one of {names}")
    if values["size"] not in SIZES:
        raise InputError(f"size={values['size']} is unknown; use one of {', '.join(SIZES)}")
    group: Mapping[str, Any] = values[command]
    return group


def common_settings(group: Mapping[str, Any], base: Sequence[str], size: str) -> list[str]:
    """Return the settings of all runs: the group's own, its small version's, and those that are given.

    A given experiment or saved model replaces the group's own model (and data).
    """
    kinds = {setting.lstrip("+").partition("=")[0] for setting in base}
    saved = kinds & {"init_from", "init_from.model"}
    replaced = {"model", "data"} if "experiment" in kinds else {"model"} if saved else set()
    own = [setting for setting in group["base"] if setting.partition("=")[0] not in replaced]
    return [*own, *(group["smoke"] if size == "smoke" else ()), *base]


def latest(settings: Sequence[str]) -> list[str]:
    """Return the last of the settings with the same key."""
    return list({setting.lstrip("+").partition("=")[0]: setting for setting in settings}.values())


def compose_run(settings: Sequence[str], command: str, script: str = "train") -> Job:
    """Compose and check a run of a command, as the script does; of settings with the same key, the last one counts."""
    job = overrides.compose(latest(settings), script).jobs[0]
    for key in PER_RUN:
        if key in job.given:
            raise InputError(f"{key} cannot be set in a {command}: it is not the same in all runs; leave it out")
    if job.values["data"]["source"] == "mixture":
        raise InputError(f"data=mixture has several scores; a {command} compares one, so choose one of its datasets")
    early_checks.refuse_mistakes(job.values, script)
    return job
