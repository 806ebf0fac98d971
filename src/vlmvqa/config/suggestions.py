"""Suggest the right configuration key for a wrong one, or for a `--flag`; imported when there is a mistake.

Imports neither Hydra nor PyTorch, so that a mistake is reported at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vlmvqa.config.early_checks import argument_types, flatten
from vlmvqa.errors import InputError
from vlmvqa.paths import CONF

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
    "resume=auto": "resume_from_checkpoint",
    "logger": "report_to",
    "hub_id": "push_to_hub hub_model_id",
    "checkpoint": "model_name model_name_or_path model_path model ckpt",
    "model.pretrained": "model_name model_name_or_path",
    "model.language.name": "model_name model_name_or_path",
    "init_from": "model_path ckpt checkpoint",
    "data": "dataset dataset_name",
    "data.root": "data_dir data_path",
    "dist=fsdp": "fsdp",
    "dist=zero2": "deepspeed",
    "adapt=lora": "lora use_lora use_peft",
    "adapt=qlora": "qlora",
    "adapt.rank": "lora_r lora_rank",
    "adapt.alpha": "lora_alpha",
    "adapt.dropout": "lora_dropout",
    "decoding.num_beams": "beams",
    "image": "img images image_path",
    "question": "prompt text",
}
ALIKE = 0.6  # least similarity, of 1, of a name and its misspelling
MOST = 3  # suggestions


def aliases() -> set[str]:
    """Return the names that settings have in other projects."""
    return {word for words in ALIASES.values() for word in words.split()}


def suggest_key(key: str, value: str, names: Collection[str]) -> str:
    """Return `; did you mean 'x=value'?` with the likeliest keys, or the empty string."""
    found = " or ".join(f"'{setting}'" for setting in _settings(key, value, names))
    return f"; did you mean {found}?" if found else ""


def refuse_flag(argument: str, following: str, names: Collection[str]) -> NoReturn:
    """Raise at an option, with the setting to write instead; `following` is the word after it."""
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
