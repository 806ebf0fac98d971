"""Clients that answer HELM's requests: with a model, or from saved answers.

HELM caches the answers; a cache key holds all that an answer depends on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from helm.clients.client import CachingClient
from helm.common.cache import CacheConfig
from helm.common.media_object import MultimediaObject
from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Token, wrap_request_time
from helm.proxy.retry import NonRetriableException

from vlmvqa.data.example import Question
from vlmvqa.errors import InputError
from vlmvqa.evaluation.helm.model import Model, digest, load

PROMPT = "answer en {question}\n"  # for a model that was trained without questions
# A failed request is not retried, and HELM prints no score without it.
FATAL = ErrorFlags(is_retriable=False, is_fatal=True)


@dataclass(frozen=True)
class HelmQuestion:
    """The question of a HELM request.

    Attributes:
        image: the image file.
        question: the question without the instructions.
        instructions: HELM's instructions for the model; "" for none.
    """

    image: Path
    question: str
    instructions: str

    @classmethod
    def of(cls, prompt: MultimediaObject | None) -> HelmQuestion:
        """Split HELM's prompt: instructions, then image and question in either order.

        Raises:
            InputError: the prompt is not one question about one image.
        """
        objects = prompt.media_objects if prompt else []
        images = [one.location for one in objects if one.is_type("image") and one.location]
        # A newline separates the instructions from the rest, as a separate text or at the start of one.
        texts = [one.text.removeprefix("\n") for one in objects if one.is_type("text") and one.text]
        texts = [text for text in texts if text.strip()]
        if len(images) != 1 or not 1 <= len(texts) <= 2:
            raise InputError(
                f"a request holds {len(images)} images and {len(texts)} texts; this model answers one question about "
                "one image, without examples (max_train_instances=0)"
            )
        return cls(Path(images[0]), texts[-1], texts[0] if len(texts) == 2 else "")


class VLMClient(CachingClient):
    """Answer with a model that `vlmvqa.load` reads.

    Args:
        checkpoint: a run's folder, its `model/` folder, or a hub id.
        prompt: template of a question with `{question}` and, for HELM's instructions, `{instructions}`, never
            truncated; None: the model's own template, truncated as in training.
        source: the dataset (`data.source`) whose template is used, if the model was trained on several.
        batch_size: questions per batch; at most the number of HELM's threads.
        decoding: keys of `GenerationSettings` to change; HELM sets temperature and token limit.
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
        """Answer a question; an error is returned as one sentence."""
        return _without_retries(self._answer, request)

    def _answer(self, request: Request) -> RequestResult:
        if request.num_completions != 1:
            raise InputError(f"{request.num_completions} answers per question are requested; this client returns one")
        asked = HelmQuestion.of(request.multimodal_prompt)
        model = load(self.checkpoint, self.prompt, self.batch_size)
        template = _template(model, self.prompt, self.source)
        prompt = template.replace("{instructions}", asked.instructions).replace("{question}", asked.question)
        decoding = model.decoding(self.decoding, request.max_tokens, request.temperature)
        content = _read(asked.image)
        depends = {
            "weights": model.weights,
            "model": model.about,
            "prompt": prompt,
            "image": digest(content),
            "decoding": asdict(decoding),
            "stop": list(request.stop_sequences),
        }
        key = self.make_cache_key(depends, request)

        def answer() -> dict[str, Any]:
            name = digest(json.dumps(key, sort_keys=True).encode())
            found = model.ask(content, str(asked.image), Question(name, asked.question, prompt), decoding)
            text, cut = _cut(found.text, request.stop_sequences)
            return {
                "text": text,
                "log_probability": found.log_probability,
                "tokens": model.tokens(text),
                "reason": "stop" if cut else "length" if found.cut else "endoftext",
            }

        response, cached = self.cache.get(key, wrap_request_time(answer))
        return _result(response, cached)


class SavedAnswersClient(CachingClient):
    """Return answers that launch/eval.py wrote; no model is loaded.

    Args:
        answers: a JSON list of records with `image` (its file), `question`, `text` and `log_probability` (or null).
    """

    def __init__(self, cache_config: CacheConfig, answers: str) -> None:
        super().__init__(cache_config)
        records = json.loads(Path(answers).read_text(encoding="utf-8"))
        self.by_question = {(record["image"], record["question"]): record for record in records}

    def make_request(self, request: Request) -> RequestResult:
        """Return the saved answer to the question about the image."""
        return _without_retries(self._answer, request)

    def _answer(self, request: Request) -> RequestResult:
        asked = HelmQuestion.of(request.multimodal_prompt)
        record = self.by_question.get((str(asked.image.resolve()), asked.question))
        if record is None:
            raise InputError(f"there is no saved answer to {asked.question!r} about {asked.image}")
        text, cut = _cut(record["text"], request.stop_sequences)
        # Words stand in for tokens, and the finish reason is unknown: neither was saved.
        saved = {"text": text, "log_probability": record["log_probability"] or 0.0, "tokens": text.split()}
        return _result({**saved, "reason": "stop" if cut else "unknown", "request_time": 0.0}, False)


def effective_settings(limits: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    """Return the settings with which a `VLMClient` answers; `limits` are HELM's `max_tokens` and `temperature`."""
    model = load(**arguments)
    decoding = model.decoding(arguments["decoding"], limits["max_tokens"], limits["temperature"])
    return {
        "checkpoint": arguments["checkpoint"],
        "checkpoint_fingerprint": model.weights,
        "dtype": model.predictor.dtype,
        "prompt": _template(model, arguments["prompt"], arguments["source"]),
        "decoding": asdict(decoding),
    }


# --- requests and results -------------------------------------------------------------------------------


def _template(model: Model, prompt: str | None, source: str) -> str:
    return prompt or model.predictor.prompt_for(source, PROMPT)


def _without_retries(answer: Callable[[Request], RequestResult], request: Request) -> RequestResult:
    """Return the result of a request; errors are marked so that HELM does not retry, as a retry fails again."""
    try:
        return answer(request)
    except InputError as error:
        return RequestResult(False, [], [], cached=False, error=str(error), error_flags=FATAL)
    except torch.OutOfMemoryError as error:
        raise NonRetriableException("the GPU's memory is full; choose a smaller batch_size") from error
    except Exception as error:
        raise NonRetriableException(f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); download it again") from None


def _cut(text: str, stop_sequences: Sequence[str]) -> tuple[str, bool]:
    """Return the text up to the end of its first line or a stop sequence, and whether it was cut."""
    ends = [end for stop in ["\n", *stop_sequences] if (end := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _result(response: Mapping[str, Any], cached: bool) -> RequestResult:
    """Convert a response to HELM's type.

    HELM sums the tokens' log-probabilities. The last token, without text, has the log-probability of the complete
    answer with its EOS, and all others have 0: the sum is right, and no token's value is invented.
    """
    total = response["log_probability"]
    tokens = [Token(text=token, logprob=0.0) for token in response["tokens"]] + [Token(text="", logprob=total)]
    output = GeneratedOutput(response["text"], total, tokens, finish_reason={"reason": response["reason"]})
    return RequestResult(True, [], [output], cached=cached, request_time=response["request_time"])
