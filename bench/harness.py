"""Questions per second of lmms-eval with this project's model: shared rows, compared with one request at a time.

    python -m bench.harness --model mid --shape vqav2

    one at a time      `--batch_size 1` and `grouped=False`: one question per call, as most models of lmms-eval answer
    batches            `--batch_size 16` and `grouped=False`: a row per question
    shared rows        `--batch_size 16`: a row per image, with all questions about it

Each is a complete evaluation by lmms-eval: reading the documents, decoding images (JPEG, 640 x 480), answering and
scoring. Questions are random words with the number and lengths of a dataset's. Random weights never end an answer, so
every answer has `--tokens` tokens. Answers that are equal to those of "one at a time" are counted.

It needs lmms-eval: run it with .venv-harnesses/bin/python, which `make test-harnesses` creates.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from bench import models, tables
from bench.shapes import SHAPES, Shape
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.tokenization import train_tokenizer
from vlmvqa.errors import BadRecords
from vlmvqa.extras.dataset_tools import harness
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.build import build
from vlmvqa.models.interface import GenerationSettings

VOCABULARY = 1000  # of the tokenizer
PROMPT = "{question}\n"
WORDS = [f"{a}{b}{c}" for a in "bdfglmnrst" for b in "aeiou" for c in ("n", "r", "l", "st")]
WAYS: dict[str, dict[str, Any]] = {
    "one at a time": {"batch_size": 1, "grouped": False},
    "batches": {"batch_size": 16, "grouped": False},
    "shared rows": {"batch_size": 16},
}


def random_examples(shape: Shape, images: int, seed: int) -> list[Example]:
    """Return images with questions of random words, most of which become one token."""
    rng = random.Random(seed)
    counts = shape.questions.sample(images, rng)
    lengths = iter(shape.prompt.sample(sum(counts), rng))
    found = []
    for number, count in enumerate(counts):
        file = io.BytesIO()
        Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize((640, 480)).save(file, "jpeg")
        # BOS and the new line are tokens of the prompt too.
        texts = [" ".join(rng.choices(WORDS, k=next(lengths) - 2)) for _ in range(count)]
        asked = (
            Question(f"{number}-{n}", text, PROMPT.replace("{question}", text), "dan", ("dan",) * 10)
            for n, text in enumerate(texts)
        )
        found.append(Example(file.getvalue(), number, tuple(asked)))
    return found


def save_model(args: Any, shape: Shape, examples: Sequence[Example], folder: Path) -> float:
    """Save a model with random weights; return the mean number of tokens of a prompt."""
    settings = models.model_settings(args.model, shape, args.attention_pattern)
    overrides = settings.language.overrides
    if args.model == "tiny":  # the tokenizer's bytes are more than its words
        overrides = {**overrides, "vocab_size": VOCABULARY}
    settings = replace(settings, language=replace(settings.language, overrides=overrides))
    torch.manual_seed(args.seed)
    model = build(settings)
    images = ImageSettings(shape.image_size, (0.5,) * 3, (0.5,) * 3)
    tokenizer = train_tokenizer(examples, VOCABULARY)
    processor = Processor(tokenizer, images, model.num_image_tokens, args.attention_pattern)
    Predictor(model, processor, PROMPT, settings, GenerationSettings(args.tokens)).save(folder)
    lengths = [len(processor.tokenize(one, None).prompt) for example in examples for one in example.questions]
    return sum(lengths) / len(lengths)


def evaluate(task: str, folder: Path, limit: int | None = None, **arguments: Any) -> tuple[float, list[str]]:
    """Evaluate with lmms-eval; return the seconds without loading the model, and the answers."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from vlmvqa.evaluation.lmms_eval_adapter.model import VlmVqa

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model = VlmVqa(str(folder / "model"), **arguments)
    started = time.perf_counter()
    found = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, limit=limit)
    seconds = time.perf_counter() - started
    return seconds, [sample["filtered_resps"][0] for sample in found["samples"][task]]


def main(arguments: Sequence[str] | None = None) -> list[tables.Row]:
    parser = tables.parser("harness", __doc__)
    parser.set_defaults(attention_pattern="blockwise_prefix", images=24, repeats=2)
    parser.add_argument("--tokens", type=int, default=4, help="tokens per answer (default: %(default)s)")
    args = parser.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

    shape = SHAPES[args.shape]
    examples = random_examples(shape, args.images, args.seed)
    asked = sum(len(example.questions) for example in examples)
    machine = tables.machine(args.device, models.dtype_of(args.model))
    print(tables.describe(machine))
    turns: dict[str, list[tuple[float, list[str]]]] = {name: [] for name in WAYS}
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        prompt = save_model(args, shape, examples, folder / "model")
        data = DataSettings(source=args.shape, root=None, metric="vqa_accuracy")
        task = harness.write("lmms_eval", folder, data, "val", examples, BadRecords())
        evaluate(task, folder, 1, device=args.device)  # fills the cache of the documents
        for _ in range(args.repeats):
            for way, given in WAYS.items():
                turns[way].append(evaluate(task, folder, device=args.device, **given))
                print(f"  {way}: {asked / turns[way][-1][0]:.3g} questions/s", flush=True)
    first = turns["one at a time"]
    slowest = min(seconds for seconds, _ in first)
    rows: list[tables.Row] = []
    for way, found in turns.items():
        seconds = min(one for one, _ in found)
        equal = sum(a == b for a, b in zip(found[0][1], first[0][1], strict=True))
        rows.append(
            {
                "name": way,
                "questions_per_second": asked / seconds,
                "to_one_at_a_time": slowest / seconds,
                "equal_answers": equal,
            }
        )
    print(f"{asked} questions of {prompt:.1f} tokens about {args.images} images")
    shown = [
        (
            row["name"],
            f"{row['questions_per_second']:.3g}",
            tables.times(row["to_one_at_a_time"]),
            f"{row['equal_answers']} of {asked}",
        )
        for row in rows
    ]
    print(tables.table(("", "questions/s", "to one at a time", "same answers"), shown))
    tables.write_json(args, machine, rows, questions=asked, prompt_tokens=prompt)
    return rows


if __name__ == "__main__":
    main()
