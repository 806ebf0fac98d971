"""Whole tensors out of the parts that ranks hold, and back: weights and AdamW's moments, by parameter name.

What a checkpoint holds is the same under every strategy and number of ranks, so any of them resumes it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vlmvqa import ranks
from vlmvqa.models.interface import Model
from vlmvqa.training import optimizer_state

Named = Iterator[tuple[str, Tensor]]


class Whole:
    """A model and its optimizer held whole (ddp, one process) or as FSDP2's shards."""

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    def weights(self, names: Container[str] | None = None) -> Named:
        """Every weight, or those of the names, whole. All ranks must go through it together, to the end."""
        for name, parameter in self.model.named_parameters():
            if names is None or name in names:
                yield name, _whole(_local(parameter), parameter)

    @torch.no_grad()
    def put_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights in; those that are not given stay as they are."""
        for name, parameter in self.model.named_parameters():
            if name in weights:
                _local(parameter).copy_(_part(weights[name], parameter))

    def moments(self) -> Named:
        """AdamW's moments, whole, as "exp_avg/<parameter>" and "exp_avg_sq/<parameter>"; all ranks together."""
        for name, parameter in self._trained():
            for key, local in optimizer_state.read(self.optimizer.state[parameter]).items():
                yield f"{key}/{name}", _whole(local, parameter)

    def step(self) -> int:
        """How many steps the moments have seen."""
        return optimizer_state.step_of(next(iter(self.optimizer.state.values()), {}))

    @torch.no_grad()
    def put_moments(self, saved: Mapping[str, Tensor], step: int) -> None:
        for group, settings in enumerate(self.optimizer.param_groups):
            for parameter in settings["params"]:
                name = self.names[id(parameter)]
                if f"exp_avg/{name}" in saved:
                    parts = {key: _part(saved[f"{key}/{name}"], parameter) for key in optimizer_state.KEYS}
                    optimizer_state.write(self.optimizer, group, parameter, parts, step)

    def elements(self) -> int:
        """How many elements the optimizer steps on: all ranks' shards of a tensor count as that tensor."""
        return sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)


class WholeZero(Whole):
    """The same under DeepSpeed, which flattens parameters into partitions and may keep fp32 masters of them.

    Args:
        engine: DeepSpeed's.
        frozen: the untrained weights as they were before DeepSpeed rounded them to what is computed in; rank 0 has
            them, the others their shapes.
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

    def elements(self) -> int:
        """How many elements this rank's partitions hold, padding included."""
        return sum(partition.numel() for partition in self.partitions)

    def weights(self, names: Container[str] | None = None) -> Named:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            if names is not None and name not in names:
                continue
            if parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif name in self.frozen:
                yield name, self._told(self.frozen[name], parameter.device)
            else:
                with self._gathered(parameter):
                    yield name, parameter.detach().clone()

    @torch.no_grad()
    def put_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if name not in weights:
                continue
            whole = weights[name]
            with self._gathered(parameter, writes=True):
                parameter.copy_(whole)
            if parameter.requires_grad:
                self._put(parameter, whole, None)
            elif name in self.frozen and ranks.is_first():
                self.frozen[name] = whole

    def moments(self) -> Named:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = {flat: optimizer_state.read(self.optimizer.state[flat]) for flat in self.partitions}
        if not all(states.values()):
            return
        with self._standing_in(states):
            for name, parameter in self._trained():
                for key in optimizer_state.KEYS:
                    yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def put_moments(self, saved: Mapping[str, Tensor], step: int) -> None:
        if not any(name.startswith("exp_avg/") for name in saved):
            return
        states = {flat: {key: torch.zeros(flat.shape) for key in optimizer_state.KEYS} for flat in self.partitions}
        with self._standing_in(states):
            for name, parameter in self._trained():
                for key in optimizer_state.KEYS:
                    if f"{key}/{name}" in saved:
                        self._put(parameter, saved[f"{key}/{name}"], key)
        for group, flat in zip(self.groups, self.partitions, strict=True):
            optimizer_state.write(self.optimizer, group, flat, states[flat], step)

    @contextmanager
    def _standing_in(self, states: Mapping[Tensor, dict[str, Tensor]]) -> Iterator[None]:
        """Let DeepSpeed's accessors see these fp32 moments in place of the optimizer's own, which may be 8-bit."""
        own = {flat: self.optimizer.state[flat] for flat in states}
        self.optimizer.state.update(states)
        self._link()
        try:
            yield
        finally:
            self.optimizer.state.update(own)
            if all(own.values()):
                self._link()

    def _link(self) -> None:
        """Stages 1 and 2 keep, at each parameter, views of its partition's state: have them made anew."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
            self.zero._hp_optimizer_states_linked = False

    def _told(self, weight: Tensor, device: torch.device) -> Tensor:
        """A weight that rank 0 has kept, on every rank."""
        told = weight.to(device) if ranks.is_first() else torch.empty_like(weight, device=device)
        if ranks.is_distributed():
            dist.broadcast(told, src=0)
        return told

    def _put(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        """Copy this rank's part into the master weight (`key=None`) or a moment."""
        if self.stage < 3:
            parameter.set_full_hp_param(whole.to(torch.float32), key)
            return
        size = parameter.ds_tensor.ds_numel
        padded = F.pad(whole.flatten(), (0, size * ranks.world_size() - whole.numel()))
        part = padded[size * ranks.rank() : size * (ranks.rank() + 1)]
        parameter._z3_optimizer.set_local_hp_param(part, parameter, key)

    @contextmanager
    def _gathered(self, parameter: nn.Parameter, writes: bool = False) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None):
            yield


def _local(parameter: Tensor) -> Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def _whole(local: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every rank holds a part, as `like` is held."""
    if not isinstance(like, DTensor):
        return local.view(like.shape)
    mesh, placements = like.device_mesh, like.placements
    # Offloaded shards lie in host memory, but are gathered where the mesh is.
    local = local.to(mesh.device_type)
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of it: FSDP2 cuts the first dimension as `torch.chunk` does."""
    if not isinstance(like, DTensor):
        return whole
    chunks = whole.chunk(like.device_mesh.size(), dim=0)
    rank = like.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]
