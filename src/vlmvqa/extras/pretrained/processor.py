"""Batches for pretrained models, made with the processor that was published with them.

The library's processor arranges image tokens and text. Which tokens are supervised is decided here: those of the answer
and the one that ends it, which are the difference between the tokens of the full turn and those of its prompt.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings, decode
from vlmvqa.data.processor import Processor
from vlmvqa.errors import InputError
from vlmvqa.sequence.rows import ANSWER, IGNORE, IMAGE, NO_IMAGE, PADDING, PROMPT, Document, Row, pad_rows


@dataclass(frozen=True)
class PromptedQuestion:
    """A question as the text that the library's processor takes, with the image's placeholder.

    Attributes:
        answer: token ids up to the one that ends the answer; empty if the model is to generate it.
        weight: as in `TokenizedQuestion`.
    """

    prompt: str
    answer: Sequence[int] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class PretrainedProcessor(Processor):
    """A `Processor` that uses the library's.

    Attributes:
        library: transformers' processor of the model.
    """

    library: Any = field(kw_only=True)

    @classmethod
    def of(cls, library: Any, attention_pattern: str, max_text_tokens: int | None) -> PretrainedProcessor:
        """Return the processor of a model with this attention pattern.

        Raises:
            InputError: it has no chat template (PaliGemma's needs none), or no EOS token.
        """
        tokenizer, images = library.tokenizer, library.image_processor
        if not _is_paligemma(library) and not (library.chat_template or tokenizer.chat_template):
            raise InputError(
                f"{type(library).__name__} has no chat template, so how the model is asked is not known; choose a "
                "model with one (often the -instruct or -it one)"
            )
        if tokenizer.eos_token_id is None:
            raise InputError("the model's tokenizer has no EOS token, which ends every answer; choose another model")
        side = max(dict(images.size).values(), key=lambda value: value or 0)
        crops = images.to_dict().get("do_center_crop")  # CLIP's
        about = ImageSettings(
            int(side),
            tuple(images.image_mean),
            tuple(images.image_std),
            resize="center_crop" if crops else "squash",
        )
        return cls(tokenizer, about, 0, attention_pattern, max_text_tokens, library=library)

    def tokenize(self, question: Question, answer: str | None) -> PromptedQuestion:  # type: ignore[override]
        """Return the prompt in the model's format, and the tokens of the answer with the one that ends it.

        Raises:
            InputError: the answer is empty or exceeds `max_text_tokens`, or the text contains a special token.
        """
        if special := self._special_words.search(f"{question.prompt} {answer or ''}"):
            raise InputError(
                f"question {question.id}: {special[0]} in its text or answer is a token of the model's own; take it out"
            )
        target = [] if answer is None else self._target(question, answer)
        if answer is not None and not answer.strip():
            raise InputError(f"question {question.id}: its answer is empty, so nothing is supervised")
        if self.max_text_tokens is not None:
            over = len(self._ids(question.prompt)) + len(target) - self.max_text_tokens
            question = self._shortened(question, over, len(target)) if over > 0 else question
        return PromptedQuestion(self._prompt_text(question.prompt), target)

    def load_image(self, example: Example) -> Image:  # type: ignore[override]
        """Decode the image; the library's processor resizes it in `collate`."""
        return decode(example.image, example.name)

    def count_tokens(self, question: Question, answer: str) -> int:
        """Return the number of tokens of a question with its answer, without image tokens and chat template."""
        return len(self._ids(question.prompt)) + len(self.tokenize(question, answer).answer) - 1

    def collate(self, rows: Sequence[Sequence[Document]], multiple: int = 8) -> dict[str, Tensor]:
        """Return the network's inputs and the columns of `sequence/rows.py`, `[B, T]`, except for `image_index`.

        Rows are padded on the right; on the left if none has an answer, so that generation continues all of them at
        the same position.
        """
        encoded = list(chain.from_iterable(rows))
        questions: list[Any] = [one.questions[0] for one in encoded]
        pictures = [[one.image] for one in encoded]
        texts = [question.prompt for question in questions]
        bos = self.tokenizer.bos_token
        # If the chat template has written BOS, the tokenizer must not add another (as in transformers).
        more: dict[str, Any] = {"add_special_tokens": False} if bos is not None and texts[0].startswith(bos) else {}
        found = self.library(text=texts, images=pictures, padding=True, return_tensors="pt", **more)
        found.pop("labels", None)  # PaliGemma's labels of the prompt
        read = [
            ids[mask.bool()].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
        ]
        laid = [
            self._row(prompt, question, number)
            for number, (prompt, question) in enumerate(zip(read, questions, strict=True))
        ]
        left = not any(question.answer for question in questions)
        columns = pad_rows(laid, multiple, left=left)
        real = columns["document"] != PADDING
        columns["input_ids"].masked_fill_(~real, self._padding)
        del columns["image_index"]
        own = {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}
        for name in [name for name, value in own.items() if value.shape == found["input_ids"].shape]:
            own[name] = self._extend_types(own[name], found["attention_mask"], columns["role"], real)
        return {**own, **columns, "attention_mask": real.long()}

    @property
    def shares_images(self) -> bool:
        """One question per row."""
        return False

    @property
    def processing_class(self) -> Any:
        """The object of transformers that is saved with the model: its processor."""
        return self.library

    def with_images(self, resize: str, reduced: bool) -> PretrainedProcessor:
        """Return the processor unchanged: it resizes images as in its training."""
        return self

    @cached_property
    def end_token_ids(self) -> set[int]:
        """Token ids that end an answer."""
        return {self.tokenizer.eos_token_id, self._target(Question(0, "", ""), "yes")[-1]}

    def _row(self, prompt: list[int], question: PromptedQuestion, number: int) -> Row:
        answer = list(question.answer)
        read, written = len(prompt), max(len(answer) - 1, 0)
        row = Row()
        row.extend(
            input_ids=[*prompt, *answer[:-1]],
            image_index=[NO_IMAGE] * (read + written),
            document=[number] * (read + written),
            branch=[0] * (read + written),
            role=[IMAGE if token == self._image_token else PROMPT for token in prompt] + [ANSWER] * written,
            position=range(read + written),
            labels=[IGNORE] * (read - 1) + (answer or [IGNORE]),
            weights=[0.0] * (read - 1) + [question.weight] * len(answer or [IGNORE]),
        )
        return row

    def _extend_types(self, given: Tensor, mask: Tensor, role: Tensor, real: Tensor) -> Tensor:
        """Extend a column of the network (`token_type_ids`) from the prompts to the answers."""
        suffix = int(_is_paligemma(self.library))  # PaliGemma's answers have their own type, which is causal
        typed = torch.full_like(role, suffix)
        typed[real & (role != ANSWER)] = given[mask.bool()].to(typed.dtype)
        return typed.masked_fill(~real, 0)

    def _prompt_text(self, prompt: str, answer: str | None = None) -> str:
        """Return the text of the turn, with the image's placeholder."""
        prompt = prompt.removesuffix("\n")  # PaliGemma's processor adds it, a chat template has its own
        if _is_paligemma(self.library):
            return f"{self.library.image_token}{prompt}"
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        asked: str = self.library.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)
        return asked

    def _target(self, question: Question, answer: str) -> list[int]:
        """Return the token ids of the answer and the one that ends it."""
        tokenizer = self.tokenizer
        if _is_paligemma(self.library):
            return [*self._ids(answer), tokenizer.eos_token_id]
        prompt, complete = self._prompt_text(question.prompt), self._prompt_text(question.prompt, answer)
        if not complete.startswith(prompt):
            raise InputError(
                f"question {question.id}: the model's chat template writes {prompt[-20:]!r} before an answer and "
                f"{complete[len(prompt) - 20 :][:40]!r} with it, so the answer's tokens cannot be found; choose another"
            )
        read, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, complete))
        # If the answer's first token would merge with the prompt, the answer is tokenized alone, as in generation.
        alone = ids[: len(read)] != read
        written = self._ids(complete.removeprefix(prompt)) if alone else ids[len(read) :]
        special = set(tokenizer.all_special_ids)
        end = next((place for place, token in enumerate(written) if token in special), None)
        return [*written, tokenizer.eos_token_id] if end is None else written[: end + 1]

    def _shortened(self, question: Question, over: int, answer: int) -> Question:
        """Return the question without its last `over` tokens."""
        text = question.text
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(places) - over < 1:
            raise InputError(
                f"question {question.id}: its answer has {answer} tokens, which leaves none of "
                f"data.max_text_tokens={self.max_text_tokens} for the question; raise it"
            )
        kept = text[: places[len(places) - over - 1][1]]
        before, _, after = question.prompt.rpartition(text)
        return replace(question, text=kept, prompt=before + kept + after)

    @cached_property
    def _special_words(self) -> re.Pattern[str]:
        tokens = {*self.tokenizer.all_special_tokens, self.library.image_token}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens)))

    @cached_property
    def _image_token(self) -> int:
        return int(self.library.image_token_id)

    @cached_property
    def _padding(self) -> int:
        padding = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if padding is None else padding)


def _is_paligemma(library: Any) -> bool:
    return type(library).__name__ == "PaliGemmaProcessor"
