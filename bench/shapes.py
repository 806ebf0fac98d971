"""Documents of random token ids, with the number and lengths of a dataset's questions."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from vlmvqa.sequence.rows import Document, TokenizedQuestion

PAD, EOS, BOS, FIRST_WORD = 0, 1, 2, 4  # Gemma's ids; random words start above its special tokens


@dataclass(frozen=True)
class Amount:
    """A distribution of whole numbers from `low` to `high` around a mean.

    `bend` is the shape of a gamma distribution: at 1 small numbers are the most frequent and there is a tail, at 8 it
    is nearly bell-shaped.
    """

    low: int
    high: int
    mean: float
    bend: float = 1.0

    def sample(self, count: int, rng: random.Random) -> list[int]:
        """Return `count` numbers with exactly this mean, up to rounding, so that few images are as typical as many."""
        if self.low == self.high:
            return [self.low] * count
        scale = (self.mean - self.low + 0.5) / self.bend  # 0.5 compensates for rounding down
        found = [min(self.low + int(rng.gammavariate(self.bend, scale)), self.high) for _ in range(count)]
        missing = round(self.mean * count) - sum(found)
        while missing:
            step = 1 if missing > 0 else -1
            place = rng.randrange(count)
            if self.low <= found[place] + step <= self.high:
                found[place] += step
                missing -= step
        return found


@dataclass(frozen=True)
class Shape:
    """Lengths of a dataset's images, prompts and answers, and its number of questions per image.

    Attributes:
        questions: questions per image.
        prompt: tokens of a prompt, including BOS, the task's words and the newline.
        answer: tokens of an answer, including EOS.
        image_size: side of the image in pixels, with 14 pixels per patch.
        class_token: whether the encoder's class token precedes the patches.
        same_prompt: whether all questions have the same prompt.
    """

    questions: Amount
    prompt: Amount
    answer: Amount
    image_size: int = 224
    class_token: bool = True
    same_prompt: bool = False

    @property
    def num_image_tokens(self) -> int:
        return (self.image_size // 14) ** 2 + self.class_token


# Questions per image are the published means: VQAv2 443,757 / 82,783, GQA's balanced training questions / images,
# DocVQA 39,463 / 10,194, COCO's five captions. Prompts are PaliGemma's ("answer en {question}\n", "{question}\n",
# "caption en\n").
SHAPES = {
    # 6.2 words per question, 1.1 per answer (Antol et al. 2015; Goyal et al. 2017); at least 3 questions per image.
    "vqav2": Shape(Amount(3, 20, 5.36), Amount(8, 24, 11.5, 6), Amount(2, 8, 2.3)),
    "gqa": Shape(Amount(1, 40, 13.1, 4), Amount(8, 30, 13.5, 6), Amount(2, 4, 2.1)),
    # 448 pixels make 1,024 patches. Gemma writes numbers digit by digit.
    "docvqa": Shape(Amount(1, 16, 3.9), Amount(6, 30, 12.0, 6), Amount(2, 24, 6.0), 448, class_token=False),
    "coco": Shape(Amount(5, 5, 5), Amount(4, 4, 4), Amount(9, 40, 13.0, 6), same_prompt=True),
}


def random_documents(shape: Shape, images: int, vocabulary: int, seed: int = 0) -> list[Document]:
    """Return images 0, 1, ... with their questions as token ids, equal for equal seeds."""
    rng = random.Random(seed)
    counts = shape.questions.sample(images, rng)
    prompts, answers = (iter(amount.sample(sum(counts), rng)) for amount in (shape.prompt, shape.answer))

    def words(count: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, vocabulary) for _ in range(count)]

    same = [BOS, *words(shape.prompt.low - 1)]

    def question() -> TokenizedQuestion:
        prompt, answer = next(prompts), next(answers)
        return TokenizedQuestion(same if shape.same_prompt else [BOS, *words(prompt - 1)], [*words(answer - 1), EOS])

    return [Document([image], [question() for _ in range(count)]) for image, count in enumerate(counts)]


def without_answers(documents: Iterable[Document]) -> list[Document]:
    """Return the documents without their answers."""
    return [Document(d.images, [TokenizedQuestion(q.prompt) for q in d.questions]) for d in documents]


def apart(documents: Iterable[Document]) -> list[Document]:
    """Return one document per question, in order; the image is repeated for each."""
    return [Document(d.images, [q]) for d in documents for q in d.questions]


def questions_in(documents: Iterable[Document]) -> int:
    return sum(len(document.questions) for document in documents)


def length(document: Document, num_image_tokens: int) -> int:
    """Return the number of tokens of a document in a row."""
    return num_image_tokens + sum(len(q.prompt) + max(len(q.answer) - 1, 0) for q in document.questions)
