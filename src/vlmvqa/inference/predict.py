"""Answers from a model and its processor: for one picture, or for a whole split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from vlmvqa import ranks
from vlmvqa.data.bad_records import BadRecords
from vlmvqa.data.batch import Encoded, Processor, QuestionSet, split_questions
from vlmvqa.data.example import Example, ImageSource, Question
from vlmvqa.data.images import ImageSettings
from vlmvqa.errors import InputError
from vlmvqa.models import checkpoint
from vlmvqa.models.generation import Decoding, generate
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.sequence.masks import SHAREABLE
from vlmvqa.settings import build_settings


@dataclass(frozen=True)
class Answer:
    """A written answer and its log-probability under the model (EOS included)."""

    text: str
    log_probability: float

    def __str__(self) -> str:
        return self.text


@dataclass
class Predictor:
    """A model with all it needs to answer: what `vlmvqa.load` returns.

    Attributes:
        prompt: the template that questions are put into, `{question}` in it.
    """

    model: VLM
    processor: Processor
    prompt: str
    settings: ModelSettings
    decoding: Decoding = field(default_factory=Decoding)

    def answer(self, image: ImageSource | str, question: str | Sequence[str]) -> Answer | list[Answer]:
        """Answer a question about an image, or several in one pass over the image.

        Args:
            image: a path, the bytes of an image file, or a PIL image.

        Raises:
            InputError: the image cannot be read, or a question is empty.
        """
        texts = [question] if isinstance(question, str) else list(question)
        if not texts or not all(text.strip() for text in texts):
            raise InputError("a question is empty; ask something")
        questions = tuple(
            Question(number, text, self.prompt.replace("{question}", text)) for number, text in enumerate(texts)
        )
        example = Example(Path(image) if isinstance(image, str) else image, "given", questions)
        answers = self.answer_examples([example])
        listed = [answers[number] for number in range(len(texts))]
        return listed[0] if isinstance(question, str) else listed

    def answer_examples(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int = 16,
        images_per_row: int = 1,
        workers: int = 0,
        bad_records: BadRecords | None = None,
        progress: bool = False,
    ) -> dict[int | str, Answer]:
        """Answer every question of every example, by question id. Of several ranks each answers its share for all.

        Args:
            batch_size: images at a time.
            images_per_row: how many of them share a row.
            workers: processes that decode images.
            bad_records: what happens to an unreadable image (default: an error); one left out has no answers here.
        """
        if self.model.mode not in SHAREABLE:
            examples = split_questions(examples, 1)
        mine = examples[ranks.rank() :: ranks.world_size()] if ranks.together() else examples
        questions = QuestionSet(mine, self.processor, bad_records or BadRecords())
        loader = DataLoader(
            questions,
            batch_size,
            collate_fn=list,
            num_workers=workers,
            generator=torch.Generator(),  # its own, so that evaluating does not move the training's random state
        )
        answers: dict[int | str, Answer] = {}
        shown = zip(_batches(mine, batch_size), loader, strict=True)
        hidden = None if progress and ranks.is_first() else True
        for group, encoded in tqdm(shown, "answering", len(loader), disable=hidden, leave=False):
            readable = [(example, one) for example, one in zip(group, encoded, strict=True) if one is not None]
            if readable:
                ids = [question.id for example, _ in readable for question in example.questions]
                written = self._answer_batch([one for _, one in readable], images_per_row)
                answers.update(zip(ids, written, strict=True))
        return {question: answer for shares in ranks.gather(answers) for question, answer in shares.items()}

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer, image settings and prompt into one folder that `vlmvqa.load` reads."""
        checkpoint.save(Path(folder), self.model, self.settings, self.processor.tokenizer, self._extra())

    def describe(self, folder: Path) -> None:
        """The same but for the weights, which are in the folder already."""
        config = self.model.language.config
        checkpoint.describe(folder, config, self.settings, self.processor.tokenizer, self._extra())

    def _extra(self) -> dict[str, Any]:
        return {
            "images": dataclasses.asdict(self.processor.images),
            "prompt": self.prompt,
            "max_text_tokens": self.processor.max_text_tokens,
            "decoding": dataclasses.asdict(self.decoding),
        }

    def _answer_batch(self, encoded: Sequence[Encoded], images_per_row: int) -> list[Answer]:
        device = next(self.model.parameters()).device
        batch = self.processor.collate(encoded, images_per_row)
        batch = {name: column.to(device) for name, column in batch.items()}
        tokenizer = self.processor.tokenizer
        written = generate(self.model, batch, {tokenizer.eos_token_id}, self.decoding)
        texts = tokenizer.batch_decode([one.tokens for one in written], skip_special_tokens=True)
        return [Answer(text.strip(), one.log_probability) for text, one in zip(texts, written, strict=True)]


def load(path_or_hub_id: str | Path, device: str | None = None) -> Predictor:
    """A trained model, ready to answer: `vlmvqa.load("runs/demo").answer("photo.jpg", "what is this?")`.

    Args:
        path_or_hub_id: a run's folder, its `model/` folder, or a hub id.
        device: default: the GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, settings, tokenizer, config = checkpoint.load(path_or_hub_id, device)
    images = build_settings(ImageSettings, config["images"], "config.json: images")
    processor = Processor(tokenizer, images, model.vision.tokens, model.mode, config["max_text_tokens"])
    decoding = build_settings(Decoding, config["decoding"], "config.json: decoding")
    return Predictor(model, processor, config["prompt"], settings, decoding)


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
