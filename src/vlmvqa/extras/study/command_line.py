"""Check a study's command line, and the settings of each of its arms, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmvqa.config.overrides import Job
from vlmvqa.errors import InputError, suggest
from vlmvqa.extras.run_series.settings import chosen_file, common_settings, compose_run
from vlmvqa.paths import refuse_missing

# Values of `study.equal`, and the key of `trainer` that must then be equal; FLOPs are those of the baseline's training.
EQUAL = {"steps": "max_steps", "questions": "num_train_epochs", "flops": None}


def compose_arms(values: Mapping[str, Any], script: str = "train") -> dict[str, Job]:
    """Compose the arms of a study, the baseline first.

    Args:
        values: the config of launch/study.py as plain values; its keys other than `study` and `base` may be missing.
        script: compose the arms for this one: "train" or "plan".

    Raises:
        InputError: the study's settings contradict each other, or arms cannot run; with the reason for each.
    """
    if find_spec("scipy") is None:
        raise InputError("scipy is not installed; install it with: pip install 'vlmvqa[study]'")
    values = {"arms": None, "size": "full", "seeds": [0], "runs": {}, **values}
    study, chosen, seeds = chosen_file(values, "study"), values["arms"], values["seeds"]
    if study["equal"] not in EQUAL:
        raise InputError(f"study.equal={study['equal']} is unknown; use one of {', '.join(EQUAL)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={list(seeds)} must be different numbers, at least one")
    arms, wanted = study["arms"], chosen_arms(study["baseline"], study["arms"], chosen)
    for name in wanted:
        if name not in arms:
            raise InputError(f"there is no arm '{name}'{suggest(name, arms)} (the study has {', '.join(arms)})")
    jobs: dict[str, Job] = {}
    problems: dict[str, str] = {}
    for name in wanted:
        try:
            common = common_settings(study, values["base"], values["size"])
            jobs[name] = compose_run([*common, *arms[name]], "study", script)
        except InputError as error:
            problems[name] = str(error)
    refuse_arms(problems, len(wanted))
    for name, folders in values["runs"].items():
        if name in arms:
            raise InputError(f"runs.{name}: the study has an arm of this name; choose another name")
        for folder in folders:
            refuse_missing(f"runs.{name}", str(Path(folder, "metrics.json")))
    _refuse_unequal(study["equal"], {name: job.values["trainer"] for name, job in jobs.items()})
    return jobs


def chosen_arms(baseline: str, arms: Iterable[str], chosen: Sequence[str] | str | None) -> list[str]:
    """Return the names of the baseline and of the chosen arms (None: all)."""
    chosen = list(arms) if chosen is None else [chosen] if isinstance(chosen, str) else chosen
    return list(dict.fromkeys([baseline, *chosen]))


def refuse_arms(problems: Mapping[str, str], arms: int) -> None:
    """Raise an InputError with the problems of all arms, if there are any."""
    if len(problems) == arms and len(set(problems.values())) == 1:
        raise InputError(next(iter(problems.values())))
    if problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise InputError(f"{len(problems)} of {arms} arms cannot run: {listed}")


def _refuse_unequal(equal: str, trainers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise if the arms would not have in common what `study.equal` requires."""
    if any(trainer.get("early_stopping_patience") for trainer in trainers.values()):
        raise InputError("trainer.early_stopping_patience ends runs at different steps; leave it out of a study")
    limits = [trainer["max_steps"] for trainer in trainers.values()]
    if equal == "questions" and max(limits) > 0:
        raise InputError("study.equal=questions sets the length by trainer.num_train_epochs; drop trainer.max_steps")
    if equal == "steps" and min(limits) <= 0:
        raise InputError("study.equal=steps sets the length by trainer.max_steps; give it in study.base or as base=...")
    key = EQUAL[equal]
    amounts = {name: trainer[key] for name, trainer in trainers.items()} if key else {}
    if len(set(amounts.values())) > 1:
        listed = ", ".join(f"{name} {amount}" for name, amount in amounts.items())
        raise InputError(f"study.equal={equal} needs the same trainer.{key} in all arms, which have {listed}")
