"""What a strategy keeps on every GPU whatever the batch, and what it sends.

               parameters            gradients            optimizer states      beside them
ddp            whole                 whole, in buckets    whole                 -
fsdp           sharded               sharded, fp32        sharded               the root unit, blocks on their way
zero1          whole, half size      whole and one part   a part, fp32 weights  reduction buckets
zero2          whole, half size      a part               a part, fp32 weights  reduction buckets
zero3          sharded, half size    a part               a part, fp32 weights  a reduction bucket, gathered parameters

Written from the code of PyTorch 2.15 (FSDP2, DDP), accelerate 1.15, DeepSpeed 0.19.8, bitsandbytes 0.50 and torchao
0.18; "half size" is under bf16 or fp16.

Legend: N GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError, suggest
from vlmvqa.extras.planning.quantized_memory import FourBit
from vlmvqa.models.checkpoint import Model
from vlmvqa.models.vlm import PARTS
from vlmvqa.training.runtime_checks import CLASSES

BLOCK = 256  # elements that share a scale in 8-bit states, in bitsandbytes and torchao
SMALLEST_8BIT = 4096  # smaller tensors keep fp32 states, in both
# DeepSpeed's defaults, in elements.
REDUCE_BUCKET, MAX_LIVE, SUB_GROUP = int(5e8), int(1e9), int(1e9)

OPTIMIZERS = tuple(CLASSES)  # those that a run takes
BITSANDBYTES = tuple(name for name, (package, *_) in CLASSES.items() if package == "bitsandbytes")
EIGHT_BIT = tuple(name for name in BITSANDBYTES if "8bit" in name)  # its others keep fp32 states


@dataclass(frozen=True)
class Weight:
    """A parameter; `unit` numbers the block that holds it (None: none does, so FSDP's root unit).

    `packed`: bytes that it takes in 4 bits, whatever the strategy (None: `itemsize` an element).
    """

    part: str
    unit: int | None
    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    packed: int | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def stored(self, itemsize: int | None = None) -> int:
        """Bytes of the whole weight, converted to elements of so many bytes where its own are not kept."""
        return self.packed or self.numel * (itemsize or self.itemsize)

    def shard(self, gpus: int) -> int:
        """Elements of the largest of FSDP2's N shards, which are cut along the first dimension, unevenly."""
        return ceil(self.shape[0] / gpus) * prod(self.shape[1:])


@dataclass(frozen=True)
class Training:
    """What the trainer is told that its memory depends on; `precision` is "bf16", "fp16" or "fp32"."""

    precision: str
    optimizer: str
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            near = suggest(self.optimizer, OPTIMIZERS)
            raise InputError(
                f"trainer.optim={self.optimizer} cannot be planned; use one of {', '.join(OPTIMIZERS)}{near}"
            )

    @property
    def mixed(self) -> bool:
        return self.precision != "fp32"


@dataclass(frozen=True)
class Resident:
    """Bytes on each GPU, and bytes that each sends.

    Attributes:
        buffers: communication buffers and gathered weights, alive throughout the backward pass.
        decoder, encoder: likewise, while the decoder's blocks are at work, or the encoder's.
        lasting: those of the buffers that are there in the step too.
        step: what the optimizer's step needs for a moment, when activations are gone.
        reduction: what the last reduction of gradients needs, likewise.
        grows: gradients are made in the backward pass, and none is there when it begins.
        host: bytes in host memory, for each GPU.
        sent_each_pass, sent_each_step: to the other GPUs, for a micro-batch and for an optimizer step.
        copied_each_pass: to and from host memory.
        stepped_on_host: parameters that the optimizer updates in host memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    lasting: int = 0
    decoder: int = 0
    encoder: int = 0
    reduction: int = 0
    grows: bool = False
    host: int = 0
    sent_each_pass: float = 0.0
    sent_each_step: float = 0.0
    copied_each_pass: float = 0.0
    stepped_on_host: int = 0


def weights_of(model: Model) -> list[Weight]:
    """A model's parameters, also of one on the meta device."""
    units = {}
    for number, block in enumerate(model.blocks):
        units.update({id(parameter): number for parameter in block.parameters()})
    layers = {id(layer.packed): layer for layer in model.modules() if isinstance(layer, FourBit)}
    weights = []
    for name, p in model.named_parameters():
        layer = layers.get(id(p))
        shape = tuple(p.shape) if layer is None else (layer.out_features, layer.in_features)
        packed = None if layer is None else layer.stored
        weights.append(Weight(model.part_of(name), units.get(id(p)), shape, p.itemsize, p.requires_grad, packed))
    return weights


def state_bytes(optimizer: str, numels: Sequence[int], itemsize: int = 4) -> int:
    """Bytes of an optimizer's states for tensors of so many elements; pages count, though CUDA may put them aside."""
    if optimizer == "sgd":
        return 0
    if optimizer in EIGHT_BIT:  # two moments of a byte, two fp32 scales a block
        return sum(2 * n + 8 * ceil(n / BLOCK) if n >= SMALLEST_8BIT else 8 * n for n in numels)
    if optimizer == "adamw_torch_8bit":  # likewise, and each moment its own table of 256 values
        eight = [n for n in numels if n >= SMALLEST_8BIT and n % BLOCK == 0]
        return sum(2 * n + 8 * n // BLOCK + 2048 for n in eight) + 2 * itemsize * (sum(numels) - sum(eight))
    return 2 * (4 if optimizer in BITSANDBYTES else itemsize) * sum(numels)


def step_bytes(optimizer: str, groups: Sequence[Sequence[int]], itemsize: int = 4) -> int:
    """Bytes that an optimizer's step needs for a moment, given its parameter groups."""
    if optimizer in ("adamw_torch", "sgd"):  # foreach: the denominators (or decayed gradients) of a group at once
        return max((itemsize * sum(group) for group in groups), default=0)
    if optimizer == "adamw_torch_8bit":  # both moments of a tensor in fp32
        return 8 * max((n for group in groups for n in group), default=0)
    return 0


def resident(weights: Sequence[Weight], dist: DistSettings, gpus: int, training: Training) -> Resident:
    """What a strategy keeps on each of N GPUs."""
    if dist.strategy == "ddp":
        return _ddp(weights, gpus, training)
    if dist.strategy == "fsdp":
        return _fsdp(weights, dist, gpus, training)
    return _zero(weights, dist, gpus, training)


def _ddp(weights: Sequence[Weight], gpus: int, training: Training) -> Resident:
    trained = [weight for weight in weights if weight.trained]
    gradients = sum(weight.stored() for weight in trained)
    return Resident(
        parameters=sum(weight.stored() for weight in weights),
        gradients=gradients,
        optimizer=_states(training.optimizer, trained),
        # The trainer sets gradient_as_bucket_view: the buckets, there from the start, are the gradients.
        buffers=0,
        lasting=0,
        step=step_bytes(training.optimizer, _groups(trained, 1), _widest(trained)),
        grows=training.accumulation == 1 and gpus == 1,
        sent_each_step=2 * (gpus - 1) / gpus * gradients,
    )


def _fsdp(weights: Sequence[Weight], dist: DistSettings, gpus: int, training: Training) -> Resident:
    trained = [weight for weight in weights if weight.trained]
    itemsize = _widest(trained)
    computed, reduced = (2, 4) if training.mixed else (itemsize, itemsize)
    # bitsandbytes cannot step on shards; torchao takes its place.
    optimizer = "adamw_torch_8bit" if training.optimizer in EIGHT_BIT else training.optimizer
    parameters = sum(weight.shard(gpus) * weight.itemsize for weight in weights)
    gradients = sum(weight.shard(gpus) * weight.itemsize for weight in trained)
    states = _states(optimizer, trained, gpus)
    root, root_trained = (sum(w.numel for w in group if w.unit is None) for group in (weights, trained))

    def at_work(part: str) -> int:
        # The block at work and the next one on its way; the gradients of a block and what they are reduced from.
        return 2 * computed * _largest_unit(weights, part) + (computed + reduced) * _largest_unit(trained, part)

    whole, others = sum(weight.numel for weight in weights), (gpus - 1) / gpus
    blocks = whole - root
    sent = others * (computed * (root + 2 * blocks) + reduced * sum(weight.numel for weight in trained))
    kept = Resident(
        parameters=parameters,
        gradients=gradients,
        optimizer=states,
        buffers=computed * root,
        decoder=at_work("language"),
        encoder=at_work("vision"),
        step=step_bytes(optimizer, _groups(trained, gpus), itemsize),
        # The root unit's weights are let go before its gradients are reduced.
        reduction=root_trained * (computed + reduced) - computed * root,
        sent_each_pass=sent,
    )
    if not dist.offload:
        return kept
    return replace(
        kept,
        parameters=0,
        gradients=0,
        optimizer=0,
        step=0,
        host=parameters + gradients + states,
        copied_each_pass=2 * parameters + gradients,
        stepped_on_host=gradients // itemsize,
    )


def _zero(weights: Sequence[Weight], dist: DistSettings, gpus: int, training: Training) -> Resident:
    trained = [weight for weight in weights if weight.trained]
    zero = {"overlap_comm": True, **dist.options.get("zero_optimization", {})}
    item = 2 if training.mixed else 4
    whole, learnt = (sum(weight.numel for weight in group) for group in (weights, trained))
    largest = max((weight.numel for weight in trained), default=0)
    # A part's weights, gradients and states lie flat, a group at a time.
    parts = [[ceil(sum(group) / (2 * gpus)) * 2] for group in _groups(trained, 1)]
    part = sum(sum(group) for group in parts)
    states = state_bytes(training.optimizer, [n for group in parts for n in group])
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    # The bucket's content is flattened once more to be sent; a weight larger than a bucket is sent alone, at the end.
    copy = item * min(bucket, learnt)
    alone = 2 * item * largest if largest > bucket else 0
    # The step takes a group's gradients in fp32, first from a flat copy, then with what the optimizer needs.
    sub_group = min(max((sum(group) for group in parts), default=0), SUB_GROUP if dist.stage == 3 else part)
    beside = step_bytes(training.optimizer, [[sub_group]])
    step = 4 * sub_group + (max(item * sub_group, beside) if training.mixed else beside)
    others = (gpus - 1) / gpus
    if dist.stage < 3:
        first = dist.stage == 1
        return Resident(
            parameters=sum(weight.stored(item) for weight in weights),
            gradients=item * (learnt if first else part),
            optimizer=4 * part + states,
            # Two buckets take turns; the part of this pass's gradients stands beside what was there before.
            buffers=item * ((2 if zero["overlap_comm"] else 1) * bucket + part),
            decoder=copy,
            encoder=copy,
            reduction=alone,
            step=step - (item * (learnt - part) if first else 0),
            sent_each_pass=0.0 if first else others * item * learnt,
            sent_each_step=others * item * (2 if first else 1) * learnt,
        )
    sharded = sum(ceil(weight.numel / gpus) for weight in weights)
    live = min(whole, int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
    kept = Resident(
        parameters=item * sharded,
        gradients=item * part,
        optimizer=4 * part + states,
        buffers=item * bucket,
        lasting=item * bucket,
        decoder=copy + item * live,
        encoder=copy + item * live,
        reduction=alone,
        step=step,
        sent_each_pass=others * item * (2 * whole + learnt),
    )
    if not dist.offload:
        return kept
    return replace(
        kept,
        parameters=0,
        gradients=0,
        optimizer=0,
        step=0,
        host=kept.parameters + kept.gradients + kept.optimizer + 4 * part,
        copied_each_pass=2 * kept.parameters + kept.gradients,
        stepped_on_host=part,
    )


def _states(optimizer: str, trained: Sequence[Weight], gpus: int = 1) -> int:
    """Bytes of an optimizer's states, which are of each weight's own type."""
    sizes = {weight.itemsize for weight in trained}
    return sum(state_bytes(optimizer, [w.shard(gpus) for w in trained if w.itemsize == size], size) for size in sizes)


def _widest(trained: Sequence[Weight]) -> int:
    return max((weight.itemsize for weight in trained), default=4)


def _groups(weights: Sequence[Weight], gpus: int) -> list[list[int]]:
    """The optimizer's groups, as elements of each tensor: a group a part, weights that decay apart from the others."""
    keys = [(part, decays) for part in PARTS for decays in (True, False)]
    return [[w.shard(gpus) for w in weights if (w.part, len(w.shape) > 1) == key] for key in keys]


def _largest_unit(weights: Sequence[Weight], part: str) -> int:
    units: dict[int, int] = {}
    for weight in weights:
        if weight.unit is not None and weight.part == part:
            units[weight.unit] = units.get(weight.unit, 0) + weight.numel
    return max(units.values(), default=0)
