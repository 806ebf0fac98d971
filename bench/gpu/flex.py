"""FlexAttention alone at Gemma 2's width: kernel options compared, and the shared memory of an A10G's tiles.

1 row of 4,096 tokens, packed with VQAv2's lengths; 8 query heads and 4 key-value heads of width 256; softcap 50, the
pattern blockwise_prefix, forward and backward. "of_matrix_rate" counts the pairs of tokens that see each other.

An A10G's tiles are compiled here for its architecture (sm_86) too, which needs no such GPU: Triton reports the shared
memory that a kernel allocates, and it must be at most the A10G's 101,376 bytes per block.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.gpu import machine as gpu_machine
from bench.gpu import sizes as gpu_sizes
from bench.gpu.section import Row, Section, timed
from vlmvqa.models import flops
from vlmvqa.models.attention import softcap_attention
from vlmvqa.sequence.masks import Tokens, block_mask, dense_mask
from vlmvqa.sequence.rows import build_row, pad_rows

PATTERN, SOFTCAP = "blockwise_prefix", 50.0
A10G, A10G_CAPABILITY = 101_376, 86  # bytes of shared memory per block; compute capability 8.6
TIMES = 1.2  # largest error, in errors of dense attention in bfloat16
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Queries `[1, H, T, D]`, keys and values `[1, G, T, D]`, the row's tokens, and the operations forward."""

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: Tokens
    mask: BlockMask
    forward_flops: int

    @property
    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def flex(section: Section) -> None:
    """Compare the chosen options with dense attention, then measure the others."""
    from vlmvqa.models import flex_tiles

    inputs = make_inputs(section)
    head_dim, dtype = section.sizes.heads[3], inputs.query.dtype
    section.row("dense attention", measure_dense, section, inputs)
    if not section.cuda:
        with gpu_sizes.flex_available(section.device):
            compiled = torch.compile(flex_attention, backend="aot_eager")
            section.row("flex without its kernels", measure, section, inputs, compiled, {})
        section.needs_cuda("kernel options and shared memory")
        flex_tiles.choose(head_dim, dtype, A10G, 8)
        _compare(section, inputs, compiled, {})
        return
    # Kernels are compiled in this process and not cached, so that their Triton functions can be found.
    with torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False):
        chosen = flex_tiles.kernel_options(head_dim, inputs.query)
        for_a10g = flex_tiles.choose(head_dim, dtype, A10G, 8)
        compiled = _new()
        section.row("chosen for this GPU", measure, section, inputs, compiled, chosen)
        _compare(section, inputs, compiled, chosen)
        earlier = kernels()
        section.row("chosen for an A10G", measure, section, inputs, _new(), for_a10g)
        section.row("an A10G's shared memory", shared_memory, section, earlier)
        section.row("inductor's default", measure_or_refuse, section, inputs, {})
        for name, options in sweep(chosen).items():
            if options not in (chosen, for_a10g):
                section.row(name, measure_or_refuse, section, inputs, options)


def make_inputs(section: Section) -> Inputs:
    """Return random states for a packed row."""
    heads, groups, tokens, width = section.sizes.heads
    shape = gpu_sizes.SHAPES["vqav2"]
    image = shape.num_image_tokens if section.sizes.name == "real" else 17
    (documents,) = gpu_sizes.full_rows(shape, 1, tokens, image, 1000)
    columns = pad_rows([build_row(documents, image, PATTERN)], tokens)
    pairs = int(flops.count(columns)[flops.COUNTED.index("pairs")])
    columns = {name: column.to(section.device) for name, column in columns.items()}
    row = Tokens.of(columns)
    generator = torch.Generator(section.device).manual_seed(0)

    def states(count: int, scale: float = 1.0) -> Tensor:
        made = scale * torch.randn(1, count, tokens, width, device=section.device, generator=generator)
        return made.to(section.sizes.half).requires_grad_()

    # Scores then have a standard deviation of 16, so that the softcap changes them.
    query, key, value = states(heads, 16.0), states(groups), states(groups)
    return Inputs(query, key, value, row, block_mask(row), 4 * heads * width * pairs)


def _new() -> Any:
    """Return FlexAttention to be compiled again."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def call(inputs: Inputs, compiled: Any, options: Options) -> Tensor:
    """Run FlexAttention as transformers does: `float[1, H, T, D]`."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    width = inputs.query.shape[-1]
    found: Tensor = compiled(
        *inputs.states,
        score_mod=capped,
        block_mask=inputs.mask,
        enable_gqa=True,
        scale=width**-0.5,
        kernel_options=dict(options) or None,
    )
    return found


def dense(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return dense attention's output and gradients, computed in `dtype`."""
    states = [state.detach().to(dtype).requires_grad_() for state in inputs.states]
    seen = dense_mask(inputs.tokens, inputs.tokens)
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    module = nn.Module().train()
    scale = inputs.query.shape[-1] ** -0.5
    query, key, value = states
    found, _ = softcap_attention(module, query, key, value, mask, scale, SOFTCAP)
    return _with_gradients(inputs, found.transpose(1, 2), states)


def _with_gradients(inputs: Inputs, output: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the output without padding, and the gradients of its sum of squares."""
    real = (inputs.tokens.document >= 0)[:, None, :, None]
    output = output * real
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), states)


def measure(section: Section, inputs: Inputs, compiled: Any, options: Options) -> Row:
    """Measure forward, and forward with backward."""
    forward = timed(section.device, lambda: call(inputs, compiled, options), section.sizes.repeats, warm=2)
    output = call(inputs, compiled, options)
    gradient = torch.randn_like(output)

    def both() -> object:
        return torch.autograd.grad(call(inputs, compiled, options), inputs.states, gradient)

    seconds = min(timed(section.device, both, section.sizes.repeats, warm=2))
    used = gpu_machine.utilisation(section, 3 * inputs.forward_flops, seconds)
    return {"forward_seconds": min(forward), "seconds": seconds, **used, "options": dict(options)}


def measure_or_refuse(section: Section, inputs: Inputs, options: Options) -> Row:
    """Measure options that may not fit; the compiler's refusal is a result."""
    try:
        return measure(section, inputs, _new(), options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return {"skipped": "does not compile", "reason": str(error)[:500], "options": dict(options)}


def measure_dense(section: Section, inputs: Inputs) -> Row:
    seconds = min(timed(section.device, lambda: dense(inputs, section.sizes.half), section.sizes.repeats))
    return {"seconds": seconds, **gpu_machine.utilisation(section, 3 * inputs.forward_flops, seconds)}


def _compare(section: Section, inputs: Inputs, compiled: Any, options: Options) -> None:
    """Compare output and gradients with dense attention in fp32."""
    expected, rounded = dense(inputs, torch.float32), dense(inputs, torch.bfloat16)
    with gpu_sizes.flex_available(section.device):
        found = _with_gradients(inputs, call(inputs, compiled, options), list(inputs.states))
    for name, exact, half, value in zip(("output", "query", "key", "value"), expected, rounded, found, strict=True):
        limit = TIMES * (half.float() - exact).norm() / exact.norm()
        error = (value.float() - exact).norm() / exact.norm()
        section.compare(f"error of {name}", error.item(), limit.item())


def sweep(chosen: Options) -> dict[str, Options]:
    """Return the chosen options with another forward or backward tile: resident x streamed tokens, stages."""
    from vlmvqa.models.flex_tiles import BACKWARD, FORWARD

    found: dict[str, Options] = {}
    for tile in FORWARD:
        sizes = {"fwd_BLOCK_M": tile.resident, "fwd_BLOCK_N": tile.streamed}
        more = {"fwd_num_stages": tile.stages, "fwd_num_warps": tile.warps}
        found[f"forward {tile.resident} x {tile.streamed}, {tile.stages} stages"] = {**chosen, **sizes, **more}
    for tile in BACKWARD:
        sizes = {"bwd_BLOCK_M1": tile.streamed, "bwd_BLOCK_N1": tile.resident}
        sizes |= {"bwd_BLOCK_M2": tile.resident, "bwd_BLOCK_N2": tile.streamed}
        more = {"bwd_num_stages": tile.stages, "bwd_num_warps": tile.warps}
        found[f"backward {tile.resident} x {tile.streamed}, {tile.stages} stages"] = {**chosen, **sizes, **more}
    return found


def kernels() -> list[Any]:
    """Return inductor's compiled FlexAttention kernels: private classes of PyTorch, of torch 2.11 to 2.15."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    found = [one for one in gc.get_objects() if type(one) is CachingAutotuner]
    return [one for one in found if "flex_attention" in getattr(one.fn, "__name__", "")]


def shared_memory(section: Section, earlier: list[Any]) -> Row:
    """Compile for an A10G the kernels that were compiled later, and compare their shared memory with its limit."""
    known = {id(one) for one in earlier}
    found = {one.fn.__name__: bytes_for(one, A10G_CAPABILITY) for one in kernels() if id(one) not in known}
    if not found:
        raise RuntimeError("no kernel of FlexAttention was found among inductor's kernels")
    for name, size in found.items():
        section.compare(f"shared memory of {name}, an A10G's tiles", size, A10G)
    return {f"{name}_bytes": size for name, size in found.items()}


def bytes_for(kernel: Any, capability: int) -> int:
    """Return the largest shared memory of an inductor kernel's configs, compiled for a compute capability."""
    before = kernel.device_props
    kernel.device_props = before._replace(cc=capability)
    try:
        # Once compiled, a kernel keeps the configs with their results, and later only with what launches them.
        done = kernel.configs or [one.config for one in kernel.compile_results or kernel.launchers]
        results = [kernel._precompile_config(config) for config in done]
    finally:
        kernel.device_props = before
    binaries = [result.kernel for result in results]
    return max(int(one.shared if hasattr(one, "shared") else one.metadata.shared) for one in binaries)
