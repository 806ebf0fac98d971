"""`vlmvqa helm`: refused in a sentence before anything is asked, or scored by crfm-helm itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nltk
import pytest
from filelock import FileLock

pytest.importorskip("helm", reason="crfm-helm is an extra: pip install 'vlmvqa[helm]'")

from tests.conftest import ROOT
from tests.end_to_end.scripts import Ended, call, change, done, metrics, sentence, truncate
from tests.pages import commands
from vlmvqa import fingerprint
from vlmvqa.data.datasets import vqav2
from vlmvqa.extras.synthetic import gqa as synthetic_gqa
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2
from vlmvqa.metrics import helm_bleu_1

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
MODES = {"real": "metrics", "shuffled": "shuffled_images", "blank": "blank_images"}


@pytest.fixture(autouse=True)
def no_punkt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where nobody has fetched it; nltk keeps what it loaded: forgotten before and after."""
    monkeypatch.setattr(nltk.data, "path", [])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    yield
    nltk.tokenize._get_punkt_tokenizer.cache_clear()


def refused(tmp_path: Path, *arguments: str) -> str:
    """The sentence; HELM was not started."""
    said = sentence(call("helm", f"run.dir={tmp_path / 'helm'}", *arguments))
    assert not list(tmp_path.glob("helm/**/helm.log"))
    return said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "choose what to score: checkpoint=... (a model) or predictions=... (its answers); neither is given"),
        (("checkpoint=a", "predictions=b"), "both are given"),
        (("checkpoint=runs/nowhere/at/all",), "runs/nowhere/at/all; the nearest is "),
        (("predictions=nowhere.jsonl",), "nowhere.jsonl does not exist; correct the path"),
        (("predictions=nowhere.jsonl", "controls=true"), "controls=true asks the model about other images"),
        (("checkpoint=a", "data=docvqa"), "data=docvqa: HELM scores vqav2 or gqa here; choose one of them"),
        (("checkpoint=a", "data.max_eval_samples=5"), "data.max_eval_samples cannot be set here: max_instances sets"),
        (
            ("checkpoint=a", "data.prompt=q {question}"),
            "data.prompt cannot be set here: prompt=... is used, or the model's own",
        ),
        (
            ("checkpoint=a", "data.metric_options.consensus=min3"),
            "data.metric_options.consensus cannot be set here: HELM does not",
        ),
        (("checkpoint=a", "max_instances=-5"), "max_instances=-5 should be a whole number, at least 1"),
        (("checkpoint=a", "max_instances=1000.0"), "max_instances=1000.0 should be a whole number, at least 1"),
        (("checkpoint=a", "batch_size=0"), "batch_size=0 should be a whole number, at least 1"),
        (("checkpoint=a", "seed=null"), "seed=None should be a whole number, at least 0"),
        (("checkpoint=a", "decoding.temperature=1"), "decoding.temperature cannot be set here: it is HELM's own"),
        (("checkpoint=a", "max_instance=5"), "there is no key 'max_instance'; did you mean 'max_instances=5'?"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    given = (argument.replace("checkpoint=a", "checkpoint=some/model") for argument in arguments)
    assert expected in refused(tmp_path, f"data.root={tmp_path}", *given)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("no root", "elsewhere does not exist"),
        ("too many", "'val[random:1000]' cannot be sampled from its 6 questions; choose another number"),
        ("missing image", "is missing (1 of the 4 images are); download it"),
        ("half an image", "COCO_val2014_000001000002.jpg cannot be read"),
        ("no punkt_tab", "nltk's punkt_tab, which HELM cuts answers into words with, is not installed; fetch it once"),
        ("half the weights", "does not hold this model's weights"),
        ("no question in the prompt", "must hold {question} once, {instructions} at most once, and no other braces"),
        ("half of punkt_tab", "nltk's punkt_tab, which HELM cuts answers into words with, is not installed"),
        ("busy", "another command is running in"),
        ("no weights", "holds no model.safetensors; copy or save the model again"),
        ("comma", "holds a comma, which HELM's run entries cannot; move or link the folder"),
        ("unanswered", "does not answer 1 of 6 questions"),
        ("twice", "the same question about the same image has two answers, which HELM cannot distinguish"),
    ],
)
def test_what_is_not_there_is_missed_before_anything_is_asked(
    tmp_path: Path, root: Path, trained: Path, damage: str, expected: str
) -> None:
    given = {"data.root": str(root), "checkpoint": str(trained), "max_instances": "6", "punkt": "stand_in"}
    picture = root / "val2014" / "COCO_val2014_000001000002.jpg"
    if damage == "no root":
        given["data.root"] = str(tmp_path / "elsewhere")
    elif damage == "too many":
        del given["max_instances"]
    elif damage == "missing image":
        picture.unlink()
    elif damage == "half an image":
        truncate(picture)
    elif damage == "no punkt_tab":
        given["punkt"] = "nltk"
    elif damage == "half of punkt_tab":
        given["punkt"] = "nltk"
        (tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english").mkdir(parents=True)
        nltk.data.path.append(str(tmp_path / "nltk"))
    elif damage == "no question in the prompt":
        given["prompt"] = "'{instructions} {qestion}'"
    elif damage == "half the weights":
        given["checkpoint"] = str(shutil.copytree(trained / "model", tmp_path / "half"))
        truncate(tmp_path / "half" / "model.safetensors")
    elif damage == "no weights":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text((trained / "model" / "config.json").read_text())
        given["checkpoint"] = str(tmp_path / "model")
    elif damage == "comma":
        given["data.root"] = str(root.rename(root.with_name("a,b"))).replace(",", "\\,")
    else:
        del given["checkpoint"]
        given["predictions"] = str(tmp_path / "predictions.jsonl")
        asked = json.loads((root / QUESTIONS).read_text())["questions"]
        if damage == "twice":
            one, other = next((n, n + 1) for n in range(5) if asked[n]["image_id"] == asked[n + 1]["image_id"])
            change(root / QUESTIONS, lambda file: file["questions"][other].update(question=asked[one]["question"]))
        else:
            del asked[0]
        lines = (json.dumps({"question_id": one["question_id"], "answer": str(n)}) for n, one in enumerate(asked))
        (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    (tmp_path / "helm").mkdir()
    with FileLock(tmp_path / "helm" / ".lock") if damage == "busy" else contextlib.nullcontext():
        assert expected in refused(tmp_path, *(f"{key}={value}" for key, value in given.items()))


def test_a_refused_overwrite_keeps_what_was_there(tmp_path: Path, root: Path, trained: Path) -> None:
    """Weights are read before results are deleted."""
    shutil.copytree(trained / "model", tmp_path / "half")
    truncate(tmp_path / "half" / "model.safetensors")
    name = f"half-vqav2-6-{fingerprint.examples(vqav2.read(root, 'val[random:6]'))[:4]}"
    (tmp_path / "helm" / name).mkdir(parents=True)
    (tmp_path / "helm" / name / "summary.json").write_text("{}")
    given = [f"data.root={root}", f"checkpoint={tmp_path / 'half'}", "max_instances=6", "punkt=stand_in"]
    assert "already holds results" in refused(tmp_path, *given)
    assert "does not hold this model's weights" in refused(tmp_path, *given, "run.overwrite=true")
    assert (tmp_path / "helm" / name / "summary.json").exists()


# --- HELM itself ----------------------------------------------------------------------------------------

SHAPES = ("data.options.train_images=400", "data.options.val_images=30")
TRAINED = ("trainer.max_steps=60", "trainer.eval_strategy=no", "trainer.use_cpu=true", "trainer.report_to=none")


def helm(*arguments: str) -> Ended:
    """In a process of its own: HELM keeps much in its modules."""
    command = [sys.executable, "-m", "vlmvqa", "helm", *arguments, "punkt=stand_in"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.root={tmp_path_factory.mktemp('helm') / 'shapes'}"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A tiny model that has learned something of shapes."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    done(call("train", data, *SHAPES, f"run.dir={folder}", *TRAINED))
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, learned: Path, data: str) -> Path:
    """What launch/eval.py says of the questions that HELM draws."""
    folder = tmp_path_factory.mktemp("runs") / "evaluated"
    arguments = [f"checkpoint={learned}", "data=vqav2", data, "split=val[random:60]", "blank_images=true"]
    done(call("eval", *arguments, f"run.dir={folder}"))
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, learned: Path, data: str) -> tuple[Path, Ended]:
    """HELM's folder, and how the command ended."""
    home = tmp_path_factory.mktemp("runs") / "helm"
    arguments = [f"checkpoint={learned}", data, "max_instances=60", "controls=true", f"run.dir={home}"]
    return home, done(helm(*arguments))


def summary(home: Path, model: str = "learned") -> dict[str, Any]:
    (path,) = home.glob(f"{model}-vqav2-60-*/summary.json")
    parsed: dict[str, Any] = json.loads(path.read_text())
    return parsed


def of_helm(home: Path, mode: str, file: str) -> Any:
    (path,) = (home / "benchmark_output" / "runs").glob(f"vqav2-60-*/*image_mode={mode},*/{file}.json")
    return json.loads(path.read_text())


def answers(home: Path, mode: str = "real") -> dict[str, str]:
    states = of_helm(home, mode, "scenario_state")["request_states"]
    return {state["instance"]["id"]: state["result"]["completions"][0]["text"] for state in states}


@pytest.mark.slow
def test_a_trained_model_is_scored_by_helm(scored: tuple[Path, Ended]) -> None:
    """One table: what was asked for is what was scored, real images beside both controls."""
    home, ended = scored
    found = summary(home)
    assert found["n"] == 60 and list(found["scores"]) == ["real", "blank", "shuffled"]
    assert len(found["checkpoint_fingerprint"]) == 64 and found["prompt"] == "{question}\n"
    assert found["dtype"] == "float32"
    assert found["helm_asked"]["max_tokens"] == 20 and found["versions"]["crfm-helm"] and found["punkt"] == "stand_in"
    for numbers in found["scores"].values():
        low, high = numbers["bleu_1"]["interval"]
        assert low <= numbers["bleu_1"]["mean"] <= high
    rows = [re.split(r"  +", line) for line in ended.out.splitlines()]
    assert [row[0] for row in rows if row[0] in ("real images", "blank images", "shuffled images")] == [
        "real images",
        "blank images",
        "shuffled images",
    ]
    assert f"{found['scores']['real']['bleu_1']['mean']:.4f}" in ended.out
    assert f"cd {home} && helm-server --suite {found['suite']}" in ended.out
    assert not ended.err.strip()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_helms_bleu_is_recomputed_for_every_question(scored: tuple[Path, Ended], mode: str) -> None:
    home, _ = scored
    states = of_helm(home, mode, "scenario_state")["request_states"]
    references = {
        state["instance"]["id"]: [one["output"]["text"] for one in state["instance"]["references"]] for state in states
    }
    ours = helm_bleu_1(answers(home, mode), references).per_question
    theirs = {
        record["instance_id"]: stat["mean"]
        for record in of_helm(home, mode, "per_instance_stats")
        for stat in record["stats"]
        if stat["name"]["name"] == "bleu_1"
    }
    assert len(theirs) == 60 and theirs == pytest.approx(ours, abs=1e-9)


@pytest.mark.slow
def test_helms_vqa_accuracy_is_that_of_our_evaluation(scored: tuple[Path, Ended], evaluated: Path) -> None:
    """With the real images and with both controls, on the same questions; and the answers are the same."""
    home, _ = scored
    expected = {"metrics": metrics(evaluated)["metrics"]["vqa_accuracy"], **metrics(evaluated)["controls"]}
    for mode, name in MODES.items():
        found = summary(home)["scores"][mode]["vqa_accuracy"]["mean"]
        assert 100 * found == pytest.approx(expected[name]["overall"], abs=0.005)  # which is printed to two places
    records = [json.loads(line) for line in (evaluated / "predictions.jsonl").open()]
    assert answers(home) == {str(record["question_id"]): record["answer"] for record in records}
    assert len(set(answers(home).values())) > 3


@pytest.mark.long
def test_answers_of_our_evaluation_get_the_same_table(
    scored: tuple[Path, Ended], evaluated: Path, data: str, tmp_path: Path
) -> None:
    """HELM scores them without a model."""
    home, _ = scored
    given = [f"predictions={evaluated / 'predictions.jsonl'}", data, "max_instances=60", f"run.dir={tmp_path}"]
    done(helm(*given))
    found = summary(tmp_path, "evaluated-answers")
    assert found["scores"]["real"] == summary(home)["scores"]["real"]


@pytest.mark.long
def test_one_thread_gets_the_same_answers(scored: tuple[Path, Ended], learned: Path, data: str, tmp_path: Path) -> None:
    """And nothing out of the other run's cache."""
    done(helm(f"checkpoint={learned}", data, "max_instances=60", f"run.dir={tmp_path}", "batch_size=1"))
    assert "60 queries, 60 computes" in next(tmp_path.glob("*/helm.log")).read_text()
    assert answers(tmp_path) == answers(scored[0])


@contextmanager
def served(home: Path) -> Iterator[str]:
    """The address of helm-server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("helm-server")), "--port", str(port)]  # the latest suite
    with subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def fetch(address: str) -> bytes:
    for _ in range(300):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                content: bytes = answer.read()
                return content
        except ConnectionError:
            time.sleep(0.1)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.1)
    raise AssertionError(f"{address} did not answer")


@pytest.mark.long
def test_helms_pages_show_the_runs_and_their_pictures(scored: tuple[Path, Ended]) -> None:
    home, _ = scored
    with served(home) as address:
        assert b"<script" in fetch(address)
        suite = f"{address}/benchmark_output/runs/{summary(home)['suite']}"
        tables = json.loads(fetch(f"{suite}/groups/vqav2_bleu.json"))
        shown = {table["title"]: table for table in tables}["Accuracy"]
        (row,) = shown["rows"]
        values = [cell["value"] for cell in row]
        assert values[0] == "learned"
        scores = summary(home)["scores"]
        assert values[1:] == [pytest.approx(scores[mode]["bleu_1"]["mean"]) for mode in scores]
        state = of_helm(home, "real", "scenario_state")["request_states"][0]
        (picture,) = [
            one for one in state["instance"]["input"]["multimedia_content"]["media_objects"] if "location" in one
        ]
        assert fetch(f"{address}/{picture['location']}")[:2] == b"\xff\xd8"  # a JPEG


# --- the page's commands ----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, trained: Path) -> Path:
    """A folder with what README and docs/helm.md name: two models, and drawn files for what they call /data/..."""
    for name in ("demo", "vqa"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    synthetic_vqav2.write(tmp_path / "data" / "shapes", train_images=6, val_images=6, questions_per_image=4)
    synthetic_gqa.write(tmp_path / "gqa", train_images=8, val_images=8)
    (tmp_path / "vqav2").symlink_to(tmp_path / "data" / "shapes")
    return tmp_path


@pytest.mark.long
def test_every_command_of_the_readme_and_of_the_page(home: Path) -> None:
    """In order, with fewer questions; and nothing of nltk's is there."""
    pages = (
        ROOT / "docs" / "helm.md",
        ROOT / "README.md",
        ROOT / "docs" / "quickstart.md",
        ROOT / "docs" / "training.md",
    )
    asked = commands(pages[0]) + [one for page in pages[1:] for one in commands(page) if one.startswith("vlmvqa helm ")]
    for command in dict.fromkeys(asked):
        words = shlex.split(re.sub(r"/data/(\w+)", rf"{home}/\1", command.replace("random:1000", "random:6")))
        more = ["max_instances=6", "punkt=stand_in"] if words[0] == "vlmvqa" else []
        # `vlmvqa helm`, `python launch/eval.py`
        start = ["-m", "vlmvqa", "helm"] if words[0] == "vlmvqa" else [str(ROOT / words[1])]
        ended = subprocess.run(
            [sys.executable, *start, *words[2:], *more], cwd=home, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{command}: {ended.stderr[-2000:]}"
    done = [json.loads(path.read_text()) for path in home.glob("runs/helm/*/summary.json")]
    assert {(one["model"].removeprefix("vlmvqa/"), one["data"]) for one in done} == {
        ("vqa", "vqav2"),
        ("demo", "vqav2"),
        ("vqa", "gqa"),
        ("vqa-beams", "vqav2"),
        ("vqa-told", "vqav2"),
        ("drawn-answers", "vqav2"),
    }


@pytest.mark.slow
def test_helms_own_command_knows_our_entries(scored: tuple[Path, Ended], data: str, tmp_path: Path) -> None:
    """From another folder, by the entry point, as the page has it."""
    home, _ = scored
    entry = f"vlmvqa_vqav2:root={data.partition('=')[2]},max_instances=20,model=vlmvqa/learned"
    options = ["--local-path", str(home / "prod_env"), "--suite", "mine", "--max-eval-instances", "20"]
    command = [str(Path(sys.executable).with_name("helm-run")), "--run-entries", entry, *options]
    environment = os.environ | {"NLTK_DATA": str(home / "nltk_data")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(list((tmp_path / "benchmark_output" / "runs" / "mine").glob("*/per_instance_stats.json"))) == 1
