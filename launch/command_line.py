"""Hydra's command line, made kind: one sentence for what the user can mend, a traceback only for our mistakes."""

from __future__ import annotations

import atexit
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from vlmvqa import ranks
from vlmvqa.errors import InputError, suggest
from vlmvqa.training.launchers import launcher_choice, slurm_task

CONF = Path(__file__).resolve().parent.parent / "conf"
# Nodes that hold another library's arguments: any key may be added, and that library's builder checks it.
OPEN = ("overrides", "options", "weights", "scoring", "also")
# What PyTorch says on a rank whose peers are gone.
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
# What a launcher implies for `dist`, and its name: read once, before its arguments are taken out.
LAUNCHER = launcher_choice(os.environ, sys.argv[1:])
os.environ |= slurm_task(os.environ)


def run(main: Callable[[DictConfig], None], config_name: str, repeatable: Sequence[str] = ()) -> None:
    """Run `main` as a Hydra job over `conf/<config_name>.yaml`, with this process's command line.

    Args:
        repeatable: keys that may be given several times; their values are taken as they are, quotes and all.
    """
    # `deepspeed` puts --local_rank=0 before the overrides, where Hydra would take it for one.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(("--local_rank", "--local-rank"))]
    try:
        sys.argv[1:] = check_overrides(collect(arguments, repeatable), config_name)
    except InputError as error:
        _stop(f"error: {error}")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def job(config: DictConfig) -> None:
        try:
            missing = [key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra")]
            if missing:
                raise InputError(f"{missing[0]} must be given; add {missing[0]}=... to the command")
            main(config)
        except InputError as error:
            # From a DataLoader's worker the message is a traceback that ends with "...InputError: sentence".
            _stop("error: " + str(error).strip().splitlines()[-1].rpartition("InputError: ")[2])
        except KeyboardInterrupt:
            _stop("stopped by the keyboard")
        except Exception as error:
            sentence = _known(error)
            if sentence is None and ranks.claim_failure(type(error).__name__) is None:
                raise
            _stop(f"error: {sentence}")
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    several = ranks.world_size() > 1
    job()
    if several:
        leave()


def leave() -> None:
    """End a run of several ranks that has done all, without taking the interpreter apart.

    Threads of process groups that some library still holds can abort Python there, and the launcher would then stop
    the other ranks while they write the results.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _known(error: Exception) -> str | None:
    """A sentence for what is no mistake of ours, however the library that met it wraps it."""
    said = str(error)
    if "No space left on device" in said:
        return f"the disk is full ({error}); free space, and go on with resume=auto where a run trained"
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; launch/plan.py with the same arguments says what fits"
    if ranks.together() and any(mark in said for mark in PEER_GONE):
        return f"another rank was killed or cannot be reached ({said.splitlines()[0]}); go on with resume=auto"
    return None


def _stop(sentence: str) -> NoReturn:
    """End with a sentence on a line of its own: an open progress bar would share it, and show itself again below.

    Of several ranks the first to fail says so. Before they have met, all of a machine fail alike, and the first speaks.
    """
    for bar in list(tqdm._instances):
        bar.close()
    if ranks.local_rank() > 0 and not torch.distributed.is_initialized():
        sys.exit(1)
    if ranks.claim_failure(sentence) is not None:
        sys.exit(1)
    sys.exit(sentence if ranks.is_first() else f"rank {ranks.rank()}: {sentence}")


def collect(arguments: Sequence[str], repeatable: Sequence[str]) -> list[str]:
    """`question=a question=b` as one list, quoted for Hydra."""
    kept = [argument for argument in arguments if argument.partition("=")[0] not in repeatable]
    for key in repeatable:
        values = [argument.partition("=")[2] for argument in arguments if argument.partition("=")[0] == key]
        quoted = ",".join(_quote(value) for value in values)
        if values:
            kept.append(f"{key}=[{quoted}]")
    return kept


def _quoted_if_needed(argument: str) -> str:
    """An override whose value is not in Hydra's grammar (split=val[:10%]) is taken as the text that it is."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={_quote(value)}"
    return argument


def _quote(value: str) -> str:
    """A string in Hydra's grammar, where backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def check_overrides(arguments: Sequence[str], config_name: str) -> list[str]:
    """The arguments as Hydra takes them: any of TrainingArguments may be given as trainer.x without a `+`.

    A group may be given with and without it: dist=fsdp is +dist=fsdp.

    Raises:
        InputError: an override names a key or a group's choice that does not exist; the nearest is suggested.
    """
    if {"-m", "--multirun"} & set(arguments):  # a sweep: Hydra composes its jobs, and says what is wrong with them
        # A launcher's jobs (submitit's) are other processes, which look for the scripts' modules.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CONF.parent / "launch"), os.environ.get("PYTHONPATH", "")])
        return list(arguments)
    arguments = [_quoted_if_needed(argument) for argument in arguments]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    arguments = [arg.lstrip("+") if arg.lstrip("+").partition("=")[0] in groups else arg for arg in arguments]
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            known = OmegaConf.to_container(hydra.compose(config_name, _choices(overrides)), resolve=False)
            checked = {override: _checked(override, known) for override in overrides}
            hydra.compose(config_name, list(checked.values()), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(" ".join(str(error).split())) from error
    return [checked.get(argument, argument) for argument in arguments]


def group(config: DictConfig, name: str) -> dict[str, Any]:
    """A resolved node of the config.

    Raises:
        InputError: a mandatory value (`???`) was not given.
    """
    missing = sorted(OmegaConf.missing_keys(config[name]))
    if missing:
        raise InputError(f"{name}.{missing[0]} must be given; add {name}.{missing[0]}=... to the command")
    node = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def given_keys() -> list[str]:
    """The keys that the command line sets."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [override.lstrip("+~").partition("=")[0] for override in given]


def refuse_overrides(reason: str, *keys: str) -> None:
    """Stop if the command line sets a key that this script would not obey."""
    for key in given_keys():
        if key in keys:
            raise InputError(f"{key} cannot be set here: it is {reason}; leave it out")


def _choices(overrides: Iterable[str]) -> list[str]:
    """The overrides that choose a file of a group (model=tiny, +experiment=x)."""
    chosen = []
    for override in overrides:
        key, _, choice = override.lstrip("+~").partition("=")
        group = key.partition("@")[0]  # data@data.parts.gqa=gqa: a choice that is put elsewhere
        if (CONF / group).is_dir():
            names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            if choice not in names:
                raise InputError(f"{group}={choice}: there is no conf/{group}/{choice}.yaml{suggest(choice, names)}")
            chosen.append(override)
    return chosen


def _checked(override: str, known: Any) -> str:
    key = override.lstrip("+~").partition("=")[0]
    parts = key.split(".")
    if (CONF / key.partition("@")[0]).is_dir() or parts[0].startswith("hydra"):
        return override
    node = known
    for depth, part in enumerate(parts):
        if isinstance(node, dict) and part in node:
            node = node[part]
            continue
        opened = depth > 0 and parts[depth - 1] in OPEN and isinstance(node, dict)
        if opened or (parts[0] == "trainer" and part in training_arguments()):
            return "++" + override.lstrip("+")
        names = [*_flatten(known), *(f"trainer.{name}" for name in training_arguments() if "trainer" in known)]
        raise InputError(f"there is no key '{key}'{suggest(key, names)}")
    if parts[-1] in OPEN and isinstance(node, dict) and not override.startswith("~"):  # all of a group at once
        return "++" + override.lstrip("+")
    return override


def training_arguments() -> list[str]:
    """The names of transformers' TrainingArguments."""
    from transformers import TrainingArguments

    return [field.name for field in dataclasses.fields(TrainingArguments)]


def _flatten(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    children = [name for key, value in node.items() for name in _flatten(value, f"{prefix}{key}.")]
    return [prefix + str(key) for key in node] + children
