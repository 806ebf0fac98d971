"""HELM's requests: answered as the model answers them, however many come at once, and kept under all they depend on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("helm", reason="crfm-helm is an extra: pip install 'vlmvqa[helm]'")

from helm.clients.auto_client import AutoClient
from helm.common.cache import BlackHoleCacheConfig, SqliteCacheConfig
from helm.common.media_object import MediaObject, MultimediaObject
from helm.common.request import Request, RequestResult
from helm.proxy.retry import NonRetriableException

import vlmvqa
from tests.unit.test_predictor import examples, predictor
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.evaluation.helm import model as helm_model
from vlmvqa.evaluation.helm.client import HelmQuestion, SavedAnswersClient, VLMClient
from vlmvqa.evaluation.helm.metrics import ACCURACIES
from vlmvqa.inference.predictor import Predictor
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import PROMPT

INSTRUCTIONS = "Answer the question using a single word."


def text(content: str) -> MediaObject:
    return MediaObject(text=content, content_type="text/plain")


def request(picture: Path, question: str, **more: Any) -> Request:
    """As HELM's adapter makes it for VQAv2."""
    objects = [
        text(INSTRUCTIONS),
        text("\n"),
        MediaObject(location=str(picture), content_type="image/png"),
        text(question),
    ]
    given = {"temperature": 0.0, "max_tokens": 4, **more}
    return Request(model="vlmvqa/m", model_deployment="vlmvqa/m", multimodal_prompt=MultimediaObject(objects), **given)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Every test is a process of its own, as far as loaded models go."""
    helm_model._LOADED.clear()
    yield
    helm_model._LOADED.clear()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    predictor().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def asked(tmp_path: Path) -> list[tuple[Path, str]]:
    """Pictures with their questions."""
    found = []
    for example in examples():
        path = tmp_path / f"{example.image_id}.png"
        assert isinstance(example.image, Image.Image)
        example.image.save(path)
        found += [(path, question.text) for question in example.questions]
    return found


def ask(client: VLMClient, asked: Sequence[tuple[Path, str]], threads: int, **more: Any) -> list[RequestResult]:
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda one: client.make_request(request(*one, **more)), asked))
    assert all(result.success for result in results), [result.error for result in results if result.error]
    return results


def texts(results: Sequence[RequestResult]) -> list[str]:
    return [result.completions[0].text for result in results]


def test_answers_are_the_models_own_whatever_the_number_of_threads(saved: Path, asked: list[tuple[Path, str]]) -> None:
    """To the model's own prompt, one at a time: HELM's instructions were never in it."""
    alone = [str(predictor().answer(path, question)) for path, question in asked]
    for threads, batch_size in ((1, 32), (32, 32), (32, 3)):
        helm_model._LOADED.clear()
        client = VLMClient(BlackHoleCacheConfig(), str(saved), batch_size=batch_size)
        assert texts(ask(client, asked, threads)) == alone
    assert len(set(alone)) > 4


def test_threads_are_answered_together(
    saved: Path, asked: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a batch is answered, all others gather, and are the next one."""
    sizes: list[int] = []
    answer_examples = Predictor.answer_examples

    def held(self: Predictor, given: Sequence[Example], **more: Any) -> Any:
        sizes.append(len(given))
        (model,) = helm_model._LOADED.values()
        assert isinstance(model, helm_model.Model)
        for _ in range(10_000):
            if sum(sizes) + model.waiting.qsize() == len(asked):
                break
            time.sleep(0.001)
        return answer_examples(self, given, **more)

    monkeypatch.setattr(Predictor, "answer_examples", held)
    ask(VLMClient(BlackHoleCacheConfig(), str(saved)), asked, len(asked))
    assert len(sizes) == 2 and sum(sizes) == len(asked) == 16


def test_helms_sums_of_log_probabilities_are_the_models(saved: Path, asked: list[tuple[Path, str]]) -> None:
    client = VLMClient(BlackHoleCacheConfig(), str(saved))
    for (path, question), result in zip(asked, ask(client, asked, 1), strict=True):
        (output,) = result.completions
        own = predictor().answer(path, question)
        assert output.logprob == sum(token.logprob for token in output.tokens)
        assert output.logprob == pytest.approx(own.log_probability, abs=1e-4) and not math.isnan(output.logprob)
        assert output.finish_reason == {"reason": "length" if own.cut else "endoftext"}
        assert len(output.tokens) == 1 + len(predictor().processor.tokenizer.tokenize(output.text))


def test_helms_instructions_are_handed_on_where_the_prompt_wants_them(
    saved: Path, asked: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    answer_examples = Predictor.answer_examples

    def watched(self: Predictor, given: Sequence[Example], **more: Any) -> Any:
        seen.extend(question.prompt for example in given for question in example.questions)
        return answer_examples(self, given, **more)

    monkeypatch.setattr(Predictor, "answer_examples", watched)
    prompt = "{instructions}|{question}\n"
    ask(VLMClient(BlackHoleCacheConfig(), str(saved), prompt=prompt), asked[:1], 1)
    ask(VLMClient(BlackHoleCacheConfig(), str(saved)), asked[:1], 1)
    assert seen == [f"{INSTRUCTIONS}|{asked[0][1]}\n", f"{asked[0][1]}\n"]


def test_helms_instructions_do_not_push_the_question_out(
    saved: Path, asked: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model reads as much text as in training: of HELM's instructions that would be a part, and no question."""
    short = predictor()
    short.processor = replace(short.processor, max_text_tokens=8)
    short.save(saved)
    read = []
    generate = VLM.generate

    def watched(model: Any, batch: Any, *more: Any) -> Any:
        tokens = batch["input_ids"][batch["role"] == PROMPT].tolist()
        read.append(short.processor.tokenizer.decode(tokens))
        return generate(model, batch, *more)

    monkeypatch.setattr(VLM, "generate", watched)
    path = asked[0][0]
    ask(VLMClient(BlackHoleCacheConfig(), str(saved), prompt="{instructions} {question}\n"), [(path, "what is it")], 1)
    assert f"{INSTRUCTIONS} what is it\n" in read[0]


def test_a_checkpoint_that_cannot_be_loaded_is_loaded_once(
    saved: Path, asked: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:1000])
    loads = []
    load = vlmvqa.load
    monkeypatch.setattr(vlmvqa, "load", lambda path: loads.append(path) or load(path))
    client = VLMClient(BlackHoleCacheConfig(), str(saved))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda one: client.make_request(request(*one)), asked))
    assert len(loads) == 1 and all("does not hold this model's weights" in str(result.error) for result in results)


def test_what_nobody_foresaw_is_not_tried_again(
    saved: Path, asked: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Predictor, given: Sequence[Example], **more: Any) -> Any:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(Predictor, "answer_examples", broken)
    with pytest.raises(NonRetriableException, match="ZeroDivisionError: by nought"):
        VLMClient(BlackHoleCacheConfig(), str(saved)).make_request(request(*asked[0]))


def test_outer_spaces_of_a_question_stay(asked: list[tuple[Path, str]]) -> None:
    """launch/eval.py asks with them."""
    assert HelmQuestion.of(request(asked[0][0], " Is it  red? ").multimodal_prompt).question == " Is it  red? "


def test_an_answer_ends_with_its_line(saved: Path, asked: list[tuple[Path, str]], monkeypatch: Any) -> None:
    answer_examples = Predictor.answer_examples

    def chatty(self: Predictor, given: Sequence[Example], **more: Any) -> Any:
        found = answer_examples(self, given, **more)
        return {name: replace(one, text="two dogs\nQuestion: and now?") for name, one in found.items()}

    monkeypatch.setattr(Predictor, "answer_examples", chatty)
    client = VLMClient(BlackHoleCacheConfig(), str(saved))
    (plain,) = ask(client, asked[:1], 1)
    (stopped,) = ask(client, asked[:1], 1, stop_sequences=[" dogs"])
    assert texts([plain, stopped]) == ["two dogs", "two"]
    assert plain.completions[0].finish_reason == {"reason": "stop"}


def test_a_retrained_model_and_a_changed_picture_are_asked_again(
    saved: Path, asked: list[tuple[Path, str]], tmp_path: Path
) -> None:
    def again(**more: Any) -> list[bool]:
        """Which of the answers came out of the cache, in a new process."""
        helm_model._LOADED.clear()
        client = VLMClient(SqliteCacheConfig(str(tmp_path / "cache.sqlite")), str(saved), **more)
        return [result.cached for result in ask(client, asked[:3], 2)]

    assert again() == [False] * 3 and again() == [True] * 3
    assert again(prompt="so: {question}\n") == [False] * 3
    assert again(decoding={"num_beams": 2}) == [False] * 3
    config = json.loads((saved / "config.json").read_text())
    config["language_config"]["final_logit_softcapping"] = 1.0  # the same weights, and another model
    (saved / "config.json").write_text(json.dumps(config))
    assert again() == [False] * 3 and again() == [True] * 3
    Image.new("RGB", (28, 28), (9, 9, 9)).save(asked[0][0])
    assert again() == [asked[n][0] != asked[0][0] for n in range(3)]
    trained = predictor()
    with torch.no_grad():
        next(trained.model.projector.parameters()).add_(0.01)
    trained.save(saved)
    assert again() == [False] * 3 and again() == [True] * 3


@pytest.mark.parametrize("damage", ["missing", "half", "examples", "several"])
def test_what_cannot_succeed_is_not_tried_again(
    damage: str, saved: Path, asked: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the client that wraps all others in HELM: it would wait five seconds before the second try."""
    given = request(*asked[0], **({"num_completions": 2} if damage == "several" else {}))
    if damage == "missing":
        asked[0][0].unlink()
    elif damage == "half":
        Image.effect_noise((64, 64), 50).save(asked[0][0])
        asked[0][0].write_bytes(asked[0][0].read_bytes()[:300])
    elif damage == "examples":
        assert given.multimodal_prompt is not None
        more = given.multimodal_prompt.media_objects
        given = replace(given, multimodal_prompt=MultimediaObject([*more, *more]))
    outer = AutoClient({}, str(saved.parent), None)  # type: ignore[arg-type]
    client = VLMClient(BlackHoleCacheConfig(), str(saved))
    monkeypatch.setattr(outer, "_get_client", lambda name: client)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("HELM waits to try again"))
    result = outer.make_request(given)
    sentences = {
        "missing": f"{asked[0][0]} cannot be read (No such file or directory); download it again",
        "half": "cannot be read",
        "examples": "holds 2 images and 4 texts; this model answers one question about one image",
        "several": "2 answers per question are requested; this client returns one",
    }
    assert not result.success and sentences[damage] in str(result.error)


def test_saved_answers_are_given_back(tmp_path: Path, asked: list[tuple[Path, str]]) -> None:
    (path, question), (other, _) = asked[0], asked[-1]
    records = [{"image": str(path), "question": question, "text": "two\nthree", "log_probability": None}]
    (tmp_path / "answers.json").write_text(json.dumps(records))
    client = SavedAnswersClient(BlackHoleCacheConfig(), str(tmp_path / "answers.json"))
    result = client.make_request(request(path, question))
    assert texts([result]) == ["two"] and result.completions[0].logprob == 0
    missing = client.make_request(request(other, question))
    assert not missing.success and "there is no saved answer to" in str(missing.error)


def test_a_prompt_without_a_picture_is_refused() -> None:
    with pytest.raises(InputError, match="holds 0 images and 1 texts"):
        HelmQuestion.of(MultimediaObject([text("what?")]))
    with pytest.raises(InputError, match="holds 0 images and 0 texts"):
        HelmQuestion.of(None)


def test_official_accuracies_are_shares() -> None:
    _, vqa = ACCURACIES["vqa_accuracy"]
    _, gqa = ACCURACIES["gqa_accuracy"]
    ten = ["red"] * 2 + ["blue"] * 8
    assert vqa("blue", ten) == 1 and vqa("red", ten) == pytest.approx(0.6) and vqa("green", ten) == 0
    assert gqa("dog", ["dog", "It is a dog."]) == 1 and gqa("It is a dog.", ["dog", "It is a dog."]) == 0
