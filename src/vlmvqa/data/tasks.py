"""Datasets to tasks: check the `data` group, read its splits from files, parquet, shards or a generator."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmvqa.config.compose import build_settings
from vlmvqa.config.schema import MIXTURE, DataSettings
from vlmvqa.data.cache import read_once
from vlmvqa.data.example import Example, all_answered, count_questions
from vlmvqa.errors import BadRecords, InputError, counted, suggest
from vlmvqa.metrics.registry import check_options, check_scorable
from vlmvqa.paths import refuse_no_root

# Sources that are not a module of `data.datasets`.
ELSEWHERE = {"shapes": "vlmvqa.extras.synthetic.vqav2"}
READ_ARGUMENTS = ("prompt", "max_samples", "bad_records")  # of every source's `read`


# --- settings -----------------------------------------------------------------------------------------


def data_settings(values: Mapping[str, Any], given: Iterable[str] = ()) -> DataSettings:
    """Return the `data` group, checked; `given` are the keys that the command line sets."""
    if values.get("source") != MIXTURE:
        return checked(build_settings(DataSettings, values, "data"), "data")
    from vlmvqa.data.mixture import mixture_settings

    return mixture_settings(values, given)


def new_lines(prompt: str) -> str:
    """Return a prompt with backslash-n as a new line: a shell passes the two characters as they are."""
    return prompt.replace("\\n", "\n")


def checked(settings: DataSettings, where: str) -> DataSettings:
    """Return the settings of a task; raise an InputError if they contradict each other."""
    settings = replace(settings, prompt=new_lines(settings.prompt))
    refuse_no_root(where, settings.root, settings.hub, settings.shards)
    if isinstance(settings.min_steps, bool) or not isinstance(settings.min_steps, int) or settings.min_steps < 0:
        raise InputError(f"{where}.min_steps={settings.min_steps} should be a whole number, at least 0")
    check_options(settings.metric, settings.metric_options)
    for name, options in settings.extra.items():
        if name == settings.metric or not isinstance(options, Mapping):
            raise InputError(
                f"{where}.extra_metrics.{name} should name another metric than {settings.metric}, as {name}: {{}}"
            )
        check_options(name, options, f"{where}.extra_metrics.{name}")
    if not hasattr(source_module(settings.source), "write_submission"):
        raise InputError(
            f"src/vlmvqa/data/datasets/{settings.source}.py has no write_submission; a source needs one, with read"
        )
    if settings.hub is not None and settings.columns.get("question", "") is None and "{question}" in settings.prompt:
        raise InputError(f"{where}.columns.question is null, so {where}.prompt={settings.prompt!r} has nothing to hold")
    marks = re.findall(r"{question}|[{}]", settings.prompt)
    if not has_questions(settings.source):
        if marks:
            raise InputError(f"{where}.prompt={settings.prompt!r} must hold no braces: {settings.source} asks nothing")
    elif marks != ["{question}"]:
        raise InputError(f"{where}.prompt={settings.prompt!r} must hold {{question}} once, and no other braces")
    return settings


def source_module(name: str) -> ModuleType:
    """Return the module that reads a dataset."""
    try:
        return importlib.import_module(ELSEWHERE.get(name, f"vlmvqa.data.datasets.{name}"))
    except ModuleNotFoundError as error:
        raise InputError(f"data.source={name}: there is no src/vlmvqa/data/datasets/{name}.py") from error


def has_questions(source: str) -> bool:
    """Return whether a dataset has questions; captions have none."""
    return bool(vars(source_module(source)).get("HAS_QUESTIONS", True))


# --- tasks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A dataset that a run trains and is evaluated on.

    Attributes:
        name: the mixture's name for it; "" for a single task.
        weight: how often an epoch sees each of its images.
    """

    name: str
    data: DataSettings
    train: list[Example]
    evaluated: list[Example]
    weight: float = 1.0
    metric_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """Whether the evaluation split has answers to score against."""
        return all_answered(self.evaluated)

    @property
    def prefix(self) -> str:
        """The prefix of its numbers in the log."""
        return f"{self.name}_" if self.name else ""

    def __str__(self) -> str:
        trained, evaluated = self.train, self.evaluated
        return (
            f"{self.name + ': ' if self.name else ''}{counted(count_questions(trained), 'question')} on "
            f"{counted(len(trained), 'image')} "
            f"to train on{f' (weight {self.weight:g})' if self.weight != 1 else ''}, "
            f"{count_questions(evaluated):,} on {len(evaluated):,} to evaluate on"
        )


def read_tasks(data: DataSettings, bad_records: BadRecords) -> list[Task]:
    """Read the splits of each task; raise an InputError if the metric cannot score the evaluation split."""
    tasks = [
        Task(
            name,
            task,
            read_examples(task, task.train_split, task.max_train_samples, bad_records),
            read_examples(task, task.eval_split, task.max_eval_samples, bad_records),
            data.weights.get(name, 1.0),
            metric_options(task, task.eval_split),
        )
        for name, task in data.tasks.items()
    ]
    for one in tasks:
        if one.answered:
            check_scorable(one.data.metric, one.evaluated)
            for name, options in one.data.extra.items():
                check_scorable(name, one.evaluated, **options)
    return tasks


def metric_options(settings: DataSettings, split: str) -> dict[str, Any]:
    """Return the metric's options: `data.metric_options`, and the choices in GQA's official files."""
    own = settings.metric == "gqa_accuracy" and settings.root is not None and settings.hub is None
    find = vars(source_module(settings.source)).get("scoring") if own else None
    found = find(Path(str(settings.root)).expanduser(), split) if find else {}
    return {**found, **settings.metric_options}


# --- questions ----------------------------------------------------------------------------------------


def read_examples(
    settings: DataSettings, split: str, max_samples: int | None, bad_records: BadRecords
) -> list[Example]:
    """Read a split with the module that `data.source` names, or from parquet or shards.

    A source that has a function `files` is cached: it is read again only when one of these files has changed.
    """
    source = source_module(settings.source)
    if settings.shards is not None:
        from vlmvqa.extras.shards.shards import read_split

        return read_split(settings, split, max_samples)
    if settings.hub is not None:
        from vlmvqa.extras.hub.dataset import read_hub

        return read_hub(settings, source, split, max_samples, bad_records)
    root, options = Path(settings.root or ".").expanduser(), settings.options
    if settings.synthetic:
        from vlmvqa.extras.synthetic.generate import generate

        options = generate(settings, root)
    refuse_unknown_options(options, source.read)
    arguments = {"prompt": settings.prompt, "max_samples": max_samples, **options}

    def read() -> list[Example]:
        return list(source.read(root, split, bad_records=bad_records, **arguments))

    if "files" not in vars(source):
        return read()
    files = source.files(root, split, **options)
    return read_once(read, files, root, {"source": settings.source, "split": split, **arguments}, bad_records)


def refuse_unknown_options(options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise at an option that the source does not have."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name not in ("root", "split", "examples", *READ_ARGUMENTS)]
    for name in options:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise InputError(f"data.options has no key '{name}'{suggest(name, known)} (known: {listed})")
