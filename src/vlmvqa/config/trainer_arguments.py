"""Rules for transformers' TrainingArguments, checked without importing them: an import takes seconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vlmvqa.errors import suggest

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
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")  # from 1
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


@cache
def argument_types() -> dict[str, str]:
    """Return the fields of TrainingArguments with their types, read from the source."""
    package = importlib.util.find_spec("transformers")
    assert package and package.submodule_search_locations
    source = Path(package.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    (of,) = (one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == "TrainingArguments")
    fields = [one for one in of.body if isinstance(one, ast.AnnAssign)]
    return {one.target.id: ast.unparse(one.annotation) for one in fields if isinstance(one.target, ast.Name)}


def _kinds(annotation: str) -> set[str]:
    """Return the types that an annotation such as `int | None` allows, without None."""
    return {kind.strip() for kind in annotation.split("|")} - {"None"}
