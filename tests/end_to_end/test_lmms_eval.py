"""lmms-eval's own command line on a task that launch/prepare.py wrote, and the model class as lmms-eval calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-harnesses")

from lmms_eval.api.instance import Instance
from lmms_eval.models import MODEL_REGISTRY_V2

import vlmvqa
from bench import harness as harness_bench
from tests.end_to_end.scripts import call, done, metrics, predictions
from vlmvqa.data.example import Example, Question
from vlmvqa.errors import InputError
from vlmvqa.evaluation.compare_scores import compare
from vlmvqa.evaluation.lmms_eval_adapter.model import VlmVqa
from vlmvqa.sequence.rows import IGNORE

pytestmark = pytest.mark.harness
TASK = "vlmvqa_vqav2_val"


@pytest.fixture(scope="module")
def tasks(scored: Path) -> Path:
    folder = scored / "lmms_eval"
    done(call("prepare", "harness", "data=vqav2", f"data.root={scored / 'data'}", f"harness.dir={folder}"))
    return folder


def evaluate(scored: Path, tasks: Path, output: Path, names: Sequence[str], *before: str) -> dict[str, Any]:
    """Run lmms-eval in a process of its own, without a network; return its results."""
    command = [*before, "-m", "lmms_eval", "--model", "vlmvqa", "--model_args", f"checkpoint={scored / 'run'}"]
    command += ["--tasks", ",".join(names), "--include_path", str(tasks), "--batch_size", "16"]
    command += ["--log_samples", "--output_path", str(output)]
    environment = {**os.environ, "HF_HOME": str(scored / "hf"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = sorted(output.rglob("*_results.json"))
    assert found, ended.stdout[-3000:] + ended.stderr[-3000:]
    results: dict[str, Any] = json.loads(found[-1].read_text())["results"]
    return results


@pytest.fixture(scope="module")
def evaluated(scored: Path, tasks: Path) -> tuple[Path, dict[str, Any]]:
    output = scored / "logs"
    return output, evaluate(scored, tasks, output, [TASK, f"{TASK}_loglikelihood"], sys.executable)


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    (path,) = output.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_equal_those_of_our_evaluation(scored: Path, evaluated: tuple[Path, dict[str, Any]]) -> None:
    ours = [record["answer"] for record in predictions(scored / "eval")]
    assert [sample["filtered_resps"] for sample in samples(evaluated[0], TASK)] == ours
    assert len(set(ours)) > 2


def test_the_score_is_ours_under_the_variant_of_its_normalisation(
    scored: Path, evaluated: tuple[Path, dict[str, Any]]
) -> None:
    output, results = evaluated
    (path,) = output.rglob(f"*_samples_{TASK}.jsonl")
    text = compare(scored / "eval", path)
    official = metrics(scored / "eval")["metrics"]["vqa_accuracy"]["overall"]
    theirs = 100 * results[TASK]["exact_match,none"]
    assert official < theirs
    assert re.search(rf"^their score +{theirs:.2f}$", text, re.MULTILINE), text
    assert re.search(rf"^vqa_accuracy, our answers +{official:.2f}$", text, re.MULTILINE), text
    assert re.search(rf"normalize=always +{theirs:.2f}  equal to theirs for (\d+) of \1 ", text), text
    assert "reason: the harness scores as our normalize=always" in text


def test_log_likelihoods_equal_a_sum_over_tokens(scored: Path, evaluated: tuple[Path, dict[str, Any]]) -> None:
    """Each computed alone, in a row without other questions."""
    predictor = vlmvqa.load(scored / "run", "cpu")
    records = predictions(scored / "eval")
    found = samples(evaluated[0], f"{TASK}_loglikelihood")
    images = {path.name: path for path in (scored / "data" / "val2014").iterdir()}
    assert len(found) == len(records)
    for record, sample in zip(records, found, strict=True):
        image = images[f"COCO_val2014_{record['image_id']:012d}.jpg"]
        prompt = predictor.prompt.replace("{question}", record["question"])
        question = Question(0, record["question"], prompt, record["target"])
        batch = predictor.batch([predictor.processor.encode(Example(image, 0, (question,)), [record["target"]])])
        with torch.no_grad():
            logits = predictor.model.logits(predictor.model.decode(batch)[0])
        places = [n for n, label in enumerate(batch["labels"][0].tolist()) if label != IGNORE][:-1]  # the last is EOS
        labels = batch["labels"][0][places]
        expected = logits[places].log_softmax(-1).gather(-1, labels[:, None]).sum().item()
        assert sample["log_likelihood"] == pytest.approx(expected, abs=1e-4)
        assert sample["is_greedy"] == float(bool((logits[places].argmax(-1) == labels).all()))


@pytest.mark.slow
def test_two_ranks_answer_as_one(scored: Path, tasks: Path, evaluated: tuple[Path, dict[str, Any]]) -> None:
    output = scored / "two"
    before = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1")
    results = evaluate(scored, tasks, output, [TASK], *before, "--mixed_precision=no", "--dynamo_backend=no")
    one = {sample["doc_id"]: sample["filtered_resps"] for sample in samples(evaluated[0], TASK)}
    assert {sample["doc_id"]: sample["filtered_resps"] for sample in samples(output, TASK)} == one
    assert results[TASK]["exact_match,none"] == pytest.approx(evaluated[1][TASK]["exact_match,none"])


# --- the class, in this process ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(scored: Path) -> VlmVqa:
    made = MODEL_REGISTRY_V2.get_model_class("vlmvqa")(checkpoint=str(scored / "run"), batch_size="4")
    images = [Image.new("RGB", (48, 48), color) for color in ("red", "red", "blue")]
    made.task_dict = {"t": {"val": [{"image": image, "target": "red"} for image in images]}}
    return made


def request(kind: str, document: int, text: str, middle: Any, visuals: str = "image") -> Instance:
    show = partial(_show, visuals)
    about = {"task": "t", "doc_id": document, "repeats": 1}
    return Instance(kind, (text, middle, show, document, "t", "val"), 0, about)


def _show(visuals: str, document: dict[str, Any]) -> list[Any]:
    return {"image": [document["image"]], "none": [], "two": [document["image"]] * 2, "video": ["a.mp4"]}[visuals]


def test_requests_about_equal_images_share_a_row(model: VlmVqa, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[int]] = []
    answer = type(model.predictor).answer_examples

    def watched(predictor: Any, examples: Sequence[Example], **more: Any) -> Any:
        rows.append([len(example.questions) for example in examples])
        return answer(predictor, examples, **more)

    monkeypatch.setattr(type(model.predictor), "answer_examples", watched)
    asked = [request("generate_until", n, "Is there a red shape?", {"until": ["\n\n"]}) for n in (0, 1, 2, 2)]
    answers = model.generate_until(asked)
    assert rows == [[2, 2]]
    image = model.task_dict["t"]["val"][2]["image"]
    assert answers[2] == answers[3] == model.predictor.answer(image, "Is there a red shape?").text
    model.grouped = False
    assert model.generate_until(asked) == answers
    assert rows[-1] == [1, 1, 1, 1]
    model.grouped = True


def test_generation_arguments_apply_to_their_requests_only(model: VlmVqa) -> None:
    text = "Is there a red shape?"
    whole = model.generate_until([request("generate_until", 2, text, {})])[0]
    short = {"max_new_tokens": 1}
    cut = {"until": whole[1:]}
    both = [request("generate_until", 2, text, given) for given in (short, {}, cut)]
    answers = model.generate_until(both)
    assert answers[1] == whole and answers[2] == whole[:1] and len(answers[0]) <= len(whole)


def test_the_options_of_a_choice_are_scored_as_losses(model: VlmVqa) -> None:
    """lmms-eval chooses the least; a `loglikelihood` task, whose target is a function, gets the log-probability."""
    options = [request("loglikelihood", 2, "What color is it?", f" {option}") for option in ("red", "blue")]
    target = request("loglikelihood", 2, "What color is it?", lambda document: document["target"])
    red, blue, same = model.loglikelihood([*options, target])
    assert red[0] > 0 and blue[0] > 0
    assert same[0] == pytest.approx(-red[0], abs=1e-5) and same.text == (same[0], same[1])


@pytest.mark.parametrize(
    ("visuals", "shown"), [("none", "shows nothing"), ("two", "shows Image, Image"), ("video", "shows str")]
)
def test_what_is_no_question_about_one_image_is_refused(model: VlmVqa, visuals: str, shown: str) -> None:
    with pytest.raises(InputError, match=f"t/val/0 {shown}; this model answers questions about one image"):
        model.generate_until([request("generate_until", 0, "what?", {}, visuals)])


def test_conversations_and_an_unknown_batch_size_are_refused(model: VlmVqa, scored: Path) -> None:
    with pytest.raises(InputError, match="not a conversation"):
        model.generate_until_multi_round([])
    with pytest.raises(InputError, match="--batch_size auto should be a whole number"):
        VlmVqa(str(scored / "run"), batch_size="auto")


def test_the_benchmark_answers_equally_in_all_ways(tmp_path: Path) -> None:
    rows = harness_bench.main(
        ["--model", "tiny", "--images", "2", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "found.json")]
    )
    asked = json.loads((tmp_path / "found.json").read_text())["questions"]
    assert [row["equal_answers"] for row in rows] == [asked] * 3
