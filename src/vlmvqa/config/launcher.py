"""The launcher that started this process and the strategy that it implies, read from the environment."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

# Identifies this launch; unchanged when torchrun restarts its workers.
LAUNCH = "VLMVQA_LAUNCH"
# Variables in which accelerate's launcher passes the strategy of its config file.
ACCELERATES = ("FSDP_", *(f"ACCELERATE_{name}_" for name in ("USE", "DEEPSPEED", "CONFIG", "GRADIENT", "DYNAMO")))


def launcher_choice(environment: Mapping[str, str], arguments: list[str]) -> tuple[str, str] | None:
    """Return the `dist` choice that a launcher implies, and the launcher's name; None if it implies none.

    accelerate passes its config file's strategy in the environment; `deepspeed` starts scripts with --local_rank.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        offload = environment.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        return ("fsdp_offload" if offload else "fsdp"), "accelerate's config file"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            return "its deepspeed_config_file", "accelerate's config file"  # not read: dist.options has its keys
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        kept = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        return (f"zero{stage}_offload" if kept == "cpu" else f"zero{stage}"), "accelerate's config file"
    if any(argument.startswith(("--local_rank", "--local-rank")) for argument in arguments):
        return "zero2", "the deepspeed launcher"
    return None


def slurm_task(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables torchrun would set for a task of `srun`, one task per GPU on any number of machines."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": environment["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
        "MASTER_ADDR": hosts[0],
        # Differs between jobs, so that two may share a machine.
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)),
    }
