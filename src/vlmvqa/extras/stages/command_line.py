"""Compose and check the settings of each stage, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vlmvqa.config import early_checks
from vlmvqa.config.overrides import Composition, Job, quoted
from vlmvqa.errors import InputError, suggest

# Settings of the run, not of a stage.
OF_THE_RUN = ("run", "resume", "resume_force", "seed", "hub_id", "dist", "init_from", "experiment", "stages")


def with_stages(
    composition: Composition, arguments: Sequence[str], compose: Callable[[Sequence[str]], Job]
) -> Composition:
    """Return the job of the last stage, with the job of every stage in `values["stages"]`.

    Later settings win. The stages stand where the command line gives them, or before it, in an experiment; a setting
    for one stage alone (`stages.<name>.<key>=...`) comes last.

    Args:
        composition: the `values["stages"]` of its job are the settings of each stage by name. The jobs of a sweep (-m)
            are composed again, one after the other, and so not changed here.
        arguments: the command line.
        compose: composes a command line as if it had no stages.

    Raises:
        InputError: the settings of a stage contradict each other, or belong to the run.
    """
    if len(composition.jobs) > 1:
        return composition
    given = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    parts = [_key(argument).split(".") for argument in given]
    place = max((number for number, part in enumerate(parts) if part[0] == "stages" and len(part) <= 2), default=-1)
    common = {number: argument for number, argument in enumerate(given) if parts[number][0] != "stages"}
    before, after = ([one for n, one in common.items() if (n < place) == earlier] for earlier in (True, False))
    jobs: dict[str, Job] = {}
    for name, own in composition.jobs[0].values["stages"].items():
        try:
            _refuse_keys(own, is_first=not jobs)
            settings = {_key(setting): setting for setting in [*before, *own, *after, *_alone(name, given)]}
            stage = compose(list(settings.values()))
        except InputError as error:
            raise InputError(f"stages.{name}: {error}") from None
        jobs[name] = Job({**stage.values, "stages": {}}, stage.given)
    last = jobs[next(reversed(jobs))]
    return replace(composition, jobs=[Job({**last.values, "stages": jobs}, last.given)])


def refuse_stage_mistakes(stages: Mapping[str, Job | Sequence[str]], command: str) -> None:
    """Raise an InputError at the first mistake in the values of a stage; a sweep's are not composed yet."""
    for name, stage in stages.items():
        try:
            if isinstance(stage, Job):
                early_checks.refuse_mistakes(stage.values, command)
        except InputError as error:
            raise InputError(f"stages.{name}: {error}") from None


def stage_override(name: str, stages: Mapping[str, Sequence[str]], arguments: Sequence[str]) -> str:
    """Return the override of a stage's list of settings that holds those given as `stages.<name>.<key>=...` too."""
    if name not in stages:
        listed = f"the experiment has {', '.join(stages)}" if stages else "the experiment has none"
        raise InputError(f"stages.{name}: there is no such stage{suggest(name, stages)} ({listed})")
    return f"++stages.{name}=[{','.join(map(quoted, [*stages[name], *_alone(name, arguments)]))}]"


def _alone(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the settings that the command line gives for one stage."""
    prefix = f"stages.{name}."
    return [one.partition(prefix)[2] for one in arguments if one.lstrip("+").startswith(prefix)]


def _refuse_keys(settings: Sequence[str], is_first: bool) -> None:
    """Raise at settings that a stage cannot have: later stages train the model of the first one."""
    if not isinstance(settings, list):
        raise InputError(f"{settings} should be a list of settings, [trainable.vision=none, trainer.max_steps=100]")
    for key in map(_key, settings):
        if key.split(".")[0] in OF_THE_RUN:
            raise InputError(f"{key} cannot be set in a stage: it is the same for the run; set it without stages.")
        if sets_model(key) and not is_first:
            raise InputError(f"{key} cannot be set here: the model is that of the stage before; leave it out")


def sets_model(key: str) -> bool:
    """Return whether a key sets something about the model that a saved model has already."""
    return key.replace("/", ".").split(".")[0] == "model" and key != "model.dtype"


def _key(setting: str) -> str:
    return setting.lstrip("+~").partition("=")[0]
