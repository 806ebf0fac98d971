"""What a command asks HELM for, checked as far as it can be without loading a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmvqa import fingerprint, ranks
from vlmvqa.config.compose import refuse_overrides
from vlmvqa.config.schema import DataSettings, RunSettings
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.example import Example, all_answered
from vlmvqa.data.tasks import new_lines, read_examples
from vlmvqa.errors import InputError
from vlmvqa.models import model_folder
from vlmvqa.models.interface import GenerationSettings

ENTRIES = ("vqav2", "gqa")  # run_specs.py has a run entry for each
OBEYED = ("data.source", "data.root", "data.synthetic", "data.options")
INSTEAD = {
    "data.max_eval_samples": "max_instances says how many",
    "data.prompt": "prompt=... is used, or the model's own",
    "data.eval_split": "HELM draws from the validation questions",
    "data.hub": "HELM's questions are read from the official files in data.root",
    "data.shards": "HELM's questions are read from the official files in data.root",
}


@dataclass(frozen=True)
class HelmConfig:
    """Which model or answers HELM scores, on which questions; conf/helm.yaml documents its keys."""

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
    """What HELM is going to be asked for, all of it checked.

    Attributes:
        home: HELM's files of all models: prod_env/ (what can be run, the cache), benchmark_output/.
        model: its name in HELM's tables.
        client: arguments of `VLMClient`; empty where answers are given.
        predictions: a file of answers, in place of a model.
        source: whose questions.
        scenario: arguments of the run entry, but for the image mode.
        modes: the image modes, `real` first.
        threads: of HELM.
        examples: the questions.
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
        """Of the runs that may stand in one table: about the same questions, whichever folder they lie in."""
        return f"{self.source}-{self.scenario['max_instances']}-{fingerprint.examples(self.examples)[:4]}"

    @property
    def folder(self) -> Path:
        """Of what we leave."""
        return self.home / f"{self.model.rpartition('/')[2]}-{self.suite}"


def make_plan(config: HelmConfig) -> Plan:
    """What the command asks for.

    Raises:
        InputError: it cannot be had.
    """
    _refuse_what_cannot_be_meant(config)
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
    examples = _draw(data, config.max_instances)
    if config.controls and len(examples) < 2:
        raise InputError("controls=true shows each question another image, and only one is drawn; draw more questions")
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


def _refuse_what_cannot_be_meant(config: HelmConfig) -> None:
    """Stop at keys that contradict each other, that HELM would not obey, or that have no sensible value."""
    if ranks.world_size() > 1:
        raise InputError("HELM is one process with many threads; start it with python, without a launcher")
    given = [name for name in ("checkpoint", "predictions") if getattr(config, name) is not None]
    if len(given) != 1:
        said = "both are given" if given else "neither is given"
        raise InputError(f"say what to score: checkpoint=... (a model) or predictions=... (its answers); {said}")
    if config.data.source not in ENTRIES:
        raise InputError(f"data={config.data.source}: HELM asks {' or '.join(ENTRIES)} here; choose one of them")
    for key in sorted(config.given):
        if key.startswith("data.") and not key.startswith(OBEYED):
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
    """The arguments of `VLMClient`; of the decoding only what the command line says, the rest is the model's own."""
    folder = model_folder.find(str(config.checkpoint)).resolve()
    if not (folder / model_folder.WEIGHTS).is_file():
        raise InputError(f"{folder} holds no {model_folder.WEIGHTS}; copy or save the model again")
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
    """Of a model: its run's folder, or the hub id's second half; of answers, that they are."""
    if path.suffix == ".jsonl":
        return f"{path.parent.name}-answers"
    if path.name == "model":
        path = path.parent
    return f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name


def _draw(data: DataSettings, max_instances: int) -> list[Example]:
    """The questions that HELM is going to draw."""
    examples = read_examples(data, f"val[random:{max_instances}]", None, BadRecords(advice=""))
    if not all_answered(examples):
        raise InputError(f"{data.root}: some of the questions have no answers to score against")
    return examples
