"""Check a command line and its values without PyTorch: options, missing values and paths, counts, types.

`cli.py` runs these checks before PyTorch is imported, and again for every job of a sweep.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vlmvqa.errors import InputError, suggest
from vlmvqa.paths import refuse_missing, refuse_missing_model, refuse_no_root

# The first word of prepare.py, which names the job.
PREPARE = ("download", "check", "pack", "features", "harness")
# Settings of each script that name saved models, and other files and folders.
MODELS = {
    "train": ("init_from",),
    "eval": ("checkpoint",),
    "predict": ("checkpoint",),
    "serve": ("checkpoint", "compare"),
    "export": ("checkpoint",),
    "merge": ("base", "adapter", "models"),
    "helm": ("checkpoint",),
}
PATHS = {"eval": ("predictions", "compare"), "serve": ("browse", "examples")}
# Scripts that read data.root, and the sources whose files must exist already (others are generated).
READS_DATA = ("train", "eval", "show", "merge", "helm", *(f"prepare {job}" for job in PREPARE if job != "download"))
FILES = ("coco_captions", "conversations", "docvqa", "gqa", "jsonl", "vqav2")
# The least value of a whole number.
LEAST = {
    **dict.fromkeys(("samples", "log_samples", "attributions", "workers", "seed"), 0),
    **dict.fromkeys(("batch_size", "max_instances"), 1),
}
NULLABLE = {"merge": ("samples",), "prepare": ("workers",)}
# Values of `dtype` of the scripts that answer questions (`models.loading.answering_dtype`).
ANSWERING_DTYPES = ("auto", "saved", "float32", "bfloat16", "float16")


def refuse_mistakes(values: Mapping[str, Any], command: str) -> None:
    """Raise an InputError at the first mistake in the resolved values of a command's config."""
    missing = min((key for key, value in flatten(values).items() if value == "???"), default=None)
    if missing:
        raise InputError(f"{missing} must be given; add {missing}=... to the command")
    if command == "merge" and not isinstance(values["models"], list):
        raise InputError(f"models={values['models']} should be a list: models=[runs/a,runs/b]")
    if command in ("eval", "predict"):
        from vlmvqa.inference import command_line

    if command == "eval":
        command_line.refuse_eval(values)
    if command == "predict":
        command_line.read_questions(listed(values["image"]), listed(values["question"]), values["questions"])
    if command == "study":
        from vlmvqa.extras.study.command_line import compose_arms

        compose_arms(values)
    if command == "sweep":
        from vlmvqa.extras.sweep.command_line import compose_sweep

        compose_sweep(values)
    if values.get("stages"):
        from vlmvqa.extras.stages.command_line import refuse_stage_mistakes

        refuse_stage_mistakes(values["stages"], command)
    if command == "train":
        for sentence in problems(values["trainer"]):
            raise InputError(sentence)
    if command in ("eval", "predict", "serve") and values["dtype"] not in ANSWERING_DTYPES:
        raise InputError(f"dtype={values['dtype']} is unknown; use one of {', '.join(ANSWERING_DTYPES)}")
    for key in LEAST:
        if key not in values or (values[key] is None and key in NULLABLE.get(command, ())):
            continue
        if type(values[key]) is not int or values[key] < LEAST[key]:
            raise InputError(f"{key}={values[key]} should be a whole number, at least {LEAST[key]}")
    for key in MODELS.get(command, ()):
        for model in listed(values[key]):
            refuse_missing_model(str(model))
    for key in PATHS.get(command, ()):
        for path in listed(values[key]):
            refuse_missing(key, str(path))
    reads_data = f"prepare {values['job']}" if command == "prepare" else command
    if reads_data in READS_DATA and values.get("data") is not None:
        _refuse_missing_data(values["data"], "data")


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


def listed(value: Any) -> list[Any]:
    """Return a setting, or the values of a group, as a list; null is an empty one."""
    if isinstance(value, Mapping):
        return [one for one in value.values() if one is not None]
    return [] if value is None else list(value) if isinstance(value, list) else [value]


# ---- the command line's words

# Hydra's own options. argparse takes abbreviations of the long ones, too.
HYDRA_OPTIONS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info"),
    *("-h", "-c", "-p", "-r", "-m", "-sc", "-cp", "-cn", "-cd", "-i"),
)
LAUNCHERS_OPTIONS = ("--local_rank", "--local-rank")  # added by `deepspeed`


def refuse_flags(arguments: Sequence[str], config_name: str) -> None:
    """Raise an InputError at an option of neither Hydra nor a launcher: settings are written key=value."""
    for number, argument in enumerate(arguments):
        if not argument.startswith("-") or _is_option(argument):
            continue
        from vlmvqa.config import suggestions

        if argument.startswith("--") or argument[1:].partition("=")[0] in suggestions.aliases():
            following = arguments[number + 1] if number + 1 < len(arguments) else "-"
            suggestions.refuse_flag(argument, following, suggestions.default_keys(config_name, arguments))


def _is_option(argument: str) -> bool:
    name = argument.partition("=")[0]
    abbreviates = [option for option in HYDRA_OPTIONS if name[2:] and option.startswith(name)]
    return name in (*HYDRA_OPTIONS, *LAUNCHERS_OPTIONS) or (name.startswith("--") and len(abbreviates) == 1)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the value of each dotted key, and of each group of keys."""
    found = {}
    for key, value in values.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
    return found


# ---- transformers' TrainingArguments, without importing them, which takes seconds

OURS = {  # TrainingArguments that are set elsewhere, or would make the run differ from its config
    "fsdp": "add dist=fsdp",
    "fsdp_config": "add dist=fsdp",
    "deepspeed": "add dist=zero2; further keys of DeepSpeed's go under dist.options",
    "parallelism_config": "choose a strategy by dist=...",
    "gradient_checkpointing": "its name is trainer.activation_checkpointing",
    "activation_checkpointing_kwargs": "leave it out, there is only one method",
    "auto_find_batch_size": "launch/plan.py prints the batch size that fits",
    "save_only_model": "a run could not be resumed from it",
    "push_to_hub": "set hub_id=... to upload the finished model",
    "resume_from_checkpoint": "add resume=auto",
    "output_dir": "set run.dir",
    "seed": "set seed=...",
    "train_sampling_strategy": "the order is computed from the seed (data/packing.py)",
}
# Keys of transformers' EarlyStoppingCallback, which are set next to the TrainingArguments.
EARLY_STOPPING = {"early_stopping_patience": "int | None", "early_stopping_threshold": "float | None"}
BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
COUNTS = (*BATCHES, "early_stopping_patience")  # numbers from 1
NUMBERS = {"bool", "float", "int"}


def problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield an error message for each invalid key or value of the `trainer` group."""
    known = argument_types()
    for key, value in trainer.items():
        if key not in known:
            yield f"trainer has no key '{key}'{suggest(key, known)}"
        elif value and key in OURS:
            yield f"trainer.{key} cannot be set: {OURS[key]}"
        # TrainingArguments accepts any string for a number or a boolean, and fails later or never.
        elif isinstance(value, str) and (kinds := _kinds(known[key])) <= NUMBERS:
            yield f"trainer.{key}={value} should be of type {' or '.join(sorted(kinds))}"
        elif key in COUNTS and value is not None and value < 1:
            yield f"trainer.{key}={value} must be at least 1"
    if trainer.get("early_stopping_patience") is None:
        if trainer.get("early_stopping_threshold") is not None:
            yield "trainer.early_stopping_threshold needs trainer.early_stopping_patience; set both or none"
    elif trainer.get("eval_strategy") in (None, False, "no"):
        yield "trainer.early_stopping_patience counts evaluations, and there are none; add trainer.eval_strategy=steps"


@cache
def argument_types() -> dict[str, str]:
    """Return the fields of TrainingArguments, read from the source, and of early stopping, with their types."""
    package = importlib.util.find_spec("transformers")
    assert package and package.submodule_search_locations
    source = Path(package.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    (of,) = (one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == "TrainingArguments")
    fields = [one for one in of.body if isinstance(one, ast.AnnAssign)]
    found = {one.target.id: ast.unparse(one.annotation) for one in fields if isinstance(one.target, ast.Name)}
    return found | EARLY_STOPPING


def _kinds(annotation: str) -> set[str]:
    """Return the types that an annotation such as `int | None` allows, without None."""
    return {kind.strip() for kind in annotation.split("|")} - {"None"}
