"""Run a script under Hydra; user errors print one line."""

from __future__ import annotations

import usage

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import hydra
import torch
import torch.distributed
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from vlmvqa import ranks
from vlmvqa.config.early_checks import refuse_mistakes
from vlmvqa.config.launcher import launcher_choice, slurm_task
from vlmvqa.config.overrides import CONF, collect, compose, is_sweep, resolving
from vlmvqa.config.sweep import Sweep
from vlmvqa.errors import InputError

# What PyTorch says on a rank whose peers are gone.
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
PATIENCE = 60.0  # seconds for the first rank of a machine to speak
# What a launcher implies for `dist`, and its name: read once, before its arguments are taken out.
LAUNCHER = launcher_choice(os.environ, sys.argv[1:])
os.environ |= slurm_task(os.environ)


def run(main: Callable[[DictConfig], bool | None], config_name: str) -> None:
    """Run `main` as a Hydra job over `conf/<config_name>.yaml`, with this process's command line."""
    usage.IMPORTS.close()
    # `deepspeed` puts --local_rank=0 before the overrides, where Hydra would take it for one.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(("--local_rank", "--local-rank"))]
    try:
        sys.argv[1:], configs = compose(collect(arguments, config_name), config_name)
    except InputError as error:
        _stop(f"error: {error}")
    start = partial(_guarded, main, config_name)
    several = ranks.world_size() > 1
    if any(argument.startswith("-") for argument in arguments):  # Hydra's own: --cfg job, -m
        _run_by_hydra(start, config_name, configs)
    else:
        with resolving(configs[0]) as config:
            start(config)
    if several:
        leave()


def _run_by_hydra(start: Callable[[DictConfig], bool | None], config_name: str, configs: Sequence[DictConfig]) -> None:
    """Let Hydra compose the config once more and run the job, a sweep's jobs one after the other, or print it."""
    sweep = _sweep(configs, config_name) if is_sweep(sys.argv) else None

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    def job(config: DictConfig) -> None:
        if sweep is None:
            start(config)
        else:
            sweep.run(config, start)

    done = True
    try:
        job()
    finally:
        if sweep is not None and ranks.is_first():
            done = sweep.finish()
    if not done:
        sys.exit(1)


def _sweep(configs: Sequence[DictConfig], config_name: str) -> Sweep:
    """The sweep of this process's command line, and what its jobs need."""
    sweep = Sweep.of(sys.argv[1:], configs, config_name)
    first = next((place for place, argument in enumerate(sys.argv) if place and "=" in argument), len(sys.argv))
    sys.argv[first:first] = sweep.overrides  # beside the others: argparse takes only one group of them
    # A launcher's jobs (submitit's) are other processes, which look for the scripts' modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CONF.parent / "launch"), os.environ.get("PYTHONPATH", "")])
    sweep.begin()
    return sweep


def _guarded(main: Callable[[DictConfig], bool | None], config_name: str, config: DictConfig) -> bool | None:
    """Run `main`; what the user can correct ends the process with one sentence."""
    try:
        refuse_mistakes(config, config_name)
        return main(config)
    except InputError as error:
        # From a DataLoader's worker the message is a traceback that ends with "...InputError: sentence".
        _stop("error: " + str(error).strip().splitlines()[-1].rpartition("InputError: ")[2])
    except KeyboardInterrupt:
        _stop("stopped by Ctrl-C")
    except Exception as error:
        sentence = _known(error)
        if sentence is None and ranks.claim_failure(type(error).__name__) is None:
            raise
        _stop(f"error: {sentence}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


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
        return f"the disk is full ({error}); free space, and resume a training run with resume=auto"
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; launch/plan.py with the same arguments says what fits"
    if ranks.is_distributed() and any(mark in said for mark in PEER_GONE):
        return f"another rank was killed or cannot be reached ({said.splitlines()[0]}); resume with resume=auto"
    return None


def _stop(sentence: str) -> NoReturn:
    """End with a sentence on a line of its own: an open progress bar would share it, and show itself again below.

    Of several ranks the first to fail says so. Before they have met, all of a machine fail alike, and the first speaks.
    """
    for bar in list(tqdm._instances):
        bar.close()
    if ranks.local_rank() > 0 and not torch.distributed.is_initialized():
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(PATIENCE)  # the launcher ends all at the first exit, and the first may still be importing
    if ranks.claim_failure(sentence) is not None:
        sys.exit(1)
    sys.exit(sentence if ranks.is_first() else f"rank {ranks.rank()}: {sentence}")


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
