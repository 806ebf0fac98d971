"""Check a sweep's command line, and the settings at the ends of its search space, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from vlmvqa.config.overrides import Job
from vlmvqa.errors import InputError
from vlmvqa.extras.run_series.settings import chosen_file, common_settings, compose_run
from vlmvqa.extras.sweep.space import override, read_space


def compose_sweep(values: Mapping[str, Any]) -> list[Job]:
    """Compose the run with the first value of each parameter, and one with each other value that is checked.

    Args:
        values: the config of launch/sweep.py as plain values.

    Raises:
        InputError: the sweep's settings contradict each other, or runs of its space cannot be trained.
    """
    if find_spec("optuna") is None:
        raise InputError("optuna is not installed; install it with: pip install 'vlmvqa[sweep]'")
    sweep = chosen_file(values, "sweep")
    if type(values["trials"]) is not int or values["trials"] < 1:
        raise InputError(f"trials={values['trials']} should be a whole number, at least 1")
    space = read_space(sweep["space"])
    given = {setting.lstrip("+").partition("=")[0] for setting in values["base"]}
    for key in space:
        if key in given:
            raise InputError(f"base={key}=...: the sweep searches {key}; leave it out, or change sweep.space.{key}")
    common = common_settings(sweep, values["base"], values["size"])
    first = {key: override(key, parameter.checked[0]) for key, parameter in space.items()}
    others = [(key, override(key, value)) for key, parameter in space.items() for value in parameter.checked[1:]]
    jobs = []
    for changed in [{}, *({key: setting} for key, setting in others)]:
        try:
            jobs.append(compose_run([*common, *{**first, **changed}.values()], "sweep"))
        except InputError as error:
            raise InputError(f"{error} ({', '.join(changed.values())})" if changed else str(error)) from None
        if sweep["pruning"] is not None and jobs[-1].values["trainer"]["eval_strategy"] in (None, False, "no"):
            raise InputError(
                "sweep.pruning compares evaluations during training, of which there are none; add "
                "base=trainer.eval_strategy=steps and base=trainer.eval_steps=..., or sweep.pruning=null"
            )
    if len({job.values["data"]["metric"] for job in jobs}) > 1:
        raise InputError("sweep.space changes data.metric, but a sweep compares one score; leave such choices out")
    return jobs
