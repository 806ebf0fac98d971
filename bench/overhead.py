"""Work outside of matrix products, counted on a CPU: operators, waits for the device, and padding.

Counts don't depend on the machine. The model has the depth of the real one (12 encoder blocks, 26 layers) and small
widths; attention is dense, in the form that a GPU runs.

waits            operators of a micro-batch, forward and backward, for which the host waits on a GPU: reading a number,
                 indices whose number depends on data, copies of Python numbers to the device
block mask       operators for FlexAttention's masks of global and local layers, and milliseconds of one (1 x 1,152
                 tokens; the fastest of several)
decode step      operators that add a token to every open question, and kernels: operators that are no views
forward, backward   operators of a training step under bf16 autocast, without the optimizer
residual stream  error of the language model's gradients under bf16 autocast, relative to fp32, with the residual stream
                 in fp32 (as autocast keeps it) and in bf16; width 256, the mean of three random models
padding          percent of token positions that are padding, one image per row at VQAv2's lengths, by rows per
                 micro-batch and micro-batches of a step; data.length_window is 1 by default

    python -m bench.overhead
    python -m bench.overhead --before before.json --out after.json    # a file that an earlier version wrote
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from bench import shapes
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.packing import Packing
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.data.train_dataset import RowSettings, TrainDataset
from vlmvqa.errors import BadRecords
from vlmvqa.models import language
from vlmvqa.models.build import build
from vlmvqa.models.generation import OpenQuestions
from vlmvqa.models.language import LanguageSettings
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.sequence import masks
from vlmvqa.training.trainer import VqaTrainer

VOCABULARY, IMAGE_SIZE = 300, 28
VISION = {"patch_size": 7, "embed_dim": 32, "depth": 12, "num_heads": 2, "init_values": 1.0}
GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 12,
}
ATEN = torch.ops.aten
READS = (ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.lift_fresh, ATEN._unique2)
INDEXING = (ATEN.index, ATEN.index_put, ATEN.index_put_)
BATCHES = ((4, 3), (6, 40), (12, 1), (48, 1))  # rows per micro-batch, micro-batches of a step


class Counted(TorchDispatchMode):
    """Counts operators, those that are no views, and those for which a GPU's host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.kernels = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        self.operators[str(packet)] += 1
        self.kernels += not (function.is_view or packet is ATEN._unsafe_view)
        selects = packet in INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if packet in READS or selects:
            self.waits[str(packet)] += 1
        return function(*args, **(kwargs or {}))


def build_model(seed: int = 0, **gemma: int) -> VLM:
    torch.manual_seed(seed)
    return build(
        ModelSettings(
            vision=VisionSettings(image_size=IMAGE_SIZE, weights="random", overrides=VISION),
            language=LanguageSettings(name="gemma2", weights="random", overrides={**GEMMA, **gemma}),
        )
    )


def examples(questions: int = 3, images: int = 4) -> list[Example]:
    texts = [f"what is number {number}" for number in range(questions)]
    return [
        Example(
            Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (40 * image, 90, 90)),
            image,
            tuple(Question(f"{image}-{n}", text, f"{text}\n", "red") for n, text in enumerate(texts)),
        )
        for image in range(images)
    ]


def make_processor(model: VLM, given: Sequence[Example]) -> Processor:
    images = ImageSettings(IMAGE_SIZE, (0.5,) * 3, (0.5,) * 3)
    tokenizer = train_tokenizer(given, VOCABULARY)
    return Processor(tokenizer, images, model.num_image_tokens, model.attention_pattern)


def make_batch(
    model: VLM, rows: Sequence[Sequence[Example]], multiple: int = 8, answers: bool = False
) -> dict[str, Tensor]:
    """Return a batch of rows of examples, padded to a multiple."""
    processor = make_processor(model, [example for row in rows for example in row])
    encoded = [
        [processor.encode(example, [one.target if answers else None for one in example.questions]) for example in row]
        for row in rows
    ]
    return processor.collate(encoded, multiple)


def make_trainer(model: VLM, folder: str) -> VqaTrainer:
    given = examples()
    processor = make_processor(model, given)
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_train_batch_size=len(given),
    )
    return VqaTrainer(model, arguments, TrainDataset(given, processor, RowSettings(), BadRecords()), processor)


def training(found: dict[str, float]) -> None:
    """Count the operators and waits of a micro-batch."""
    model = build_model().train()
    with TemporaryDirectory() as folder:
        trainer = make_trainer(model, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()
        prepared = trainer.accelerator.prepare(model)
        trainer.model_wrapped = prepared
        divisor = torch.tensor(8.0)
        with Counted() as step:
            trainer.training_step(prepared, dict(batch), divisor)
        found["waits of a micro-batch"] = step.waits.total()
        with torch.autocast("cpu", torch.bfloat16):
            with Counted() as forward:
                loss = model(**batch)["loss"]
            with Counted() as backward:
                loss.backward()
    found["operators of a forward pass"] = forward.operators.total()
    found["operators of a backward pass"] = backward.operators.total()


def decoding(found: dict[str, float]) -> None:
    """Count the operators of a decode step, and those of the block masks."""
    model = build_model().eval()
    with torch.no_grad():
        questions = OpenQuestions(model, make_batch(model, [[example] for example in examples()]))
        questions.step(torch.full((len(questions), 1), 5))
        with Counted() as step:
            questions.step(torch.full((len(questions), 1), 5))
    found["operators of a decode step"] = step.operators.total()
    found["kernels of a decode step"] = step.kernels
    tokens = model.tokens(make_batch(model, [examples(images=30)], multiple=1152))
    assert tokens.position.shape == (1, 1152)
    with Counted() as both:
        for window in (None, 512):
            masks.block_mask(tokens, window)
    found["operators of two block masks"] = both.operators.total()
    found["milliseconds of a block mask"] = min(_milliseconds(tokens) for _ in range(20))


def _milliseconds(tokens: masks.Tokens) -> float:
    begin = time.perf_counter()
    masks.block_mask(tokens, 512)
    return 1000 * (time.perf_counter() - begin)


def precision(found: dict[str, float]) -> None:
    """Compute the error of gradients with the residual stream in fp32 and in bf16."""
    errors = torch.tensor([_gradient_errors(seed) for seed in range(3)]).mean(0)
    found["gradient error, residual stream in fp32, %"], found["gradient error, residual stream in bf16, %"] = (
        100 * errors
    ).tolist()


def _gradient_errors(seed: int) -> list[float]:
    gradients = []
    for autocast, residual in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        model = build_model(seed, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32).train()
        batch = make_batch(model, [[example] for example in examples()], answers=True)
        model.language.register_forward_pre_hook(partial(_cast_embeddings, residual))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(**batch)["loss"].backward()
        weights = model.part("language").parameters
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
    exact, *others = gradients
    return [float((other - exact).norm() / exact.norm()) for other in others]


def _cast_embeddings(dtype: torch.dtype, module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (given[0].to(dtype), *given[1:])


def padding(found: dict[str, float]) -> None:
    """Compute the share of padding, with rows in shuffled order (0), sorted within a step (1) or among 16 steps."""
    shape = shapes.SHAPES["vqav2"]
    documents = shapes.random_documents(shape, 20_000, VOCABULARY)
    packing = Packing([shapes.length(document, shape.num_image_tokens) for document in documents], None, seed=0)
    for (rows, accumulated), window in product(BATCHES, (0, 1, 16)):
        plan = packing.plan(0, rows * accumulated, window)
        lengths = packing.lengths[plan.order[: len(plan) // rows * rows]].reshape(-1, rows)
        positions = rows * (-(-lengths.max(1) // 8) * 8).sum()
        name = f"padding at {rows} x {accumulated}, length_window={window}, %"
        found[name] = 100 * (1 - lengths.sum() / positions)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/overhead.json"), help="default: %(default)s")
    parser.add_argument("--before", type=Path, help="the file of an earlier version, for another column")
    args = parser.parse_args(argv)
    # A GPU's tensors aren't read to choose masks.
    readable, language._is_readable = language._is_readable, lambda column: False
    found: dict[str, float] = {}
    try:
        for measure in (training, decoding, precision, padding):
            measure(found)
    finally:
        language._is_readable = readable
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    before = json.loads(args.before.read_text()) if args.before else {}
    print("| | before | now |\n|---|---:|---:|" if before else "| | |\n|---|---:|")
    for name, value in found.items():
        columns = [before[name], value] if before else [value]
        print(f"| {name} | {' | '.join(f'{one:.4g}' for one in columns)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
