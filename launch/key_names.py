"""Names of configuration keys: the right key for a wrong one, and `--flags` in place of `key=value`.

Nothing here needs Hydra or PyTorch, so that a mistake is reported at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vlmvqa.errors import InputError
from vlmvqa.trainer_arguments import argument_types

CONF = Path(__file__).resolve().parent.parent / "conf"
# Hydra's own options. argparse takes abbreviations of the long ones, too.
HYDRA_OPTIONS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info"),
    *("-h", "-c", "-p", "-r", "-m", "-sc", "-cp", "-cn", "-cd", "-i"),
)
LAUNCHERS_OPTIONS = ("--local_rank", "--local-rank")  # added by `deepspeed`
# Other projects' names of a setting, and the keys of it here: the first that the script has. `key=value` is complete.
ALIASES = {
    "lr": ("trainer.learning_rate",),
    "batch_size": ("trainer.per_device_train_batch_size",),
    "bs": ("trainer.per_device_train_batch_size", "batch_size"),
    "train_batch_size": ("trainer.per_device_train_batch_size",),
    "micro_batch_size": ("trainer.per_device_train_batch_size",),
    "eval_batch_size": ("trainer.per_device_eval_batch_size", "batch_size"),
    "per_device_eval_batch_size": ("trainer.per_device_eval_batch_size", "batch_size"),
    "epoch": ("trainer.num_train_epochs",),
    "epochs": ("trainer.num_train_epochs",),
    "num_epochs": ("trainer.num_train_epochs",),
    "max_epochs": ("trainer.num_train_epochs",),
    "steps": ("trainer.max_steps",),
    "num_steps": ("trainer.max_steps",),
    "max_train_steps": ("trainer.max_steps",),
    "max_iters": ("trainer.max_steps",),
    "wd": ("trainer.weight_decay",),
    "warmup": ("trainer.warmup_steps",),
    "warmup_ratio": ("trainer.warmup_steps",),
    "num_warmup_steps": ("trainer.warmup_steps",),
    "grad_accum": ("trainer.gradient_accumulation_steps",),
    "grad_accum_steps": ("trainer.gradient_accumulation_steps",),
    "grad_acc": ("trainer.gradient_accumulation_steps",),
    "gradient_accumulation": ("trainer.gradient_accumulation_steps",),
    "accumulate_grad_batches": ("trainer.gradient_accumulation_steps",),
    "grad_clip": ("trainer.max_grad_norm",),
    "clip": ("trainer.max_grad_norm",),
    "optimizer": ("trainer.optim",),
    "scheduler": ("trainer.lr_scheduler_type",),
    "lr_scheduler": ("trainer.lr_scheduler_type",),
    "gradient_checkpointing": ("trainer.activation_checkpointing",),
    "num_workers": ("trainer.dataloader_num_workers", "workers"),
    "workers": ("trainer.dataloader_num_workers",),
    "output_dir": ("run.dir", "output"),
    "out_dir": ("run.dir", "output"),
    "save_dir": ("run.dir", "output"),
    "output": ("run.dir",),
    "name": ("run.name",),
    "run_name": ("run.name",),
    "overwrite_output_dir": ("run.overwrite=true",),
    "overwrite": ("run.overwrite",),
    "resume_from_checkpoint": ("resume=auto",),
    "report_to": ("logger",),
    "push_to_hub": ("hub_id",),
    "hub_model_id": ("hub_id",),
    "model_name": ("checkpoint", "model.pretrained", "model.language.name"),
    "model_name_or_path": ("checkpoint", "model.pretrained", "model.language.name"),
    "model_path": ("checkpoint", "start_from"),
    "model": ("checkpoint",),
    "ckpt": ("checkpoint", "start_from"),
    "checkpoint": ("start_from",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "data_dir": ("data.root",),
    "data_path": ("data.root",),
    "dtype": ("model.dtype",),
    "fsdp": ("dist=fsdp",),
    "deepspeed": ("dist=zero2",),
    "lora": ("adapt=lora",),
    "use_lora": ("adapt=lora",),
    "use_peft": ("adapt=lora",),
    "qlora": ("adapt=qlora",),
    "lora_r": ("adapt.rank",),
    "lora_rank": ("adapt.rank",),
    "lora_alpha": ("adapt.alpha",),
    "lora_dropout": ("adapt.dropout",),
    "beams": ("decoding.beams",),
    "num_beams": ("decoding.beams",),
    "max_new_tokens": ("decoding.max_new_tokens",),
    "img": ("image",),
    "images": ("image",),
    "image_path": ("image",),
    "prompt": ("question",),
    "text": ("question",),
}
ALIKE = 0.6  # from here on, of 1, names are taken for misspellings of each other
MOST = 3  # suggestions


def suggest_key(key: str, value: str, names: Collection[str]) -> str:
    """`; did you mean 'x=value'?` for the keys that a wrong one may stand for, or the empty string."""
    found = " or ".join(f"'{setting}'" for setting in _settings(key, value, names))
    return f"; did you mean {found}?" if found else ""


def refuse_flags(arguments: Sequence[str], config_name: str) -> None:
    """Stop at an option that neither Hydra nor a launcher knows: settings are key=value.

    Raises:
        InputError: with the setting to write instead.
    """
    for number, argument in enumerate(arguments):
        if not argument.startswith("-") or _is_option(argument):
            continue
        if argument.startswith("--") or argument[1:].partition("=")[0] in ALIASES:
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


# ---- which key is meant


def _settings(key: str, value: str, names: Collection[str]) -> list[str]:
    """`key=value` for each key that may be meant."""
    return [found if "=" in found else f"{found}={value}" for found in _nearest(key, names)[:MOST]]


def _nearest(key: str, names: Collection[str]) -> list[str]:
    """The key itself, one with the same last part in the same group, its alias, the same last part, a misspelling."""
    if key in names:
        return [key]
    word, names = _leaf(key).lower(), sorted(names)
    same = [name for name in names if _leaf(name) == word]
    group = [name for name in same if "." in key and name.partition(".")[0] == key.partition(".")[0]]
    alias = [name for name in ALIASES.get(word, ()) if name.partition("=")[0] in names]
    return group or alias[:1] or same or _misspelt(key, names)


def _misspelt(key: str, names: Collection[str]) -> list[str]:
    def likeness(name: str) -> tuple[float, float]:
        whole = _likeness(key, name)
        return max(whole, _likeness(_leaf(key), _leaf(name))), whole

    best = max(names, key=likeness, default="")
    return [best] if best and likeness(best)[0] >= ALIKE else []


def _likeness(one: str, other: str) -> float:
    """From 0 to 1; letters that changed places count little."""
    return 0.95 if sorted(one) == sorted(other) else SequenceMatcher(None, one, other).ratio()


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


# ---- the keys there are


def default_keys(config_name: str, arguments: Sequence[str] = ()) -> set[str]:
    """A script's keys and groups, with the groups' files that the arguments choose, read without Hydra."""
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
    """The keys of a node and of the nodes below it, with dots."""
    if not isinstance(node, dict):
        return []
    children = [name for key, value in node.items() for name in flatten(value, f"{prefix}{key}.")]
    return [prefix + str(key) for key in node] + children
