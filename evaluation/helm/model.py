"""A model that many threads share: questions wait in a queue, and one worker answers them in batches."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict, replace
from hashlib import blake2b
from queue import Empty, SimpleQueue
from typing import Any

import torch
import transformers

import vlmvqa
from vlmvqa import fingerprint
from vlmvqa.data import images
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.inference.predictor import Answer, Predictor
from vlmvqa.models.interface import GenerationSettings

# Seconds that a batch waits to reach the size of the previous one: its threads are about to ask again.
PATIENCE = 0.05


class Model:
    """A loaded model and the thread that runs it.

    Attributes:
        weights: fingerprint of the weights, as in metrics.json.
        about: fingerprint of all else that an answer depends on, except question, image and decoding.
    """

    def __init__(self, predictor: Predictor, batch_size: int) -> None:
        self.predictor, self.batch_size = predictor, batch_size
        assert predictor.folder is not None, "the model was loaded from a folder"
        self.weights, self.about = fingerprint.weights_in(predictor.folder), _fingerprint_settings(predictor)
        self.waiting: SimpleQueue[tuple[Example, GenerationSettings, Future[Answer]]] = SimpleQueue()
        # A copy, because tokenizers are not thread-safe.
        self.tokenizer, self.tokenizing = deepcopy(predictor.processor.tokenizer), threading.Lock()
        threading.Thread(target=self._work, name="vlmvqa model", daemon=True).start()

    def decoding(self, given: Mapping[str, Any], most_tokens: int, temperature: float) -> GenerationSettings:
        """Return the model's settings, changed by `given` and within HELM's limits."""
        own = replace(self.predictor.decoding, **given)
        return replace(own, max_new_tokens=min(own.max_new_tokens, most_tokens), temperature=temperature)

    def ask(self, image: bytes, name: str, question: Question, decoding: GenerationSettings) -> Answer:
        """Wait for the answer to a question and return it.

        Args:
            image: the bytes of the image file.
            name: the file's name, for error messages.
            question: its id identifies everything that the answer depends on.

        Raises:
            InputError: the image cannot be decoded.
        """
        decoded = images.decode(image, name, self.predictor.processor.images)
        answered: Future[Answer] = Future()
        self.waiting.put((Example(decoded, name, (question,)), decoding, answered))
        return answered.result()

    def tokens(self, text: str) -> list[str]:
        """Tokenize a text."""
        with self.tokenizing:
            return list(self.tokenizer.tokenize(text))

    def _work(self) -> None:
        before = 1
        while True:
            batch = [self.waiting.get()]
            latest = time.monotonic() + PATIENCE
            while len(batch) < self.batch_size:
                # Wait for as many questions as in the last batch; beyond that, take only those already queued.
                left = max(0.0, latest - time.monotonic()) if len(batch) < before else 0.0
                try:
                    batch.append(self.waiting.get(timeout=left) if left else self.waiting.get_nowait())
                except Empty:
                    break
            before = len(batch)
            for decoding in {decoding: None for _, decoding, _ in batch}:
                self._answer([(example, future) for example, asked, future in batch if asked == decoding], decoding)

    def _answer(self, group: Sequence[tuple[Example, Future[Answer]]], decoding: GenerationSettings) -> None:
        """Answer a batch; an error fails all of its questions."""
        predictor = replace(self.predictor, decoding=decoding)
        once = {example.questions[0].id: example for example, _ in group}
        try:
            found = predictor.answer_examples(list(once.values()), batch_size=len(once))
            for example, answered in group:
                answered.set_result(found[example.questions[0].id])
        except Exception as error:
            for _, answered in group:
                if not answered.done():
                    answered.set_exception(error)


_LOADED: dict[tuple[str, bool], Model | InputError] = {}
_LOADING = threading.Lock()


def load(checkpoint: str, prompt: str | None, batch_size: int, **_: Any) -> Model:
    """Load the model of a `VLMClient` with these arguments, once per process: HELM makes clients in many threads.

    Raises:
        InputError: the model cannot be loaded; raised again at every call.
    """
    key = (checkpoint, prompt is not None)
    with _LOADING:
        if key not in _LOADED:
            try:
                predictor = vlmvqa.load(checkpoint)
                if prompt is not None:  # never truncated
                    predictor = replace(predictor, processor=replace(predictor.processor, max_text_tokens=None))
                _LOADED[key] = Model(predictor, batch_size)
            except InputError as error:
                _LOADED[key] = error
        found = _LOADED[key]
    if isinstance(found, InputError):
        raise found
    return found


def digest(content: bytes) -> str:
    """Return a short hash."""
    return blake2b(content, digest_size=16).hexdigest()


def _fingerprint_settings(predictor: Predictor) -> str:
    processor = predictor.processor
    about = {
        "settings": asdict(predictor.settings),
        "dtype": predictor.dtype,
        "network": predictor.model.saved_config({}),
        "images": asdict(processor.images),
        "text": [processor.max_text_tokens, processor.attention_pattern],
        "tokenizer": [processor.tokenizer.backend_tokenizer.to_str(), processor.tokenizer.special_tokens_map],
        "versions": [vlmvqa.__version__, torch.__version__, transformers.__version__],
    }
    return digest(json.dumps(about, default=str, sort_keys=True).encode())
