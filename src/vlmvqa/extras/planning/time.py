"""Time of an optimizer step as a sum of terms, each with its formula, seconds and constants.

computation     floating-point operations of the traced pass / (rate x efficiency): encoder; decoder's matrices, on real
                tokens and on padding; its attention, where FlexAttention skips blocks; output head; recomputation
communication   bytes that each GPU sends / link. Gathers and reductions of blocks run while others compute: `overlap`
                is the share of them, of at most the computation, that takes no time. Exposed: under FSDP the first
                gather (the root unit) and the last reduction (of root and embedding), while nothing computes
memory          gradients added up over micro-batches, and the optimizer's step, at the GPU's memory bandwidth

Elementwise operations have no term: `efficiency` includes them. No constant has been measured on these GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlmvqa.errors import InputError
from vlmvqa.extras.planning.gpus import Gpu
from vlmvqa.extras.planning.optimizer_memory import FOREACH
from vlmvqa.extras.planning.strategy_memory import StrategyMemory

EFFICIENCY, OVERLAP = 0.5, 0.5
HOST_RATE = 20  # GB/s that an optimizer in host memory reads and writes
HOST_STEP = 60  # bytes it reads and writes per parameter
# Times that a step reads or writes memory of the gradients' size: gradients for their norm, clipped (2), in the step;
# weights (2). With foreach, which runs a kernel per operation, 13 more.
STEP_ACCESSES, FOREACH_ACCESSES = 6, 13
SENSITIVE = {"efficiency": (0.4, 0.5, 0.6), "overlap": (0.0, 0.5, 1.0), "link": (0.5, 1.0, 2.0)}  # link: times its own


@dataclass(frozen=True)
class Assumptions:
    """Assumed shares, and GB/s between GPUs (None: `Gpu.link`)."""

    efficiency: float = EFFICIENCY
    overlap: float = OVERLAP
    link: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise InputError(f"plan.efficiency={self.efficiency:g} must be above 0 and at most 1")
        if not 0 <= self.overlap <= 1:
            raise InputError(f"plan.overlap={self.overlap:g} must be from 0 to 1")
        if self.link is not None and self.link <= 0:
            raise InputError(f"plan.link={self.link:g} must be above 0 GB/s")


@dataclass(frozen=True)
class Rates:
    """The constants of a plan: TFLOP/s, shares, and GB/s."""

    rate: float
    efficiency: float
    overlap: float
    link: float
    memory: float
    host: float

    @classmethod
    def of(cls, gpu: Gpu, mixed: bool, assumed: Assumptions) -> Rates:
        """Return the rates of a GPU in mixed precision or fp32."""
        rate, link = gpu.half if mixed else gpu.single, assumed.link or gpu.link
        return cls(rate, assumed.efficiency, assumed.overlap, link, gpu.bandwidth, gpu.host)

    def sources(self) -> list[tuple[str, str, str]]:
        """Return name, value and source of each constant."""
        return [
            ("rate", f"{self.rate:g} TFLOP/s", "data sheet, dense (A10G: AWS)"),
            ("efficiency", f"{self.efficiency:.0%}", "assumed, plan.efficiency: the middle of 40 to 60 %"),
            ("link", f"{self.link:g} GB/s", "assumed, plan.link: a third of PCIe's nominal rate, two of NVLink's"),
            ("overlap", f"{self.overlap:.0%}", "assumed, plan.overlap: the middle of 0 to 100 %"),
            ("memory", f"{self.memory:g} GB/s", "data sheet"),
            ("host", f"{self.host:g} GB/s", "assumed, as the link"),
        ]


@dataclass(frozen=True)
class StepWork:
    """The work of an optimizer step on each GPU.

    Attributes:
        questions: questions of a step, on all GPUs.
        passes: micro-batches.
        flops: floating-point operations of a micro-batch by term.
        memory: the strategy's bytes in memory and sent.
        optimizer: transformers' name.
    """

    questions: float
    passes: int
    flops: Mapping[str, float]
    memory: StrategyMemory
    optimizer: str


@dataclass(frozen=True)
class Term:
    """A part of a step: its formula with numbers, its seconds (negative: hidden), and the constants it uses."""

    name: str
    formula: str
    seconds: float
    constants: str


def step_terms(work: StepWork, rates: Rates) -> list[Term]:
    """Return the terms of a step that take time."""
    computing = [_computing(name, work.passes, flops, rates) for name, flops in work.flops.items()]
    memory, passes = work.memory, work.passes
    overlapping = [
        _bytes("gathers", passes, memory.gathered_each_pass, rates.link, "link"),
        _bytes("reductions", passes, memory.reduced_each_pass, rates.link, "link"),
        _bytes("last reduction", 1, memory.reduced_each_step, rates.link, "link"),
        _bytes("host copies", passes, memory.copied_each_pass, rates.host, "host"),
    ]
    compute, communication = (sum(term.seconds for term in terms) for terms in (computing, overlapping))
    shorter, which = min((communication, "sending"), (compute, "computing"))
    hidden = Term("hidden", f"-{rates.overlap:.0%} of {shorter:.2f} s of {which}", -rates.overlap * shorter, "overlap")
    accesses = STEP_ACCESSES + (FOREACH_ACCESSES if work.optimizer in FOREACH else 0)
    stepped = accesses * memory.gradients + 2 * memory.optimizer
    last = [
        _bytes("exposed", passes, memory.exposed_each_pass, rates.link, "link"),
        _bytes("adding gradients", passes - 1, 3 * memory.gradients, rates.memory, "memory"),
        _bytes("optimizer", 1, stepped, rates.memory, "memory"),
        _bytes("host's optimizer", 1, HOST_STEP * memory.stepped_on_host, HOST_RATE, "-"),
        _bytes("gathered weights", 1, memory.sent_each_step, rates.link, "link"),
    ]
    return [term for term in (*computing, *overlapping, hidden, *last) if term.seconds]


def questions_per_second(work: StepWork, rates: Rates) -> float:
    """Return the questions of a step over the sum of its terms."""
    return work.questions / sum(term.seconds for term in step_terms(work, rates))


def sensitivity(work: StepWork, rates: Rates) -> list[list[str]]:
    """Return a table of questions per second: a row per link and overlap, a column per efficiency."""
    rows = [["link GB/s", "overlap", *(f"efficiency {share:.0%}" for share in SENSITIVE["efficiency"])]]
    for times in SENSITIVE["link"]:
        for overlap in SENSITIVE["overlap"]:
            changed = replace(rates, link=times * rates.link, overlap=overlap)
            speeds = [
                questions_per_second(work, replace(changed, efficiency=share)) for share in SENSITIVE["efficiency"]
            ]
            rows.append([f"{changed.link:g}", f"{overlap:.0%}", *(f"{speed:.1f}" for speed in speeds)])
    return rows


def comparison(work: StepWork, rates: Rates, name: str, other: StepWork) -> list[list[str]]:
    """Return a table of milliseconds per question: of each term, in the other run and here."""
    mine, theirs = (
        {term.name: 1000 * term.seconds / one.questions for term in step_terms(one, rates)} for one in (work, other)
    )
    rows = [["ms per question", name, "here", "saved"]]
    for term in dict.fromkeys((*theirs, *mine)):
        before, now = theirs.get(term, 0.0), mine.get(term, 0.0)
        rows.append([term, f"{before:.2f}", f"{now:.2f}", f"{before - now:.2f}"])
    before, now = sum(theirs.values()), sum(mine.values())
    return [*rows, ["sum", f"{before:.2f}", f"{now:.2f}", f"{before - now:.2f}"]]


def _computing(name: str, passes: int, flops: float, rates: Rates) -> Term:
    formula = f"{passes} x {flops / 1e12:.2f} TFLOP / ({rates.rate:g} TFLOP/s x {rates.efficiency:.0%})"
    return Term(name, formula, passes * flops / (rates.rate * 1e12 * rates.efficiency), "rate, efficiency")


def _bytes(name: str, times: int, size: float, rate: float, constant: str) -> Term:
    return Term(name, f"{times} x {size / 1e9:.2f} GB / {rate:g} GB/s", times * size / (rate * 1e9), constant)
