"""What every measurement shares: shapes of data, models, clocks, the machine's own limits, tables.

Legend: B rows, T tokens, I images, N image tokens, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings, build
from vlmvqa.sequence.masks import SHAREABLE, visible
from vlmvqa.sequence.rows import IGNORE, PADDING, Document, TokenizedQuestion, build_row, pad_rows

R = TypeVar("R")
Row = dict[str, Any]
PAD, EOS, BOS, FIRST_WORD = 0, 1, 2, 4  # Gemma's own ids; drawn words start above its special tokens


# --- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """Whole numbers from `low` to `high` around a mean.

    `bend` is the shape of a gamma distribution: at 1 small numbers are the most frequent and there is a tail, at 8 it
    is nearly a bell.
    """

    low: int
    high: int
    mean: float
    bend: float = 1.0

    def draw(self, count: int, drawn: random.Random) -> list[int]:
        """So many numbers with exactly this mean, to rounding: a few images are then as typical as many."""
        if self.low == self.high:
            return [self.low] * count
        scale = (self.mean - self.low + 0.5) / self.bend  # half of one is what rounding down takes
        found = [min(self.low + int(drawn.gammavariate(self.bend, scale)), self.high) for _ in range(count)]
        missing = round(self.mean * count) - sum(found)
        while missing:
            step = 1 if missing > 0 else -1
            place = drawn.randrange(count)
            if self.low <= found[place] + step <= self.high:
                found[place] += step
                missing -= step
        return found


@dataclass(frozen=True)
class Shape:
    """How long a data set's images, prompts and answers are, and how many questions an image has.

    Attributes:
        image_size: pixels a side, at 14 pixels a patch.
        class_token: whether the encoder's class token stands before the patches.
        questions: of an image.
        prompt: tokens, with BOS, the task's words and the newline.
        answer: tokens, with EOS.
        same_prompt: every question has the same prompt.
    """

    questions: Amount
    prompt: Amount
    answer: Amount
    image_size: int = 224
    class_token: bool = True
    same_prompt: bool = False

    @property
    def image_tokens(self) -> int:
        return (self.image_size // 14) ** 2 + self.class_token


# Questions an image are the published means: VQAv2 443,757 / 82,783, GQA's balanced training questions / images, DocVQA
# 39,463 / 10,194, COCO's five captions. Prompts are PaliGemma's ("answer en {question}\n", "{question}\n",
# "caption en\n").
SHAPES = {
    # 6.2 words a question, 1.1 an answer (Antol et al. 2015; Goyal et al. 2017); at least 3 questions an image.
    "vqav2": Shape(Amount(3, 20, 5.36), Amount(8, 24, 11.5, 6), Amount(2, 8, 2.3)),
    "gqa": Shape(Amount(1, 40, 13.1, 4), Amount(8, 30, 13.5, 6), Amount(2, 4, 2.1)),
    # 448 pixels make 1,024 patches. Gemma writes numbers digit by digit.
    "docvqa": Shape(Amount(1, 16, 3.9), Amount(6, 30, 12.0, 6), Amount(2, 24, 6.0), 448, class_token=False),
    "coco": Shape(Amount(5, 5, 5), Amount(4, 4, 4), Amount(9, 40, 13.0, 6), same_prompt=True),
}


def draw_documents(shape: Shape, images: int, vocabulary: int, seed: int = 0) -> list[Document]:
    """Images 0, 1, ... with their questions as token ids, the same for the same seed."""
    drawn = random.Random(seed)
    counts = shape.questions.draw(images, drawn)
    prompts, answers = (iter(amount.draw(sum(counts), drawn)) for amount in (shape.prompt, shape.answer))

    def words(count: int) -> list[int]:
        return [drawn.randrange(FIRST_WORD, vocabulary) for _ in range(count)]

    same = [BOS, *words(shape.prompt.low - 1)]

    def question() -> TokenizedQuestion:
        prompt, answer = next(prompts), next(answers)
        return TokenizedQuestion(same if shape.same_prompt else [BOS, *words(prompt - 1)], [*words(answer - 1), EOS])

    return [Document(image, [question() for _ in range(count)]) for image, count in enumerate(counts)]


def without_answers(documents: Iterable[Document]) -> list[Document]:
    """The same, to be answered."""
    return [Document(d.image, [TokenizedQuestion(q.prompt) for q in d.questions]) for d in documents]


def apart(documents: Iterable[Document]) -> list[Document]:
    """A document for each question, in order: its image is then there again for each."""
    return [Document(d.image, [q]) for d in documents for q in d.questions]


def questions_in(documents: Iterable[Document]) -> int:
    return sum(len(document.questions) for document in documents)


def length(document: Document, image_tokens: int) -> int:
    """Tokens of a document in a row."""
    return image_tokens + sum(len(q.prompt) + max(len(q.answer) - 1, 0) for q in document.questions)


def make_batch(
    model: VLM,
    rows: Sequence[Sequence[Document]],
    pixels: Tensor,
    multiple: int = 1,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    """Rows of documents as the model's batch, on the pixels' device.

    Every document brings its image: one that is in two documents is in the batch twice, and encoded twice.

    Args:
        pixels: float[I, 3, H, W], indexed by `Document.image`.
        multiple: T is rounded up to it.
        features: float[I, N, Dv], the encoder's output, if it is known.
    """
    images = torch.tensor([document.image for row in rows for document in row], device=pixels.device)
    numbers = iter(range(len(images)))
    laid = [[Document(next(numbers), document.questions) for document in row] for row in rows]
    columns = pad_rows([build_row(row, model.vision.tokens, model.mode) for row in laid], multiple)
    known = {"pixel_values": pixels[images]} if features is None else {"image_features": features[images]}
    return {**known, **{name: column.to(pixels.device) for name, column in columns.items()}}


# --- models --------------------------------------------------------------------------------------------------------

MODELS = ("tiny", "mid", "real")
# Pixels a patch: small images have as many patches as the real ones, but for "tiny", which has 4 x 4 of them.
_VISION: dict[str, dict[str, Any]] = {
    "tiny": {"patch_size": 56, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "mid": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "real": {},  # DINOv2-B/14
}
_LANGUAGE: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "initializer_range": 0.2,  # scores and logits reach the softcaps: dropping one changes the loss
    },
    "mid": {
        "vocab_size": 32_768,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
    },
    "real": {},  # Gemma 2 2B is the config class's default
}


def build_model(
    name: str, shape: Shape, device: torch.device | str = "cpu", seed: int = 0, mode: str = "causal"
) -> VLM:
    """A `VLM` of random weights in training mode; every part trains.

    `mid` is for a few CPU cores: 64 million parameters, of which the output matrix takes 26 % (Gemma 2 2B's: 22 %) and
    the vision encoder, whose cost sharing divides too, 34 % (DINOv2-B beside it: 3 %). `real` is DINOv2-B/14 and
    Gemma 2 2B in bfloat16. All have Gemma 2's two softcaps.

    Args:
        mode: the attention mode; "causal" is what transformers' Gemma 2 does by itself.
    """
    torch.manual_seed(seed)
    settings = ModelSettings(
        vision=VisionSettings(
            image_size=shape.image_size,
            weights="random",
            overrides={"class_token": shape.class_token, **_VISION[name]},
        ),
        language=LanguageSettings(name="gemma2", weights="random", overrides=_LANGUAGE[name]),
        mode=mode,
        dtype=str(dtype_of(name)).removeprefix("torch."),
    )
    with torch.device(device):  # drawing 2.6 billion numbers on a CPU takes minutes
        return build(settings).to(device).train()


def dtype_of(name: str) -> torch.dtype:
    """In which a model computes."""
    return torch.bfloat16 if name == "real" else torch.float32


def causal_lm(model: VLM) -> PreTrainedModel:
    """transformers' own causal language model on the very weights of `model`."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model.language.config)
    decoder = model.language.decoder
    whole.model, whole.config = decoder, decoder.config
    whole.lm_head.weight = decoder.get_input_embeddings().weight
    return whole.train(model.training)


def draw_pixels(model: VLM, images: int, seed: int = 0) -> Tensor:
    """`float[I, 3, H, W]` on the model's device and in its type."""
    parameter = next(model.parameters())
    size = model.vision.image_size
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return pixels.to(parameter)


def vocabulary(model: VLM) -> int:
    return int(model.language.config.vocab_size)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# --- clocks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured(Generic[R]):
    """What a function took and gave.

    Attributes:
        seconds: the median of the repeats.
        peak: bytes above the start (None where unknown).
        result: the last one.
        cpu_seconds: of all threads, the median: what other work on the machine disturbs least.
    """

    seconds: float
    peak: int | None
    result: R
    cpu_seconds: float = 0.0


def measure(
    function: Callable[[], R],
    device: torch.device,
    repeats: int = 1,
    warm: Callable[[], object] | None = None,
    at_least: float = 0.0,
) -> Measured[R]:
    """Time a function and its peak memory.

    Args:
        repeats: how often it is timed.
        warm: what runs once before, not timed (default: the function itself).
        at_least: seconds; it is timed until so many have passed, so that a quick one meets as much of what else the
            machine does as a slow one.
    """
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    with PeakMemory(device) as memory:  # the warm-up included: afterwards memory is kept, and taken again unseen
        (warm or function)()
        while len(seconds) < repeats or sum(seconds) < at_least:
            result = None  # the last one's memory is not this one's
            started, cpu_started = _now(device), time.process_time()
            result = function()
            seconds.append(_now(device) - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    medians = statistics.median(seconds), statistics.median(cpu_seconds)
    return Measured(medians[0], memory.bytes, result, medians[1])  # type: ignore[arg-type]


class PeakMemory:
    """Peak memory of a block above its start, in bytes; None where it cannot be told.

    On CUDA PyTorch counts it. On Linux a thread looks at the resident memory of the process every few milliseconds:
    what PyTorch's operators take inside themselves is counted too, but a shorter peak is missed.
    """

    INTERVAL = 0.004  # seconds

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            # Else memory that was freed before, but kept, would be taken again without being seen.
            ctypes.CDLL(None).malloc_trim(0)
            self._start = self._peak = _resident()
            self._stop = threading.Event()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif sys.platform == "linux":
            self._stop.set()
            self._watcher.join()
            self.bytes = max(self._peak, _resident()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- the floor -----------------------------------------------------------------------------------------------------


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best matrix product: what the machine gives, not what its maker says."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        matrix = torch.randn(size, size, device=device).to(dtype)
        product = matrix @ matrix
        for _ in range(20 if device.type == "cuda" else 5):
            started = _now(device)
            torch.matmul(matrix, matrix, out=product)
            best = max(best, 2 * size**3 / (_now(device) - started))
    return best


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        started = _now(device)
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (_now(device) - started))
    return best


def needed_flops(model: VLM, batch: Mapping[str, Tensor], encoder: bool = True) -> int:
    """Floating-point operations that training on a batch needs, forward and backward, the encoder's included.

    As in PaLM (Chowdhery et al. 2022, appendix B): a matrix takes 6 for each of its numbers a token, attention 12 for
    each number of a query and token that it sees. Unlike there, only tokens count that are no padding, pairs that see
    each other, and output positions with a label. Norms, softmax and lookups take none.

    Args:
        encoder: whether the encoder runs and trains.
    """
    vision = model.vision.encoder
    images = len(batch["pixel_values" if encoder else "image_features"])
    patches, tokens = vision.patch_embed.num_patches, vision.patch_embed.num_patches + vision.num_prefix_tokens
    width = model.vision.width
    an_image = model.vision.tokens * (6 if encoder else 4) * _matrices(model.projector)  # features get no gradient
    if encoder:
        # Pixels get no gradient.
        an_image += 4 * patches * _matrices(vision.patch_embed) + 6 * tokens * _matrices(vision.blocks)
        an_image += 12 * len(vision.blocks) * width * tokens**2
    config, layers = model.language.config, nn.ModuleList(model.language.blocks)
    total = images * an_image + 6 * _matrices(layers) * int((batch["document"] != PADDING).sum())
    total += 6 * config.hidden_size * config.vocab_size * int((batch["labels"] != IGNORE).sum())
    return total + 12 * config.num_attention_heads * config.head_dim * _pairs(model, batch)


def _matrices(part: nn.Module) -> int:
    """Numbers in the matrices of a part."""
    return sum(module.weight.numel() for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d))


def _pairs(model: VLM, batch: Mapping[str, Tensor]) -> int:
    """Pairs of tokens that see each other, over all layers."""
    found = 0
    tokens = model.tokens(batch)
    config = model.language.config
    windows = [None if kind == "full_attention" else config.sliding_window for kind in config.layer_types]
    for window in set(windows):
        for row in range(len(tokens.document)):  # a row at a time: long rows make large squares
            query, key = tokens.map(lambda t, r=row: t[r, :, None]), tokens.map(lambda t, r=row: t[r, None, :])  # type: ignore[misc]
            found += windows.count(window) * int(visible(query, key, window).sum())
    return found


# --- what is printed and written -----------------------------------------------------------------------------------


def parser(name: str, description: str | None, images: int = 8, repeats: int = 3) -> argparse.ArgumentParser:
    """The options that all measurements share; defaults for `images` and `repeats` are the caller's."""
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", choices=MODELS, default="real" if cuda else "mid", help="default: %(default)s")
    made.add_argument("--shape", choices=SHAPES, default="vqav2", help="whose lengths (default: %(default)s)")
    made.add_argument("--mode", choices=SHAREABLE, default="causal", help="attention mode (default: %(default)s)")
    made.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    made.add_argument("--images", type=int, default=images, help="how many (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=repeats, help="the median is printed (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("runs/bench") / f"{name}.json", help="default: %(default)s")
    return made


def machine(device: torch.device | str, dtype: torch.dtype) -> Row:
    """What the numbers were measured on and with, and what it can do at best."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_flops_per_second": matrix_rate(device, dtype),
        "bytes_per_second": bandwidth(device),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def describe(found: Row) -> str:
    """The machine in one line."""
    rates = f"{_si(found['matrix_flops_per_second'])}FLOP/s in a matrix product, {_si(found['bytes_per_second'])}B/s"
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "timm", "transformers"))
    device = f"{found['device']}, {found['threads']} threads, {found['dtype']}"
    return f"{device}, {rates} in a copy; {versions}; {found['date']}"


def _si(number: float) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "


def mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


def times(ratio: float | None) -> str:
    """A ratio as it is printed."""
    return "" if ratio is None else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns in Markdown: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def write_json(args: argparse.Namespace, machine: Row, rows: Sequence[Row], **more: Any) -> None:
    """`{command, arguments, machine, rows, ...}` to `--out`."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    name = Path(args.out).stem
    found = {"benchmark": name, "arguments": arguments, "machine": machine, **more, "rows": list(rows)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {args.out}")
