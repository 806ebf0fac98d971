"""Plan a HELM run: check the settings and read the questions, without loading a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmvqa import fingerprint, ranks
from vlmvqa.config.compose import refuse_overrides
from vlmvqa.config.schema import DataSettings, RunSettings
from vlmvqa.data.example import Example, all_answered
from vlmvqa.data.tasks import new_lines, read_examples
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.models import checkpoint, loading
from vlmvqa.models.interface import GenerationSettings

ENTRIES = ("vqav2", "gqa")  # run_specs.py has a run entry for each
READ_BY_HELM = ("data.source", "data.root", "data.synthetic", "data.options")
INSTEAD = {
    "data.max_eval_samples": "max_instances sets the number",
    "data.prompt": "prompt=... is used, or the model's own",
    "data.eval_split": "HELM samples from the validation questions",
    "data.hub": "HELM's questions are read from the official files in data.root",
    "data.shards": "HELM's questions are read from the official files in data.root",
}


@dataclass(frozen=True)
class HelmConfig:
    """Config of `vlmvqa helm`: the model or answers to score, and the questions; conf/helm.yaml documents its keys."""

    run: RunSettings
    data: DataSettings
    decoding: GenerationSettings
    checkpoint: str | None = None
    predictions: str | None = None
    max_instances: int = 1000
    controls: bool = False
    prompt: str | None = None
    batch_size: int = 32
    punkt: str = "nltk"
    name: str | None = None
    seed: int = 0
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """A HELM run whose settings have been checked.

    Attributes:
        home: folder of HELM's files of all models: prod_env/ (models, cache), benchmark_output/.
        model: the model's name in HELM's tables.
        client: arguments of `VLMClient`; empty if `predictions`, a file of answers, is scored instead of a model.
        source: the dataset of the questions.
        scenario: arguments of the run entry, without the image mode.
        modes: the image modes, `real` first.
    """

    home: Path
    model: str
    client: Mapping[str, Any]
    predictions: Path | None
    source: str
    scenario: Mapping[str, Any]
    modes: Sequence[str]
    threads: int
    examples: Sequence[Example]

    @property
    def suite(self) -> str:
        """Name of HELM's suite: runs on the same questions share one, wherever the files are."""
        return f"{self.source}-{self.scenario['max_instances']}-{fingerprint.examples(self.examples)[:4]}"

    @property
    def folder(self) -> Path:
        """Folder of this command's results."""
        return self.home / f"{self.model.rpartition('/')[2]}-{self.suite}"


def make_plan(config: HelmConfig) -> Plan:
    """Return the plan of a command.

    Raises:
        InputError: a setting is wrong, or a file is missing.
    """
    _refuse_mistakes(config)
    predictions, client = None, {}
    if config.predictions is not None:
        predictions = Path(config.predictions).expanduser().resolve()
        if predictions.is_dir():  # a run's folder
            predictions = predictions / "predictions.jsonl"
        if not predictions.is_file():
            raise InputError(f"predictions={predictions} does not exist; correct the path")
    else:
        client = _client(config)
    data = config.data.single
    root = str(Path(str(data.root)).expanduser().resolve())
    if "," in root:
        raise InputError(f"data.root={root} holds a comma, which HELM's run entries cannot; move or link the folder")
    examples = _sample(data, config.max_instances)
    if config.controls and len(examples) < 2:
        raise InputError("controls=true shows each question another image, and there is only one; raise max_instances")
    return Plan(
        config.run.folder,
        "vlmvqa/" + re.sub(r"[^\w.-]+", "-", str(config.name or _name(predictions or Path(str(config.checkpoint))))),
        client,
        predictions,
        data.source,
        {"root": root, "max_instances": config.max_instances, "seed": config.seed},
        ("real", "blank", "shuffled") if config.controls else ("real",),
        config.batch_size,
        examples,
    )


def _refuse_mistakes(config: HelmConfig) -> None:
    """Raise at keys that contradict each other, that HELM ignores, or that have an invalid value."""
    if ranks.world_size() > 1:
        raise InputError("HELM runs as one process with many threads; start it with python, without a launcher")
    given = [name for name in ("checkpoint", "predictions") if getattr(config, name) is not None]
    if len(given) != 1:
        said = "both are given" if given else "neither is given"
        raise InputError(f"choose what to score: checkpoint=... (a model) or predictions=... (its answers); {said}")
    if config.data.source not in ENTRIES:
        raise InputError(f"data={config.data.source}: HELM scores {' or '.join(ENTRIES)} here; choose one of them")
    for key in sorted(config.given):
        if key.startswith("data.") and not key.startswith(READ_BY_HELM):
            raise InputError(f"{key} cannot be set here: {INSTEAD.get(key, 'HELM does not read it')}; leave it out")
    refuse_overrides(
        config.given, "HELM's own", *(f"decoding.{key}" for key in ("max_new_tokens", "temperature", "seed"))
    )
    if given == ["predictions"]:
        refuse_overrides(
            config.given,
            "the model's, and none is loaded",
            "prompt",
            *(f"decoding.{key}" for key in vars(config.decoding)),
        )
        if config.controls:
            raise InputError("controls=true asks the model about other images; give checkpoint=... for it")


def _client(config: HelmConfig) -> dict[str, Any]:
    """Return the arguments of `VLMClient`; decoding holds only keys of the command line, the rest is the model's."""
    folder = loading.find(str(config.checkpoint)).resolve()
    if not (folder / checkpoint.WEIGHTS).is_file():
        raise InputError(f"{folder} holds no {checkpoint.WEIGHTS}; copy or save the model again")
    prompt = config.prompt
    if prompt is not None:
        prompt = new_lines(str(prompt))
        rest = prompt.replace("{instructions}", "", 1).split("{question}")
        if len(rest) != 2 or set("{}") & set("".join(rest)):
            raise InputError(
                f"prompt={prompt!r} must hold {{question}} once, {{instructions}} at most once, and no other braces"
            )
    given = {key: value for key, value in vars(config.decoding).items() if f"decoding.{key}" in config.given}
    own = {"checkpoint": str(folder), "prompt": prompt, "source": config.data.source}
    return {**own, "batch_size": config.batch_size, "decoding": given}


def _name(path: Path) -> str:
    """Return a model's name: its run's folder or the second half of its hub id; for answers with `-answers`."""
    if path.suffix == ".jsonl":
        return f"{path.parent.name}-answers"
    if path.name == "model":
        path = path.parent
    return f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name


def _sample(data: DataSettings, max_instances: int) -> list[Example]:
    """Return the questions that HELM will sample."""
    examples = read_examples(data, f"val[random:{max_instances}]", None, BadRecords(advice=""))
    if not all_answered(examples):
        raise InputError(f"{data.root}: some of the questions have no answers to score against")
    return examples
