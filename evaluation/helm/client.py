"""Answers to HELM's requests: from a model, or from the answers that it wrote before.

HELM asks from many threads at once, and each waits for its answer. A thread decodes its picture and puts the question
into a queue; one worker a model takes what waits there as a batch. HELM keeps what was answered in its cache, under
all that an answer depends on.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from helm.clients.client import CachingClient
from helm.common.cache import CacheConfig
from helm.common.media_object import MultimediaObject
from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Token, wrap_request_time
from helm.proxy.retry import NonRetriableException

import vlmvqa
from vlmvqa import fingerprint
from vlmvqa.data import images
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.inference.predict import Answer, Predictor
from vlmvqa.models.generation import Decoding

# Seconds that a batch waits to become as large as the one before: those threads are on their way back.
PATIENCE = 0.05
# What a failed request does: nothing that would succeed the next time, and no score without it.
FATAL = ErrorFlags(is_retriable=False, is_fatal=True)


@dataclass(frozen=True)
class Asked:
    """What a request of HELM's asks.

    Attributes:
        image: a picture's file.
        question: without the instructions.
        instructions: what HELM tells the model to do; "" for none.
    """

    image: Path
    question: str
    instructions: str

    @classmethod
    def of(cls, prompt: MultimediaObject | None) -> Asked:
        """Take HELM's prompt apart: instructions, then image and question in either order.

        Raises:
            InputError: it is not one question about one image.
        """
        objects = prompt.media_objects if prompt else []
        pictures = [one.location for one in objects if one.is_type("image") and one.location]
        texts = [one.text.strip() for one in objects if one.is_type("text") and one.text and one.text.strip()]
        if len(pictures) != 1 or not 1 <= len(texts) <= 2:
            raise InputError(
                f"a request holds {len(pictures)} images and {len(texts)} texts; this model answers one question about "
                "one image, without examples (max_train_instances=0)"
            )
        return cls(Path(pictures[0]), texts[-1], texts[0] if len(texts) == 2 else "")


class VLMClient(CachingClient):
    """A model that `vlmvqa.load` reads.

    Args:
        checkpoint: a run's folder, its `model/` folder, or a hub id.
        prompt: the template of a question, with `{question}` and, to pass on what HELM tells, `{instructions}`;
            None: that which the model was trained with.
        source: of `data.source`: whose template that is, where it was trained on several.
        batch_size: questions at a time; no more than HELM has threads come together.
        decoding: keys of `Decoding` in place of the model's own; the temperature is HELM's, and so is the most tokens.
    """

    def __init__(
        self,
        cache_config: CacheConfig,
        checkpoint: str,
        prompt: str | None = None,
        source: str = "vqav2",
        batch_size: int = 32,
        decoding: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(cache_config)
        self.checkpoint, self.prompt, self.source = checkpoint, prompt, source
        self.batch_size, self.decoding = batch_size, dict(decoding or {})

    def make_request(self, request: Request) -> RequestResult:
        """Answer a question, or say in a sentence why it cannot be answered."""
        return _once(self._answer, request)

    def _answer(self, request: Request) -> RequestResult:
        if request.num_completions != 1:
            raise InputError(f"{request.num_completions} answers to a question are asked for; this client gives one")
        asked = Asked.of(request.multimodal_prompt)
        model = _load(self.checkpoint, self.batch_size)
        template = self.prompt or model.template(self.source)
        prompt = template.replace("{instructions}", asked.instructions).replace("{question}", asked.question)
        own = replace(model.predictor.decoding, **self.decoding)
        most = min(own.max_new_tokens, request.max_tokens)
        decoding = replace(own, max_new_tokens=most, temperature=request.temperature)
        content = _read(asked.image)
        depends = {
            "weights": model.weights,
            "model": model.about,
            "prompt": prompt,
            "image": _digest(content),
            "decoding": asdict(decoding),
            "stop": list(request.stop_sequences),
        }
        key = self.make_cache_key(depends, request)

        def answer() -> dict[str, Any]:
            name = _digest(json.dumps(key, sort_keys=True).encode())
            found = model.ask(content, str(asked.image), Question(name, asked.question, prompt), decoding)
            text, cut = _cut(found.text, request.stop_sequences)
            return {
                "text": text,
                "log_probability": found.log_probability,
                "tokens": model.pieces(text),
                "reason": "stop" if cut else "length" if found.cut else "endoftext",
            }

        response, cached = self.cache.get(key, wrap_request_time(answer))
        return _result(response, cached)


class SavedAnswersClient(CachingClient):
    """Answers that launch/eval.py wrote; no model is loaded.

    Args:
        answers: a JSON list of records with `image` (its file), `question`, `text` and `log_probability` (or null).
    """

    def __init__(self, cache_config: CacheConfig, answers: str) -> None:
        super().__init__(cache_config)
        records = json.loads(Path(answers).read_text(encoding="utf-8"))
        self.known = {(record["image"], record["question"].strip()): record for record in records}

    def make_request(self, request: Request) -> RequestResult:
        """The saved answer to the question about the image."""
        return _once(self._answer, request)

    def _answer(self, request: Request) -> RequestResult:
        asked = Asked.of(request.multimodal_prompt)
        record = self.known.get((str(asked.image.resolve()), asked.question))
        if record is None:
            raise InputError(f"there is no saved answer to {asked.question!r} about {asked.image}")
        text, cut = _cut(record["text"], request.stop_sequences)
        known = {"text": text, "log_probability": record["log_probability"] or 0.0, "tokens": text.split()}
        return _result({**known, "reason": "stop" if cut else "endoftext", "request_time": 0.0}, False)


# --- the model ------------------------------------------------------------------------------------------


class Model:
    """A loaded model and the thread that asks it."""

    def __init__(self, predictor: Predictor, batch_size: int) -> None:
        self.predictor, self.batch_size = predictor, batch_size
        self.weights, self.about = fingerprint.weights(predictor.model), _about(predictor)
        self.waiting: SimpleQueue[tuple[Example, Decoding, Future[Answer]]] = SimpleQueue()
        # Its own, because tokenizers are not for several threads.
        self.tokenizer, self.tokenizing = deepcopy(predictor.processor.tokenizer), threading.Lock()
        threading.Thread(target=self._work, name="vlmvqa model", daemon=True).start()

    def template(self, source: str) -> str:
        """Of a question's prompt."""
        return self.predictor.prompt_for(source, "answer en {question}\n")

    def ask(self, image: bytes, name: str, question: Question, decoding: Decoding) -> Answer:
        """The answer; waits for it.

        Args:
            image: the content of its file, `name`, which an error names.
            question: its id is that of all that the answer depends on.

        Raises:
            InputError: it is no picture.
        """
        picture = images.decode(image, name, self.predictor.processor.images)
        answered: Future[Answer] = Future()
        self.waiting.put((Example(picture, name, (question,)), decoding, answered))
        return answered.result()

    def pieces(self, text: str) -> list[str]:
        """The text's tokens, as text."""
        with self.tokenizing:
            return list(self.tokenizer.tokenize(text))

    def _work(self) -> None:
        before = 1
        while True:
            batch = [self.waiting.get()]
            latest = time.monotonic() + PATIENCE
            while len(batch) < self.batch_size:
                # More than before need not come; those that are there already are taken.
                left = max(0.0, latest - time.monotonic()) if len(batch) < before else 0.0
                try:
                    batch.append(self.waiting.get(timeout=left) if left else self.waiting.get_nowait())
                except Empty:
                    break
            before = len(batch)
            for decoding in {decoding: None for _, decoding, _ in batch}:
                self._answer([(example, future) for example, asked, future in batch if asked == decoding], decoding)

    def _answer(self, group: Sequence[tuple[Example, Future[Answer]]], decoding: Decoding) -> None:
        """Answer a batch; where that fails, all of it has failed."""
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


_MODELS: dict[str, Model] = {}
_LOADING = threading.Lock()


def _load(checkpoint: str, batch_size: int) -> Model:
    """Once a process: HELM makes clients as it pleases, and its threads all come at once."""
    with _LOADING:
        if checkpoint not in _MODELS:
            _MODELS[checkpoint] = Model(vlmvqa.load(checkpoint), batch_size)
        return _MODELS[checkpoint]


def _about(predictor: Predictor) -> str:
    """Fingerprint of all that an answer depends on, but for the weights and the question."""
    processor = predictor.processor
    settings = [asdict(predictor.settings), asdict(processor.images), processor.max_text_tokens, processor.mode]
    about = [settings, sorted(processor.tokenizer.get_vocab().items())]
    return _digest(json.dumps(about, default=str).encode())


def used(
    checkpoint: str, prompt: str | None, source: str, batch_size: int, decoding: Mapping[str, Any]
) -> dict[str, Any]:
    """What a client with these arguments answers with, for the record."""
    model = _load(checkpoint, batch_size)
    return {
        "checkpoint": checkpoint,
        "checkpoint_fingerprint": model.weights,
        "prompt": prompt or model.template(source),
        "decoding": asdict(replace(model.predictor.decoding, **decoding)),
    }


# --- requests and results -------------------------------------------------------------------------------


def _once(answer: Callable[[Request], RequestResult], request: Request) -> RequestResult:
    """The result of a request, which HELM is not to try again: what fails here fails again, half a minute later."""
    try:
        return answer(request)
    except InputError as error:
        sentence = str(error)
        return RequestResult(False, [], [], cached=False, error=sentence, error_flags=FATAL)
    except Exception as error:
        raise NonRetriableException(f"{type(error).__name__}: {error}") from error


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); fetch it again") from None


def _cut(text: str, stop_sequences: Sequence[str]) -> tuple[str, bool]:
    """The text up to its first line's end or stop sequence, and whether there was more."""
    ends = [end for stop in ["\n", *stop_sequences] if (end := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _result(response: Mapping[str, Any], cached: bool) -> RequestResult:
    """A response as HELM takes it.

    HELM adds up its tokens' log-probabilities. The model's, of the whole answer with its end, stands at a last token
    without text, and all others are 0: the sums are right, and no single token's number is made up.
    """
    known = response["log_probability"]
    tokens = [Token(text=piece, logprob=0.0) for piece in response["tokens"]] + [Token(text="", logprob=known)]
    output = GeneratedOutput(response["text"], known, tokens, finish_reason={"reason": response["reason"]})
    return RequestResult(True, [], [output], cached=cached, request_time=response["request_time"])
