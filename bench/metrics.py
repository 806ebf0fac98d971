"""Speed of the metrics, compared with the official evaluators that can be imported.

    python -m bench.metrics

10,000 VQA answers with ten references each, 5,000 ANLS pairs, 10,000 GQA answers, 5,000 captions with five references
each, all random with the lengths of real ones. The caption scorers are timed on tokens and compared with
pycocoevalcap's (pip install 'vlmvqa[captions]'), whose scores must be equal; its tokenizer needs Java. The other
benchmarks' scripts are not packages. "allowed" is the longest time that a user should wait, in seconds.
Needs rapidfuzz.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import clock, tables
from vlmvqa.metrics import anls, caption_scores, gqa_scores, java, vqa_accuracy
from vlmvqa.metrics.ptb_tokenizer import tokenize

CLOSE = 1e-9
LETTERS = "etaoinshrdlcumwfgypbvk"
Answers = tuple[dict[int, str], dict[int, list[str]]]  # predictions and references
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One metric over `count` answers: our function, and the official evaluator's with the same scores, if any."""

    name: str
    count: int
    ours: Callable[[], Scores]
    official: Callable[[], Scores] | None = None
    allowed: float | None = None  # seconds


def random_words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(count)]


def random_answers(rng: random.Random, count: int, references: int, words: int, vocabulary: int) -> Answers:
    """Generate texts of about `words` words, a few of them common; a prediction is often one of its references."""
    known = random_words(rng, vocabulary)
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(vocabulary)))

    def text() -> str:
        length = max(1, round(rng.gauss(words, words / 4)))
        return " ".join(rng.choices(known, cum_weights=weights, k=length)).capitalize() + "."

    given = {key: [text() for _ in range(references)] for key in range(count)}
    return {key: rng.choice([text(), *answers]) for key, answers in given.items()}, given


def gqa_questions(answers: Answers) -> dict[str, dict[str, Any]]:
    """Return records in GQA's format whose gold answer is the first reference."""
    return {
        str(key): {
            "isBalanced": True,
            "question": f"Is this {texts[0]}",
            "answer": texts[0],
            "semantic": [{"operation": "select", "argument": "it"}, {"operation": "query", "argument": "color"}],
            "types": {"structural": "query" if key % 2 else "verify", "semantic": "attr", "detailed": "color"},
            "groups": {"global": f"group {key % 97}"},
        }
        for key, texts in answers[1].items()
    }


def cases(args: argparse.Namespace) -> Iterator[Case]:
    rng = random.Random(args.seed)
    vqa = random_answers(rng, args.answers, 10, 1, 3000)
    yield Case("VQA accuracy", args.answers, lambda: {"overall": vqa_accuracy(*vqa).overall}, allowed=1.0)
    pairs = random_answers(rng, args.pairs, 1, 4, 3000)
    yield Case("ANLS", args.pairs, lambda: {"score": anls(*pairs).score}, allowed=0.1)
    questions = gqa_questions(vqa)
    answers = {str(key): answer for key, answer in vqa[0].items()}
    yield Case("GQA", args.answers, lambda: {"accuracy": gqa_scores(answers, questions).accuracy})
    yield from caption_cases(*random_answers(rng, args.captions, 5, 10, 8000))


def caption_cases(predictions: dict[int, str], references: dict[int, list[str]]) -> Iterator[Case]:
    """Yield the scorers and the tokenizer separately, and all together."""
    count = len(predictions)
    raw = [*predictions.values(), *(text for texts in references.values() for text in texts)]
    tokens = {key: tokenize(text) for key, text in predictions.items()}
    reference_tokens = {key: [tokenize(text) for text in texts] for key, texts in references.items()}
    scorers = official_scorers(tokens, reference_tokens)
    with_java = bool(scorers) and shutil.which("java") is not None

    def only(name: str) -> Callable[[], Scores]:
        return lambda: caption_scores(tokens, reference_tokens, metrics=(name,), tokenizer=str.split).corpus

    def words(texts: Sequence[str]) -> Scores:
        return {"words": float(sum(len(text.split()) for text in texts))}

    def official() -> Scores:
        java.tokenize(raw)
        return {name: score for scorer in scorers.values() for name, score in scorer().items()}

    for name in ("bleu", "rouge_l", "cider"):
        yield Case(f"captions: {name}", count, only(name), scorers.get(name))
    tokenizer = (lambda: words(java.tokenize(raw))) if with_java else None
    yield Case("captions: tokenizer", len(raw), lambda: words([tokenize(text) for text in raw]), tokenizer)
    evaluator = official if with_java else None
    total = lambda: caption_scores(predictions, references).corpus  # noqa: E731
    yield Case("captions, in all", count, total, evaluator, allowed=6.0)


def official_scorers(predictions: dict[int, str], references: dict[int, list[str]]) -> dict[str, Callable[[], Scores]]:
    """Return pycocoevalcap's scorers by our names; empty if it is not installed."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return {}
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    asked = references, {key: [text] for key, text in predictions.items()}

    def bleu() -> Scores:
        return {f"bleu_{n}": score for n, score in enumerate(Bleu(4).compute_score(*asked, verbose=0)[0], 1)}

    return {
        "bleu": bleu,
        "rouge_l": lambda: {"rouge_l": float(Rouge().compute_score(*asked)[0])},
        "cider": lambda: {"cider": float(Cider().compute_score(*asked)[0])},
    }


def measure(case: Case, repeats: int) -> tables.Row:
    device = torch.device("cpu")
    found = clock.measure(case.ours, device, repeats)
    row: tables.Row = {
        "name": case.name,
        "count": case.count,
        "seconds": found.seconds,
        "allowed": case.allowed,
        "scores": dict(found.result),
        "official_seconds": None,
        "times_faster": None,
        "difference": None,
    }
    if case.official is not None:
        official = clock.measure(case.official, device, repeats, warm=lambda: None)
        row["official_seconds"] = official.seconds
        row["times_faster"] = official.seconds / found.seconds
        row["difference"] = max(abs(found.result[name] - score) for name, score in official.result.items())
    return row


HEADERS = ("", "answers", "seconds", "allowed", "official", "faster", "difference")


def cells(row: tables.Row) -> list[str]:
    return [
        row["name"],
        f"{row['count']:,}",
        f"{row['seconds']:.3f}",
        "" if row["allowed"] is None else f"{row['allowed']:g}",
        "" if row["official_seconds"] is None else f"{row['official_seconds']:.3f}",
        tables.times(row["times_faster"]),
        "" if row["difference"] is None else f"{row['difference']:.1e}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=10_000, help="answers of VQA and of GQA (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5_000, help="pairs of ANLS (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=5_000, help="captions (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest is printed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/metrics.json"), help="default: %(default)s")
    args = parser.parse_args(argv)
    machine = tables.machine("cpu", torch.float32)
    print(tables.describe(machine))
    rows = [measure(case, args.repeats) for case in cases(args)]
    print(tables.table(HEADERS, [cells(row) for row in rows]))
    tables.write_json(args, machine, rows)
    if any(row["difference"] is not None and row["difference"] > CLOSE for row in rows):
        print("a score differs from the official evaluator's")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
