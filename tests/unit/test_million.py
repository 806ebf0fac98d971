"""VQAv2's training split at its real size, 443,757 questions with 4.4 million answers: read, tokenised and packed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmvqa.data.datasets import vqav2
from vlmvqa.data.example import count_questions
from vlmvqa.data.tokenization import train_tokenizer

QUESTIONS, IMAGES = 443_757, 82_783
DIFFERENT = 152_000  # questions; the others repeat one of them, as in VQAv2
BEGINNINGS = (
    "What color is the",
    "Is the",
    "How many",
    "What is the man",
    "Where is the",
    "Are there any",
    "Does this",
)

# One start of training as far as its first row's plan, and what came of it.
START = """
import hashlib, json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from vlmvqa.config.schema import DataSettings
from vlmvqa.data.tasks import read_examples
from vlmvqa.errors import BadRecords
from vlmvqa.data.processor import Processor
from vlmvqa.data.images import ImageSettings
from vlmvqa.data.train_dataset import RowSettings, TrainDataset

root, tokenizer = sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2])
processor = Processor(tokenizer, ImageSettings(224, (0.5,) * 3, (0.5,) * 3), 257, "blockwise_prefix", 64)
seconds, start = {}, time.perf_counter()

def lap(name):
    global start
    seconds[name], start = round(time.perf_counter() - start, 2), time.perf_counter()

examples = read_examples(DataSettings("vqav2", root), "train", None, BadRecords())
lap("read")
rows = TrainDataset(examples, processor, RowSettings(row_tokens=2048), BadRecords())
plan = rows.packing.plan(0)
lap("tokenise and pack")

memory = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
digest = hashlib.sha256(repr(rows.documents).encode())
for part in (rows.packing.lengths, plan.order, plan.starts):
    digest.update(part.tobytes())
for example in examples:
    digest.update(repr(example).encode())
print(json.dumps({
    "seconds": seconds, "total": sum(seconds.values()), "GB": round(int(memory.split()[1]) * 1024 / 1e9, 2),
    "questions": sum(end - first for _, first, end in rows.documents), "rows": len(plan), "digest": digest.hexdigest(),
}))
"""


def generate(root: Path, questions: int = QUESTIONS, images: int = IMAGES) -> Path:
    """Write official files with ten answers per question over (empty) images."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("etaoinshrdlucmf", k=drawn.randint(2, 9))) for _ in range(8000)]
    answers = ["yes", "no", "1", "2", "white", *(" ".join(drawn.choices(words, k=1 + n % 2)) for n in range(60_000))]
    likely = drawn.choices(answers, [1 / (1 + n) for n in range(len(answers))], k=1_000_000)
    texts = [
        f"{drawn.choice(BEGINNINGS)} {' '.join(drawn.choices(words, k=drawn.randint(1, 5)))}?"
        for _ in range(min(questions, DIFFERENT))
    ]
    folder = root / "train2014"
    folder.mkdir(parents=True)
    for image in range(images):
        (folder / f"COCO_train2014_{7 * image:012d}.jpg").touch()
    asked, annotated = [], []
    for number in range(questions):
        image = 7 * (number % images)
        ids = {"image_id": image, "question_id": image * 1000 + number // images}
        asked.append({**ids, "question": texts[number] if number < len(texts) else drawn.choice(texts)})
        annotated.append({**ids, **annotation(drawn, likely)})
    (root / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": asked}))
    (root / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": annotated}))
    return root


def annotation(drawn: random.Random, likely: list[str]) -> dict[str, Any]:
    start = drawn.randrange(len(likely) - 4)
    answers = drawn.choices(likely[start : start + 4], (6, 2, 1, 1), k=10)
    return {
        "question_type": drawn.choice(BEGINNINGS).lower(),
        "answer_type": drawn.choice(("yes/no", "number", "other")),
        "multiple_choice_answer": max(answers, key=answers.count),
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": place}
            for place, answer in enumerate(answers, 1)
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # half a gigabyte


def start(folder: Path) -> dict[str, Any]:
    """Return seconds, memory and results of a start in a separate process."""
    environment = os.environ | {"VLMVQA_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", START, str(folder / "root"), str(folder / "tokenizer")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_second_start_takes_seconds_and_finds_the_same(folder: Path) -> None:
    root = generate(folder / "root")
    examples = vqav2.read(root, "train[:5000]")
    train_tokenizer(examples, 4000).save_pretrained(folder / "tokenizer")
    assert count_questions(examples) == 5000
    first, second = start(folder), start(folder)
    assert first["questions"] == QUESTIONS
    assert second["digest"] == first["digest"] and second["rows"] == first["rows"]
    assert max(first["GB"], second["GB"]) < 4
    # Bounds for any machine, however busy; an idle one takes a fifth of these.
    assert first["total"] < 180 and second["total"] < 60
