"""Known configuration keys: suggest the right one for a wrong key or a `--flag`, and check trainer arguments.

Imports neither Hydra nor PyTorch, so that a mistake is reported at once.
"""

from __future__ import annotations

import ast
import importlib.util
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vlmvqa.errors import InputError, suggest
from vlmvqa.paths import CONF

# Hydra's own options. argparse takes abbreviations of the long ones, too.
HYDRA_OPTIONS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info"),
    *("-h", "-c", "-p", "-r", "-m", "-sc", "-cp", "-cn", "-cd", "-i"),
)
LAUNCHERS_OPTIONS = ("--local_rank", "--local-rank")  # added by `deepspeed`
# Settings, and their names in other projects. Where several share a name, the first that the script has is suggested.
ALIASES = {
    "trainer.learning_rate": "lr",
    "trainer.per_device_train_batch_size": "batch_size bs train_batch_size micro_batch_size",
    "trainer.per_device_eval_batch_size": "eval_batch_size per_device_eval_batch_size",
    "batch_size": "bs eval_batch_size per_device_eval_batch_size",
    "trainer.num_train_epochs": "epoch epochs num_epochs max_epochs",
    "trainer.max_steps": "steps num_steps max_train_steps max_iters",
    "trainer.weight_decay": "wd",
    "trainer.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "trainer.gradient_accumulation_steps": "grad_accum grad_accum_steps grad_acc gradient_accumulation "
    "accumulate_grad_batches",
    "trainer.max_grad_norm": "grad_clip clip",
    "trainer.optim": "optimizer",
    "trainer.lr_scheduler_type": "scheduler lr_scheduler",
    "trainer.activation_checkpointing": "gradient_checkpointing",
    "trainer.dataloader_num_workers": "num_workers workers",
    "workers": "num_workers",
    "run.dir": "output_dir out_dir save_dir output",
    "output": "output_dir out_dir save_dir",
    "run.name": "name run_name",
    "run.overwrite=true": "overwrite_output_dir",
    "run.overwrite": "overwrite",
    "resume=auto": "resume_from_checkpoint",
    "logger": "report_to",
    "hub_id": "push_to_hub hub_model_id",
    "checkpoint": "model_name model_name_or_path model_path model ckpt",
    "model.pretrained": "model_name model_name_or_path",
    "model.language.name": "model_name model_name_or_path",
    "init_from": "model_path ckpt checkpoint",
    "data": "dataset dataset_name",
    "data.root": "data_dir data_path",
    "model.dtype": "dtype",
    "dist=fsdp": "fsdp",
    "dist=zero2": "deepspeed",
    "adapt=lora": "lora use_lora use_peft",
    "adapt=qlora": "qlora",
    "adapt.rank": "lora_r lora_rank",
    "adapt.alpha": "lora_alpha",
    "adapt.dropout": "lora_dropout",
    "decoding.num_beams": "beams",
    "decoding.max_new_tokens": "max_new_tokens",
    "image": "img images image_path",
    "question": "prompt text",
}
ALIKE = 0.6  # least similarity, of 1, of a name and its misspelling
MOST = 3  # suggestions


def suggest_key(key: str, value: str, names: Collection[str]) -> str:
    """Return `; did you mean 'x=value'?` with the likeliest keys, or the empty string."""
    found = " or ".join(f"'{setting}'" for setting in _settings(key, value, names))
    return f"; did you mean {found}?" if found else ""


def refuse_flags(arguments: Sequence[str], config_name: str) -> None:
    """Raise at an option of neither Hydra nor a launcher: settings are written key=value.

    Raises:
        InputError: with the setting to write instead.
    """
    for number, argument in enumerate(arguments):
        if not argument.startswith("-") or _is_option(argument):
            continue
        if argument.startswith("--") or argument[1:].partition("=")[0] in " ".join(ALIASES.values()).split():
            following = arguments[number + 1] if number + 1 < len(arguments) else "-"
            _refuse_flag(argument, following, default_keys(config_name, arguments))


def _refuse_flag(argument: str, following: str, names: Collection[str]) -> NoReturn:
    flag, equals, value = argument.partition("=")
    if not equals and ("=" in following or (following.startswith("-") and not following[1:2].isdigit())):
        shown, value = flag, "true"
    elif not equals:
        shown, value = f"{flag} {following}", following
    else:
        shown = argument
    found = _settings(flag.lstrip("-").replace("-", "_"), value, names)
    advice = f"write {' or '.join(map(shlex.quote, found))}" if found else "-h shows the most used ones"
    raise InputError(f"{shown}: settings are given as key=value, without dashes; {advice}")


def _is_option(argument: str) -> bool:
    name = argument.partition("=")[0]
    abbreviates = [option for option in HYDRA_OPTIONS if name[2:] and option.startswith(name)]
    return name in (*HYDRA_OPTIONS, *LAUNCHERS_OPTIONS) or (name.startswith("--") and len(abbreviates) == 1)


# ---- likely keys


def _settings(key: str, value: str, names: Collection[str]) -> list[str]:
    """Return `key=value` for each likely key."""
    return [found if "=" in found else f"{found}={value}" for found in _nearest(key, names)[:MOST]]


def _nearest(key: str, names: Collection[str]) -> list[str]:
    """Return the likely keys: the key itself, else same group and last part, alias, same last part, misspelling."""
    if key in names:
        return [key]
    word, names = _leaf(key).lower(), sorted(names)
    same = [name for name in names if _leaf(name) == word]
    group = [name for name in same if "." in key and name.partition(".")[0] == key.partition(".")[0]]
    alias = [found for found, words in ALIASES.items() if word in words.split() and found.partition("=")[0] in names]
    return group or alias[:1] or same or _misspelt(key, names)


def _misspelt(key: str, names: Collection[str]) -> list[str]:
    def likeness(name: str) -> tuple[float, float]:
        of_key = _likeness(key, name)
        return max(of_key, _likeness(_leaf(key), _leaf(name))), of_key

    best = max(names, key=likeness, default="")
    return [best] if best and likeness(best)[0] >= ALIKE else []


def _likeness(one: str, other: str) -> float:
    """Return the similarity of two names, from 0 to 1; transposed letters count little."""
    return 0.95 if sorted(one) == sorted(other) else SequenceMatcher(None, one, other).ratio()


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


# ---- known keys


def default_keys(config_name: str, arguments: Sequence[str] = ()) -> set[str]:
    """Return a script's keys and groups, with those of the chosen group files, read without Hydra."""
    chosen = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument)
    found: set[str] = set()
    content = _read(CONF / f"{config_name}.yaml")
    for entry in content.pop("defaults"):
        if isinstance(entry, str) and (CONF / f"{entry}.yaml").is_file():
            found |= default_keys(entry, arguments) if entry != "hydra_quiet" else set()
        elif isinstance(entry, dict):
            ((group, choice),) = entry.items()
            choice = chosen.get(group, chosen.get("model", "tiny") if choice == "${model}" else choice)
            found |= {group, *_of_choice(group, str(choice))}
    if "trainer" in found:
        found |= {f"trainer.{key}" for key in argument_types()}
    return found | set(flatten(content))


def _of_choice(group: str, choice: str) -> Iterator[str]:
    path = CONF / group / f"{choice}.yaml"
    if path.is_file():
        everywhere = path.read_text(encoding="utf-8").startswith("# @package _global_")
        content = _read(path)
        content.pop("defaults", None)
        yield from flatten(content if everywhere else {group: content})


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def flatten(node: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of a node and of the nodes below it."""
    if not isinstance(node, dict):
        return []
    children = [name for key, value in node.items() for name in flatten(value, f"{prefix}{key}.")]
    return [prefix + str(key) for key in node] + children


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
