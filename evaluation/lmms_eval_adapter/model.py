"""The model class that lmms-eval 0.7.3 runs: `lmms-eval --model vlmvqa --model_args checkpoint=runs/demo`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL.Image import Image

import vlmvqa
from vlmvqa import ranks
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.evaluation.lmms_eval_adapter.requests import Request, cut, decoding, digest, examples, one_image
from vlmvqa.inference.likelihood import log_likelihoods

THREADS = 8  # that decode images to find those that are equal


class LogLikelihood(tuple[float, bool], GenerationResult):
    """The pair that lmms-eval documents as the result of a loglikelihood request.

    Its evaluator converts a plain pair to text and then fails; it passes the `text` of a `GenerationResult` unchanged.
    """

    def __new__(cls, log_probability: float, is_greedy: bool) -> LogLikelihood:
        """Return the pair."""
        return super().__new__(cls, (log_probability, is_greedy))

    def __init__(self, log_probability: float, is_greedy: bool) -> None:
        GenerationResult.__init__(self, text=(log_probability, is_greedy))


class VlmVqa(lmms):
    """A model that answers all questions about an image in one pass over it.

    lmms-eval gives each rank its own requests, and the questions about one image to different ranks. The ranks exchange
    their requests (texts, not images), group them by image, and answer the batches together.

    Args:
        checkpoint: a run's folder, its `model/` folder, or a hub id.
        batch_size: rows per batch, which are images, not questions: lmms-eval's `--batch_size`.
        device: default: the GPU if there is one.
        dtype: as in `vlmvqa.load`.
        source: the dataset (`data.source`) whose prompt template is used, if the model was trained on several.
        grouped: False answers each question in a row of its own, to measure what grouping saves.
        workers: processes that load images.

    Raises:
        InputError: the model cannot be loaded, or `--use_cache` is set with several ranks.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        source: str | None = None,
        grouped: bool = True,
        workers: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"--batch_size {batch_size} should be a whole number of images, at least 1")
        self.accelerator = Accelerator()  # creates the process group
        if ranks.world_size() > 1 and any(word.startswith("--use_cache") for word in sys.argv):
            # lmms-eval does not call the model on a rank whose answers are all cached; the others would wait for it.
            raise InputError("--use_cache works with one process only; leave it out, or start a single process")
        own = f"cuda:{ranks.local_rank()}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or own)
        self.predictor = vlmvqa.load(checkpoint, str(self.device), dtype)
        self.prompt = self.predictor.prompt_for(source, self.predictor.prompt) if source else self.predictor.prompt
        self.batch_size, self.grouped, self.workers = int(batch_size), grouped, int(workers)
        self.to_visual: dict[str, Callable[[Any], Any]] = {}  # by task: returns a document's images

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request, cut at its stop sequences."""
        own = self._read(requests)
        answers: dict[Any, str] = {}
        groups: dict[str, list[Request]] = {}
        for request in _of_all_ranks(own):
            groups.setdefault(request.arguments, []).append(request)
        for text in sorted(groups):
            arguments = json.loads(text)
            predictor = replace(self.predictor, decoding=decoding(self.predictor.decoding, arguments))
            found = predictor.answer_examples(
                self._examples(groups[text]), batch_size=self.batch_size, workers=self.workers, progress=True
            )
            answers |= {name: cut(answer.text, arguments.get("until")) for name, answer in found.items()}
        return [answers[one.id] for one in own]

    def loglikelihood(self, requests: list[Instance]) -> list[LogLikelihood]:
        """Return the log-probability of each continuation, without EOS, and whether it is the greedy one.

        White space at the start of a continuation, lmms-eval's delimiter, is left out: the prompt template has its own.
        For the options of a multiple-choice task the log-probability is negated: lmms-eval 0.7.3 expects losses there
        and chooses the least (`process_results` in api/task.py).
        """
        own = self._read(requests)
        rows = self._examples(_of_all_ranks(own))
        found = log_likelihoods(self.predictor, rows, batch_size=self.batch_size, workers=self.workers)
        pairs = []
        for instance, request in zip(requests, own, strict=True):
            likelihood = found[request.id]
            sign = -1 if isinstance(instance.args[1], str) else 1  # an option is text, a target is a function
            pairs.append(LogLikelihood(sign * likelihood.log_probability(end=False), likelihood.is_greedy(end=False)))
        return pairs

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks with several rounds."""
        raise InputError("this model answers one question at a time, not a conversation; choose a task with one round")

    def _read(self, instances: Sequence[Instance]) -> list[Request]:
        """Return this rank's requests; each document's image is decoded here once, and not kept."""
        for instance in instances:
            if len(instance.args) != 6:
                raise InputError(f"{instance.task_name}: a request has no image; this model needs one")
        places = [tuple(instance.args[3:]) for instance in instances]  # document, task, split
        self.to_visual |= {instance.args[4]: instance.args[2] for instance in instances}
        once = list(dict.fromkeys(places)) if self.grouped else []
        with ThreadPoolExecutor(THREADS) as threads:
            digests = dict(zip(once, threads.map(lambda place: digest(self._image(*place)), once), strict=True))
        numbers: Counter[tuple[Any, ...]] = Counter()
        read = []
        for instance, place in zip(instances, places, strict=True):
            document, task, split = place
            target, arguments = None, instance.args[1]
            if instance.request_type == "loglikelihood":
                target = arguments if isinstance(arguments, str) else arguments(self.task_dict[task][split][document])
                target, arguments = str(target).lstrip(), None
            text = json.dumps(arguments, sort_keys=True)
            about = (task, split, document, numbers[place], digests.get(place, ""))
            read.append(Request(*about, instance.args[0], target, text))
            numbers[place] += 1
        return read

    def _image(self, document: int, task: str, split: str) -> Image:
        visuals = self.to_visual[task](self.task_dict[task][split][document])
        return one_image(visuals, f"{task}/{split}/{document}")

    def _examples(self, requests: Sequence[Request]) -> list[Example]:
        return examples(requests, self.prompt, lambda one: self._image(one.document, one.task, one.split), self.grouped)


def _of_all_ranks(own: list[Request]) -> list[Request]:
    """Return the requests of all ranks.

    Raises:
        InputError: a rank has no request of a task; it could not load the task's images.
    """
    shares = ranks.gather(own)
    tasks = {request.task for share in shares for request in share}
    for share in shares:
        for task in tasks - {request.task for request in share}:
            raise InputError(f"{task} has fewer questions than there are ranks; start fewer processes")
    return [request for share in shares for request in share]
