"""Full (unsharded) weights and AdamW moments of a distributed model, by parameter name.

Checkpoints contain full tensors, so any strategy and number of ranks can resume them.

`torch.distributed.checkpoint.state_dict` does not replace the DDP and FSDP2 half (`FullState`):
- optimizer: `get_optimizer_state_dict` returns 8-bit moments as their library stores them (bitsandbytes' nested
  `__bnb_optimizer_quant_state__`, torchao's `OptimState8bit`), while checkpoints contain fp32 moments that any
  optimizer loads. `set_optimizer_state_dict` first steps the optimizer with zero gradients, which needs the memory of
  all gradients when a run resumes, and it expects `param_groups` in the file.
- weights: `get_model_state_dict` also lists the quantization tensors of 4-bit base weights, and returns all weights at
  once. `FullState.weights` yields one at a time, so evaluating a sharded model needs no second full copy.
So this module uses DTensor's primitives (`full_tensor`, `distribute_tensor`), one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from vlmvqa import ranks
from vlmvqa.models.interface import Model
from vlmvqa.training import optimizer_state
from vlmvqa.training.optimizer_state import local_tensor

NamedTensors = Iterator[tuple[str, Tensor]]


class FullState:
    """Full state of a model and its optimizer that are replicated (DDP, one process) or sharded by FSDP2.

    Every rank must call the methods that return or load tensors, and consume their iterators to the end.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    def weights(self, names: Container[str] | None = None) -> NamedTensors:
        """Yield the full weights, all of them or those in `names`."""
        for name, parameter in self.model.named_parameters():
            if names is None or name in names:
                yield name, _gather(local_tensor(parameter.detach()), parameter)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy full weights into the model; parameters without an entry keep their values."""
        for name, parameter in self.model.named_parameters():
            if name in weights:
                local_tensor(parameter.detach()).copy_(_local_shard(weights[name], parameter))

    def moments(self) -> NamedTensors:
        """Yield AdamW's full moments in fp32 as "exp_avg/<parameter>" and "exp_avg_sq/<parameter>"."""
        for name, parameter in self._trained_parameters():
            for key, local in optimizer_state.read(self.optimizer.state[parameter]).items():
                yield f"{key}/{name}", _gather(local, parameter)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Load what `moments` yielded after `step` optimizer steps."""
        for group, settings in enumerate(self.optimizer.param_groups):
            for parameter in settings["params"]:
                name = self.names[id(parameter)]
                if f"exp_avg/{name}" in moments:
                    local = {key: _local_shard(moments[f"{key}/{name}"], parameter) for key in optimizer_state.KEYS}
                    optimizer_state.write(self.optimizer, group, parameter, local, step)

    def step(self) -> int:
        """Return the number of steps that the moments have accumulated."""
        states = list(self.optimizer.state.values())
        return int(states[0].get("step", 0)) if states else 0

    def optimized_elements(self) -> int:
        """Return the number of elements that the optimizer updates, on all ranks together."""
        return sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])

    def _trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)


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
        """Yield the full weights: fp32 masters of trained ones, the uncast values of frozen ones."""
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

        states = {flat: optimizer_state.read(self.optimizer.state[flat]) for flat in self.partitions}
        if not all(states.values()):
            return
        with self._replaced_states(states):
            for name, parameter in self._trained_parameters():
                for key in optimizer_state.KEYS:
                    yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Load what `moments` yielded after `step` optimizer steps."""
        if not any(name.startswith("exp_avg/") for name in moments):
            return
        states = {flat: {key: torch.zeros(flat.shape) for key in optimizer_state.KEYS} for flat in self.partitions}
        with self._replaced_states(states):
            for name, parameter in self._trained_parameters():
                for key in optimizer_state.KEYS:
                    if f"{key}/{name}" in moments:
                        self._load_partition(parameter, moments[f"{key}/{name}"], key)
        for group, flat in zip(self.groups, self.partitions, strict=True):
            optimizer_state.write(self.optimizer, group, flat, states[flat], step)

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


def num_elements(parameter: Tensor) -> int:
    """Return the number of weights in a full parameter, which may be packed in 4 bits or partitioned by ZeRO-3."""
    quantized = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit weights into a byte
    return quantized.shape.numel() if quantized is not None else int(getattr(parameter, "ds_numel", parameter.numel()))


def _gather(local: Tensor, like: Tensor) -> Tensor:
    """All-gather a tensor that is sharded like `like`."""
    if not isinstance(like, DTensor):
        return local.view(like.shape)
    mesh, placements = like.device_mesh, like.placements
    # Offloaded shards are in host memory, but the mesh's process group gathers on its own device.
    local = local.to(mesh.device_type)
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def _local_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of `full`, sharded like `like`; every rank holds `full`, so nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _broadcast(weight: Tensor, device: torch.device) -> Tensor:
    """Return rank 0's weight on every rank."""
    received = weight.to(device) if ranks.is_first() else torch.empty_like(weight, device=device)
    if ranks.is_distributed():
        dist.broadcast(received, src=0)
    return received
