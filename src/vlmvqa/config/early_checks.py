"""Check a command's values without PyTorch: missing values and paths, counts, types.

`cli.py` runs these checks before PyTorch is imported, and again for every job of a sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from vlmvqa.config.keys import problems
from vlmvqa.errors import InputError, suggest
from vlmvqa.paths import refuse_missing, refuse_missing_model, refuse_no_root

# The first word of prepare.py, which names the job.
PREPARE = ("download", "check", "pack", "features")
# Settings of each script that name saved models, and other files and folders.
MODELS = {
    "train": ("init_from",),
    "eval": ("checkpoint",),
    "predict": ("checkpoint",),
    "serve": ("checkpoint", "compare"),
    "merge": ("base", "adapter", "models"),
    "helm": ("checkpoint",),
}
PATHS = {"eval": ("predictions", "compare"), "serve": ("browse", "examples")}
# Scripts that read data.root, and the sources whose files must exist already (others are generated).
READS_DATA = ("train", "eval", "show", "merge", "helm", *(f"prepare {job}" for job in PREPARE if job != "download"))
FILES = ("coco_captions", "docvqa", "gqa", "jsonl", "vqav2")
# The least value of a whole number.
LEAST = {
    "samples": 0,
    "log_samples": 0,
    "attributions": 0,
    "workers": 0,
    "batch_size": 1,
    "max_instances": 1,
    "seed": 0,
}
NULLABLE = {"merge": ("samples",), "prepare": ("workers",)}


def refuse_mistakes(values: Mapping[str, Any], command: str) -> None:
    """Raise at the first mistake.

    Args:
        values: the resolved values of the config.
        command: the script's name.

    Raises:
        InputError: what is wrong, and what to do.
    """
    missing = min((key for key, value in _leaves(values) if value == "???"), default=None)
    if missing:
        raise InputError(f"{missing} must be given; add {missing}=... to the command")
    if command == "eval":
        _refuse_eval(values)
    if command == "merge" and not isinstance(values["models"], list):
        raise InputError(f"models={values['models']} should be a list: models=[runs/a,runs/b]")
    if command == "predict":
        from vlmvqa.inference.questions import read_questions

        read_questions(_listed(values["image"]), _listed(values["question"]), values["questions"])
    if command == "train":
        for sentence in problems(values["trainer"]):
            raise InputError(sentence)
    _refuse_counts(values, NULLABLE.get(command, ()))
    for key in MODELS.get(command, ()):
        for model in _listed(values[key]):
            refuse_missing_model(str(model))
    for key in PATHS.get(command, ()):
        for path in _listed(values[key]):
            refuse_missing(key, str(path))
    reads_data = f"prepare {values['job']}" if command == "prepare" else command
    if reads_data in READS_DATA and values.get("data") is not None:
        _refuse_missing_data(values["data"], "data")


def prepare_job(words: Sequence[str]) -> str:
    """Return the first word of prepare.py's command line, which names its job.

    Raises:
        InputError: it names none, or another word follows.
    """
    known, word = ", ".join(PREPARE), words[0] if words else ""
    if word not in PREPARE:
        said = f"unknown job '{word}'" if word and "=" not in word else "no job given"
        near = suggest(word, PREPARE) or "."
        raise InputError(f"prepare.py: {said}; its first word is one of {known}{near}")
    for before, after in pairwise(words):
        if "=" not in after and not after.startswith("-") and not before.startswith("-"):
            raise InputError(f"prepare.py {word}: '{after}' is not a setting; give settings as key=value")
    return word


def _refuse_eval(values: Mapping[str, Any]) -> None:
    given = [name for name in ("checkpoint", "predictions", "compare") if values[name] is not None]
    if len(given) != 1:
        raise InputError(
            "choose what to score: checkpoint=... (a trained model), predictions=... (a file of answers), or "
            f"compare=[...,...] (two results); {' and '.join(given) + ' are given' if given else 'none is given'}"
        )
    if given == ["compare"] and len(_listed(values["compare"])) != 2:
        shown = _listed(values["compare"])
        raise InputError(f"compare={shown} should name two folders of results: compare=[runs/a,runs/b]")
    if given != ["compare"] and values.get("data") is None:
        raise InputError("data=... must be given, the name of a file in conf/data: data=shapes, data=vqav2...")


def _refuse_counts(values: Mapping[str, Any], nullable: Sequence[str]) -> None:
    for key, least in LEAST.items():
        if key not in values or (values[key] is None and key in nullable):
            continue
        if type(values[key]) is not int or values[key] < least:
            raise InputError(f"{key}={values[key]} should be a whole number, at least {least}")


def _refuse_missing_data(data: dict[str, Any], where: str) -> None:
    """Raise if a dataset's files are read from a folder that does not exist."""
    for name, part in (data.get("parts") or {}).items():
        _refuse_missing_data(part, f"{where}.parts.{name}")
    if data.get("source") not in FILES:
        return
    root, hub, packed = (data.get(key) for key in ("root", "hub", "shards"))
    refuse_no_root(where, root, hub, packed)
    if root is not None and hub is None and packed is None and not data.get("synthetic"):
        refuse_missing(f"{where}.root", str(root))


def _listed(value: Any) -> list[Any]:
    """Return a setting as a list; null is an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
