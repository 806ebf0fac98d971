"""DeepSpeed ZeRO: its configuration, corrections of accelerate's integration, and full weights and moments.

Imported only if a ZeRO strategy is selected.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlmvqa import ranks
from vlmvqa.config.schema import DistSettings
from vlmvqa.models.interface import Model
from vlmvqa.training.checkpoint_state import KEYS, FullState, NamedTensors, read_moments, write_moments


def deepspeed_config(settings: DistSettings) -> dict[str, Any]:
    """Return DeepSpeed's configuration; transformers fills in "auto" from the TrainingArguments."""
    zero: dict[str, Any] = {"stage": settings.stage, "overlap_comm": torch.cuda.is_available()}
    if settings.offload:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_param": place, "offload_optimizer": place}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        # The trainer passes its own optimizer, which has a learning rate per part. Offloading keeps torch's AdamW,
        # because DeepSpeed's CPU Adam needs a compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return _merged(config, settings.options)


def _merged(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge overrides into nested dictionaries, in place."""
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(config.get(key), dict)
        config[key] = _merged(config[key], value) if nested else value
    return config


def prepare(trainer: Any) -> ZeroFullState:
    """Set DeepSpeed's clipping, and return the full state of a `VqaTrainer` whose engine is built."""
    unset_hf_deepspeed_config()  # accelerate has set it again (`correct_deepspeed`)
    _set_clipping(trainer)
    return ZeroFullState(trainer.vlm, trainer.engine, trainer.frozen)


def _set_clipping(trainer: Any) -> None:
    """Set DeepSpeed's clipping bound inside its optimizer step, where the gradient norm is first known.

    DeepSpeed clips one partition after another; the bound is set at the first partition of a step.
    """
    zero, clip = trainer.engine.optimizer, trainer.engine.optimizer.unscale_and_clip_grads
    limited_step: int | None = None

    def unscale_and_clip_grads(partition: Any, total_norm: Any) -> Any:
        nonlocal limited_step
        if limited_step != trainer.state.global_step:
            limited_step = trainer.state.global_step
            limit = trainer.clipping.limit(trainer.finite(total_norm / zero.loss_scale))
            zero.clip_grad = 0.0 if limit == float("inf") else limit
        return clip(partition, total_norm)

    zero.unscale_and_clip_grads = unscale_and_clip_grads


def correct_deepspeed() -> None:
    """Correct errors of accelerate's DeepSpeed integration; call this after TrainingArguments are created.

    Without a GPU, TrainingArguments ignore DeepSpeed if use_cpu is set; otherwise they count one process, so every rank
    would train on the same data. Under ZeRO-3, transformers would partition every model that is built afterwards,
    including unsharded copies for evaluation.
    """
    PartialState().distributed_type = DistributedType.DEEPSPEED
    unset_hf_deepspeed_config()


def silence() -> None:
    """Hide warnings about DeepSpeed's own defaults, and prevent it from compiling collectives for CPUs."""
    import deepspeed

    # It warns about its own defaults and about values that accelerate sets; runtime_checks.py checks what runs.
    deepspeed.utils.logger.setLevel("ERROR")
    # Shared-memory collectives for CPUs would be compiled first; gloo works without them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ZeroFullState(FullState):
    """Full state under DeepSpeed, which flattens parameters into partitions, often with fp32 master weights.

    Args:
        engine: the DeepSpeed engine.
        frozen: frozen weights before DeepSpeed cast them to the compute dtype; meta tensors except on rank 0.
    """

    def __init__(self, model: Model, engine: Any, frozen: dict[str, Tensor]) -> None:
        super().__init__(model, engine.optimizer.optimizer)
        self.zero, self.frozen = engine.optimizer, frozen
        self.stage = int(engine.zero_optimization_stage())
        if self.stage == 3:
            self.partitions = self.zero.fp32_partitioned_groups_flat
            self.groups = [self.zero.sub_group_to_group_id[number] for number in range(len(self.partitions))]
        else:
            self.partitions = self.zero.single_partition_of_fp32_groups
            self.groups = list(range(len(self.partitions)))

    def optimized_elements(self) -> int:
        """Return the number of elements in this rank's partitions, padding included."""
        return sum(partition.numel() for partition in self.partitions)

    def weights(self, names: Container[str] | None = None) -> NamedTensors:
        """Yield the full weights: fp32 master weights of trained parameters, the original values of frozen ones."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            if names is not None and name not in names:
                continue
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif name in self.frozen:
                yield name, _broadcast(self.frozen[name], parameter.device)
            else:
                with self._gathered(parameter):
                    yield name, parameter.detach().clone()

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy full weights into the model's parameters, its master weights and `frozen`."""
        for name, parameter in self.model.named_parameters():
            if name not in weights:
                continue
            with self._gathered(parameter, writes=True):
                parameter.copy_(weights[name])
            if parameter.requires_grad:
                self._load_partition(parameter, weights[name], None)
            elif name in self.frozen and ranks.is_first():
                self.frozen[name] = weights[name]

    def moments(self) -> NamedTensors:
        """Yield AdamW's full moments in fp32; none before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = {flat: read_moments(self.optimizer.state[flat]) for flat in self.partitions}
        if not all(states.values()):
            return
        with self._replaced_states(states):
            for name, parameter in self._trained_parameters():
                for key in KEYS:
                    yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Load what `moments` yielded after `step` optimizer steps."""
        if not any(name.startswith("exp_avg/") for name in moments):
            return
        states = {flat: {key: torch.zeros(flat.shape) for key in KEYS} for flat in self.partitions}
        with self._replaced_states(states):
            for name, parameter in self._trained_parameters():
                for key in KEYS:
                    if f"{key}/{name}" in moments:
                        self._load_partition(parameter, moments[f"{key}/{name}"], key)
        for group, flat in zip(self.groups, self.partitions, strict=True):
            write_moments(self.optimizer, group, flat, states[flat], step)

    @contextmanager
    def _replaced_states(self, states: Mapping[Tensor, dict[str, Tensor]]) -> Iterator[None]:
        """Make DeepSpeed's accessors use these fp32 moments instead of the optimizer's, which may be 8-bit."""
        own = {flat: self.optimizer.state[flat] for flat in states}
        self.optimizer.state.update(states)
        self._relink()
        try:
            yield
        finally:
            self.optimizer.state.update(own)
            if all(own.values()):
                self._relink()

    def _relink(self) -> None:
        """Recreate the views of a partition's state that ZeRO-1 and ZeRO-2 attach to each parameter."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
            self.zero._hp_optimizer_states_linked = False

    def _load_partition(self, parameter: Any, full: Tensor, key: str | None) -> None:
        """Copy this rank's partition of `full` into the master weight (`key=None`) or a moment."""
        if self.stage < 3:
            parameter.set_full_hp_param(full.to(torch.float32), key)
            return
        size = parameter.ds_tensor.ds_numel
        padded = F.pad(full.flatten(), (0, size * ranks.world_size() - full.numel()))
        partition = padded[size * ranks.rank() : size * (ranks.rank() + 1)]
        parameter._z3_optimizer.set_local_hp_param(partition, parameter, key)

    @contextmanager
    def _gathered(self, parameter: nn.Parameter, writes: bool = False) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None):
            yield


def _broadcast(weight: Tensor, device: torch.device) -> Tensor:
    """Return rank 0's weight on every rank."""
    received = weight.to(device) if ranks.is_first() else torch.empty_like(weight, device=device)
    if ranks.is_distributed():
        dist.broadcast(received, src=0)
    return received
