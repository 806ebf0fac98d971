"""What a command asks HELM for, checked as far as it can be without loading a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from command_line import group, refuse_overrides
from data_from_config import DataSettings, one_task, read_examples
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, all_answered
from vlmvqa.errors import InputError
from vlmvqa.models import saved

ENTRIES = ("vqav2", "gqa")  # run_specs.py has a run entry for each
NOT_HERE = {
    "max_instances that says how many": ("data.max_eval_samples", "data.max_train_samples"),
    "HELM that draws, from the validation questions": ("data.eval_split", "data.train_split"),
    "prompt=... that is used": ("data.prompt",),
    "the official files in data.root that HELM's questions are read from": (
        "data.hub",
        "data.packed",
        "data.streaming",
    ),
    "HELM's own": ("decoding.max_new_tokens", "decoding.temperature", "decoding.seed"),
}


@dataclass(frozen=True)
class Plan:
    """What HELM is going to be asked for, all of it checked.

    Attributes:
        home: HELM's files of all models: prod_env/ (what can be run, the cache), benchmark_output/.
        model: its name in HELM's tables.
        client: what answers: a model with arguments of `VLMClient`, or a file of predictions.
        source: whose questions.
        scenario: arguments of the run entry, but for the image mode.
        threads: of HELM.
        examples: the questions.
    """

    home: Path
    model: str
    client: Mapping[str, Any]
    source: str
    scenario: Mapping[str, Any]
    modes: Sequence[str]
    threads: int
    examples: Sequence[Example]

    @property
    def suite(self) -> str:
        """Of the runs that may stand in one table: about the same questions."""
        return f"{self.source}-{self.scenario['max_instances']}"

    @property
    def folder(self) -> Path:
        """Of what we leave."""
        return self.home / f"{self.model.rpartition('/')[2]}-{self.suite}"


def make_plan(config: DictConfig) -> Plan:
    """What the command asks for.

    Raises:
        InputError: it cannot be had.
    """
    given = [name for name in ("checkpoint", "predictions") if config[name] is not None]
    if len(given) != 1:
        said = "both are given" if given else "neither is given"
        raise InputError(f"say what to score: checkpoint=... (a model) or predictions=... (its answers); {said}")
    if config.data.source not in ENTRIES:
        raise InputError(f"data={config.data.source}: HELM asks {' or '.join(ENTRIES)} here; choose one of them")
    for reason, keys in NOT_HERE.items():
        refuse_overrides(reason, *keys)
    if given == ["predictions"]:
        refuse_overrides("the model's, and none is loaded", "prompt", *(f"decoding.{key}" for key in config.decoding))
        if config.controls:
            raise InputError("controls=true asks the model about other images; give checkpoint=... for it")
        path = Path(config.predictions).expanduser().resolve()
        if not path.is_file():
            raise InputError(f"predictions={path} does not exist; correct the path")
        client: dict[str, Any] = {"predictions": str(path)}
        name = path.parent.name
    else:
        folder = saved.find(config.checkpoint).resolve()
        if not (folder / saved.WEIGHTS).is_file():
            raise InputError(f"{folder} holds no {saved.WEIGHTS}; copy or save the model again")
        client = {"checkpoint": str(folder), "prompt": config.prompt, "source": config.data.source}
        client |= {"batch_size": config.batch_size, "decoding": _given_decoding(config)}
        name = (folder.parent if folder.name == "model" else folder).name
    data = one_task(config)
    scenario = {"root": str(Path(str(data.root)).expanduser().resolve())}
    if "," in scenario["root"]:
        raise InputError(
            f"data.root={data.root} holds a comma, which HELM's run entries cannot; move or link the folder"
        )
    return Plan(
        Path(group(config, "run")["dir"]).expanduser(),
        "vlmvqa/" + re.sub(r"[^\w.-]+", "-", str(config.name or name)),
        client,
        data.source,
        {**scenario, "max_instances": config.max_instances, "seed": config.seed},
        ("real", "blank", "shuffled") if config.controls else ("real",),
        config.batch_size,
        _draw(data, config.max_instances),
    )


def _draw(data: DataSettings, max_instances: int) -> list[Example]:
    """The questions that HELM is going to draw."""
    examples = read_examples(data, f"val[random:{max_instances}]", None, BadRecords(advice=""))
    if not all_answered(examples):
        raise InputError(f"{data.root}: some of the questions have no answers to score against")
    return examples


def _given_decoding(config: DictConfig) -> dict[str, Any]:
    """What the command line says of it; the rest is the model's own."""
    given = [override.lstrip("+").partition("=")[0] for override in HydraConfig.get().overrides.task]
    return {key: value for key, value in group(config, "decoding").items() if f"decoding.{key}" in given}
