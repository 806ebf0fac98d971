"""The loss of a step's supervised tokens: logits in transformers' way, of all at once, and in recomputed chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import clock
from bench.gpu.section import Row, Section, timed
from bench.loss import Case, full_logits
from vlmvqa.sequence.loss import supervised_loss


def loss(section: Section) -> None:
    """Compare time, memory, loss and gradient."""
    tokens, width, vocabulary = section.sizes.loss
    generator = torch.Generator(section.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=section.device, generator=generator)

    hidden = normal(1, tokens, width).to(section.sizes.half).requires_grad_()
    matrix = (normal(vocabulary, width) * 0.02).to(section.sizes.half).requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens), device=section.device, generator=generator)
    case = Case(hidden, labels, matrix)
    ways: dict[str, Callable[[], Tensor]] = {
        "full logits": lambda: full_logits(case),
        "supervised_loss, one chunk": lambda: _ours(case, tokens),
        "supervised_loss, chunks of a quarter": lambda: _ours(case, -(-tokens // 4)),
    }
    gradients: dict[str, Tensor] = {}

    def measure(name: str) -> Row:
        def once() -> tuple[Tensor, Tensor]:
            result = ways[name]()
            return result.detach(), torch.autograd.grad(result, [hidden, matrix])[0]

        with clock.PeakMemory(section.device) as memory:
            value, gradients[name] = once()
        seconds = timed(section.device, once, section.sizes.repeats)
        return {"seconds": min(seconds), "peak_bytes": memory.bytes, "loss": value.item()}

    full, *others = [section.row(name, measure, name) for name in ways]
    for row in others:
        if "loss" in row and "loss" in full:
            expected = gradients["full logits"].float()
            difference = (gradients[row["name"]].float() - expected).norm() / expected.norm()
            section.compare(f"{row['name']}: loss", abs(row["loss"] / full["loss"] - 1), section.sizes.exact)
            section.compare(f"{row['name']}: gradient", difference.item(), 3 * section.sizes.exact)


def _ours(case: Case, chunk: int) -> Tensor:
    total, weight = supervised_loss(case.hidden, case.labels, case.logits, chunk)
    return total / weight
