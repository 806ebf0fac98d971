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
from typing import Any

import torch
from torch import Tensor

from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings, decode
from vlmvqa.data.processor import Processor
from vlmvqa.errors import InputError
from vlmvqa.extras.vision.several_images import refuse_several_images
from vlmvqa.sequence.rows import ANSWER, IMAGE, PADDING, Document, TokenizedQuestion, build_row, pad_rows


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

    def tokenize(self, question: Question, answer: str | None) -> TokenizedQuestion:
        """Return the prompt as text in the model's format, and the tokens of the answer with the one that ends it.

        Raises:
            InputError: the answer is empty or exceeds `max_text_tokens`, or the text contains a special token.
        """
        if question.history:
            raise InputError("a pretrained model's prompt holds one question, not a conversation; use another model")
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
        return TokenizedQuestion(self._prompt_text(question.prompt), target)  # type: ignore[arg-type] # tokenized below

    def load_images(self, example: Example) -> Document:
        """Decode the image; the library's processor resizes it in `collate`."""
        refuse_several_images([example], "a pretrained model's prompt")
        return Document([decode(example.image, example.name)], ())

    def count_tokens(self, question: Question, answer: str) -> int:
        """Return the number of tokens of a question with its answer, without image tokens and chat template."""
        return len(self._ids(question.prompt)) + len(self.tokenize(question, answer).answer) - 1

    def collate(self, rows: Sequence[Sequence[Document]], multiple: int = 8) -> dict[str, Tensor]:
        """Return the network's inputs and the columns of `sequence/rows.py`, `[B, T]`, except for `image_index`.

        Rows are padded on the right; on the left if none has an answer, so that generation continues all of them at
        the same position.
        """
        documents = [document for row in rows for document in row]
        questions = [document.questions[0] for document in documents]
        texts: list[Any] = [question.prompt for question in questions]
        bos = self.tokenizer.bos_token
        # If the chat template has written BOS, the tokenizer must not add another (as in transformers).
        more: dict[str, Any] = {"add_special_tokens": False} if bos is not None and texts[0].startswith(bos) else {}
        images = [document.images for document in documents]
        found = self.library(text=texts, images=images, padding=True, return_tensors="pt", **more)
        found.pop("labels", None)  # PaliGemma's labels of the prompt
        ids, given = found.pop("input_ids"), found.pop("attention_mask").bool()
        # The prompt contains the image's tokens already.
        built = [
            build_row([Document((), [replace(question, prompt=prompt[mask].tolist())])], 0, "prefix_lm")
            for question, prompt, mask in zip(questions, ids, given, strict=True)
        ]
        columns = pad_rows(built, multiple, left=not any(question.answer for question in questions))
        del columns["image_index"]
        real, role = columns["document"] != PADDING, columns["role"]
        padding = self.tokenizer.pad_token_id
        columns["input_ids"][~real] = self.tokenizer.eos_token_id if padding is None else padding
        role[columns["input_ids"] == self.library.image_token_id] = IMAGE
        for name, types in found.items():
            if types.shape == ids.shape:  # `token_type_ids` of the prompt; PaliGemma's answers have their own type
                extended = torch.full_like(role, int(_is_paligemma(self.library)))
                extended[real & (role != ANSWER)] = types[given].to(extended.dtype)
                found[name] = extended.masked_fill(~real, 0)
        return {**found, **columns, "attention_mask": real.long()}

    @property
    def shares_images(self) -> bool:
        """One question per row."""
        return False

    @property
    def processing_class(self) -> Any:
        """The object of transformers that is saved with the model: its processor."""
        return self.library

    def with_images(self, **options: Any) -> PretrainedProcessor:
        """Return the processor unchanged: it resizes images as in its training."""
        return self

    @cached_property
    def end_token_ids(self) -> set[int]:
        """Token ids that end an answer."""
        return {self.tokenizer.eos_token_id, self._target(Question(0, "", ""), "yes")[-1]}

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


def _is_paligemma(library: Any) -> bool:
    return type(library).__name__ == "PaliGemmaProcessor"
