"""launch/serve.py: the page in a real browser, the API under load, and shutdown."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from bench import clock, serving
from tests import forks
from tests.browser import chromium
from tests.conftest import ROOT
from tests.end_to_end.scripts import SMALL, call, command, done, predictions, sentence
from tests.pretrained import picture
from tests.serving import image_file, numbered_image, vlm_predictor
from vlmvqa.errors import InputError
from vlmvqa.extras.report.scored_data import scored_examples
from vlmvqa.extras.serving import run as serve_run
from vlmvqa.extras.serving.limits import Limits
from vlmvqa.extras.synthetic import vqav2 as synthetic_vqav2
from vlmvqa.inference.predictor import Predictor, load

__all__ = ["chromium"]  # a fixture

DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
DECODING = "decoding.max_new_tokens=3"
SPINS = """() => getComputedStyle(document.querySelector("#answers section > div"), "::after").animationName == "turn"
"""
PROBABILITIES = {True: 0.95, False: 0.3}  # of right and wrong answers in the run


@dataclass(frozen=True)
class Server:
    """A running server and what it serves."""

    url: str
    run: Path
    other: Path
    folder: Path
    models: dict[str, Predictor]

    def answers(self, which: str, image: Image.Image | Path, *questions: str) -> list[str]:
        """Return the answers of one of its models, outside the server."""
        return [answer.text for answer in self.models[which].answer(image, list(questions))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a scored run whose answers are replaced: every third is right."""
    folder = tmp_path_factory.mktemp("served")
    data = synthetic_vqav2.write(folder / "data", train_images=6, val_images=8, questions_per_image=4)
    done(call("train", "data=vqav2", f"data.root={data}", f"run.dir={folder / 'run'}", DECODING, *SMALL))
    records = predictions(folder / "run")
    for number, record in enumerate(records):
        right = number % 3 == 0
        record |= {"answer": record["target"] if right else f"no {number}", "vqa_accuracy": 100.0 * right}
        record["log_probability"] = math.log(PROBABILITIES[right])
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / "run" / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "run"


@contextmanager
def started(*given: str, **environment: str) -> Iterator[str]:
    """Start launch/serve.py on a free port and yield its URL; stop it with Ctrl-C."""
    process = forks.script(command("serve", *given, "port=0", DECODING)[1:], **environment)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", process.printed())):
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.05)
        with httpx.Client() as page:  # whose connection stays open
            page.get(found[0])
            yield found[0]
            process.send_signal(signal.SIGINT)
            process.wait(60)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert out.endswith("stopped\n") and err == ""


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    """Start a server whose queue sixteen clients fill."""
    other, folder = run.parent / "other", run.parent / "serve"
    vlm_predictor().save(other)
    assert "python launch/serve.py checkpoint=runs/demo\n" in (ROOT / "README.md").read_text()
    models = {"first": load(run, "cpu"), "second": load(other, "cpu")}
    for model in models.values():
        model.decoding = type(model.decoding)(max_new_tokens=3)
    given = (f"checkpoint={run}", f"compare={other}", f"run.dir={folder}")
    with started(*given, "limits.queue=6", "limits.max_batch=6") as url:
        yield Server(url, run, other, folder, models)
    assert not folder.exists()


# --- the API -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_requests_from_sixteen_clients(server: Server) -> None:
    """No request is lost or mixed up; clients that find the queue full get 503 and retry."""
    numbers = range(200)
    statuses: Counter[int] = Counter()
    answered = threading.Condition()

    def ask(number: int) -> list[str]:
        form = [("image", ("x", numbered_image(number))), ("question", (None, f"what is number {number}?"))]
        form += [("question", (None, "how many?"))] * (number % 2)
        while True:
            seen = statuses[200]
            answer = client.post("/answer", files=form)
            with answered:
                statuses[answer.status_code] += 1
                answered.notify_all()
                if answer.status_code != 503:
                    return [one["text"] for one in answer.json()["answers"]]
                assert answer.headers["retry-after"] == "1"
                answered.wait_for(lambda seen=seen: statuses[200] > seen)

    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(16) as clients:
        found = list(clients.map(ask, numbers))
    assert statuses.keys() <= {200, 503} and statuses[200] == 200 and statuses[503] > 0
    for number in numbers:
        questions = [f"what is number {number}?", "how many?"][: 1 + number % 2]
        assert found[number] == server.answers("first", picture(number), *questions), number
    assert len({text for texts in found for text in texts}) > 4


def test_the_benchmark_sends_both_servers_the_same_requests(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both servers are the same one here."""
    monkeypatch.setattr(clock, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(clock, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(serving, "server", lambda *_: nullcontext(int(server.url.rpartition(":")[2])))
    small = ("--clients", "1", "4", "--requests", "12", "--repeats", "1", "--out", str(tmp_path / "out.json"))
    rows = serving.main(small)
    assert [(row["clients"], row["name"]) for row in rows] == [(n, name) for n in (1, 4) for name in serving.SERVERS]
    for row in rows:
        assert row["equal_answers"] == 12 and row["requests_per_second"] > 0
        assert 0 < row["p50_seconds"] <= row["p95_seconds"]
    assert rows[0]["to_one_at_a_time"] == rows[2]["to_one_at_a_time"] == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == rows and {"fastapi", "uvicorn", "device", "date"} <= written["machine"].keys()
    assert "| 4 clients, micro-batched" in capsys.readouterr().out


def test_the_examples_of_the_docs(server: Server, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "photo.jpg")
    """Those of OpenAI's API: test_serve_openai.py."""
    page = (ROOT / "docs" / "serving.md").read_text().partition("## OpenAI's API")[0]
    page = page.replace("http://127.0.0.1:7860", server.url)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    (text,) = server.answers("first", tmp_path / "photo.jpg", "What color is the circle?")
    assert printed.startswith(f"{text} ")
    (curl,) = re.findall(r"^curl .*$", page, re.MULTILINE)
    if shutil.which("curl"):
        printed = subprocess.run(shlex.split(curl), cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert [one["question"] for one in json.loads(printed)["answers"]] == ["What color is the circle?", "How many?"]


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(chromium: Any, server: Server) -> Iterator[Any]:
    """Open the page; check that it loads nothing from other hosts and logs no errors but those of refused requests."""
    page = chromium.new_page(viewport=DESKTOP)
    requested: list[str] = []
    failed: list[str] = []
    page.on("request", lambda one: requested.append(one.url))
    page.on("pageerror", lambda one: failed.append(str(one)))
    page.on("console", lambda one: failed.append(one.text) if one.type in ("error", "warning") else None)
    page.goto(server.url)
    page.locator("#drop").wait_for()
    yield page
    page.close()
    assert not [text for text in failed if "Failed to load resource" not in text]
    local = (f"{server.url}/", "data:", f"blob:{server.url}/")
    assert requested and all(url.startswith(local) for url in requested), requested


def choose(page: Any, file: Path) -> None:
    page.set_input_files("#drop input", file)
    page.locator("#drop img").wait_for()


def ask(page: Any, *questions: str) -> None:
    page.fill("#questions textarea", "\n".join(questions))
    page.get_by_role("button", name="Ask").click()


def texts(cards: Any) -> list[str]:
    """Return the answers on cards, without their probabilities."""
    return cards.locator(".answer").evaluate_all("found => found.map(one => one.firstChild.textContent)")


def fits(page: Any) -> bool:
    """Return whether the page fits without horizontal scrolling."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("photos") / "photo.png"
    file.write_bytes(image_file(picture(7, (300, 200))))
    return file


def test_ask(page: Any, server: Server, photo: Path) -> None:
    """Choose an image, ask two questions, read answers and attribution maps, then change the method."""
    questions = ["What color is it?", "How many <b>{{dogs}}</b> ${1 + 1} `are` there?"]
    choose(page, photo)
    held: list[Any] = []
    page.route("**/answer", lambda route: held.append(route), times=1)
    ask(page, *questions)
    page.wait_for_function(SPINS)
    held[0].continue_()
    cards = page.locator("#answers article")
    cards.nth(1).wait_for()
    assert cards.locator(".small").all_inner_texts() == questions
    assert texts(cards) == [text or "(no word)" for text in server.answers("first", photo, *questions)]
    assert page.locator("h1").inner_text() == "vlmvqa" and str(server.run) in page.locator("header").inner_text()
    assert page.locator("h2:visible").count() == 0  # the name of the only model that answers
    assert "%" in cards.first.locator(".answer small").inner_text()
    assert cards.first.locator(".bar").count() >= 2
    shown = cards.first.locator("figure img")
    assert shown.evaluate("one => one.decode().then(() => one.naturalWidth)") == 512
    assert cards.first.locator(".legend").inner_text().split() == ["low", "high"]
    assert fits(page)
    before = shown.get_attribute("src")
    page.get_by_label("Attribution map").select_option("Gradient")
    changed = "before => ![before, undefined].includes(document.querySelector('#answers figure img')?.src)"
    page.wait_for_function(changed, arg=before)
    assert "Gradient map" in cards.first.locator("figcaption").inner_text()
    page.get_by_label("Attribution map").select_option("Off")
    page.locator("#answers figure").first.wait_for(state="detached")
    assert cards.count() == 2


def test_the_cards(page: Any, photo: Path) -> None:
    """Alternatives are sorted by probability, the answer among them; empty and truncated answers are marked."""
    answer = {"question": "what?", "text": "dog", "probability": 0.2, "truncated": True, "attribution": None}
    answer["alternatives"] = [{"text": text, "probability": p} for text, p in (("cat", 0.5), ("", 0.0004))]
    empty = answer | {"text": "", "probability": 1.0, "truncated": False, "alternatives": []}
    page.route("**/answer", lambda route: route.fulfill(json={"model": "m", "answers": [answer, empty]}))
    choose(page, photo)
    ask(page, "what?")
    cards = page.locator("#answers article")
    cards.nth(1).wait_for()
    assert cards.nth(0).locator(".answer").inner_text() == "dog20.0 % (truncated at max_new_tokens)"
    assert cards.nth(0).locator(".bar").all_inner_texts() == ["cat\n50.0 %", "dog\n20.0 %", "(no word)\n< 0.1 %"]
    assert cards.nth(0).locator(".best").inner_text() == "dog\n20.0 %"
    assert cards.nth(1).inner_text().split("\n")[-1].strip() == "(no word)99.9 %"


def test_examples_and_error_messages(page: Any, server: Server, tmp_path: Path) -> None:
    ask(page)
    page.get_by_text("Drop an image first, or pick an example.").wait_for()
    examples = page.locator("#examples button")
    assert examples.count() == 6
    examples.nth(2).click()
    page.locator("#drop img").wait_for()
    ask(page)
    page.get_by_text("Write a question about the image, one per line.").wait_for()
    ask(page, "x" * 501)
    page.get_by_text("Question 1 has 501 characters; use at most 500.").wait_for()
    (tmp_path / "a.png").write_text("text")
    page.set_input_files("#drop input", tmp_path / "a.png")
    page.get_by_text("This is not an image in a supported format; send JPEG, PNG, WEBP, GIF, BMP.").wait_for()
    (tmp_path / "b.png").write_bytes(numbered_image(1) + bytes(10_000_001))
    page.set_input_files("#drop input", tmp_path / "b.png")
    page.get_by_text("The image has over 10 MB; scale it down, or save it as a JPEG.").wait_for()
    page.route("**/answer", lambda route: route.abort())
    ask(page, "what?")
    page.get_by_text("The server cannot be reached.").wait_for()


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_images_are_dropped_and_pasted(page: Any, how: str) -> None:
    """By events as the browser sends them, with a file in their data."""
    page.evaluate(
        """async ([how, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            const event = how === "drop" ? new DragEvent("drop", options) : new ClipboardEvent("paste", options);
            document.body.dispatchEvent(event);
        }""",
        [how, list(numbered_image(3))],
    )
    page.wait_for_function("document.querySelector('#drop img')?.naturalWidth > 0")


def test_a_new_request_replaces_the_one_before(page: Any, photo: Path) -> None:
    held: list[Any] = []
    page.route("**/answer", lambda route: held.append(route), times=1)
    choose(page, photo)
    ask(page, "the first?")
    page.wait_for_function(SPINS)
    ask(page, "the second?")
    page.locator("#answers article").wait_for()
    assert page.locator("#answers .small").all_inner_texts() == ["the second?"] and held


def test_browse(page: Any, server: Server) -> None:
    records = predictions(server.run)
    right = [record for record in records if record["vqa_accuracy"] >= 50]
    kind, number = Counter(record["question_type"] for record in records).most_common(1)[0]
    tiles = page.locator("#browsed article")

    def counted(expected: int) -> None:
        page.get_by_text(f"of {expected} answers").wait_for()

    page.get_by_role("link", name="Browse").click()
    counted(len(records))
    page.get_by_text(f"1 to 12 of {len(records)} answers").wait_for()
    assert tiles.count() == 12
    assert tiles.first.locator("img").evaluate("one => one.decode().then(() => one.naturalWidth)") > 0
    assert fits(page) and page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    page.get_by_text(f"13 to 24 of {len(records)} answers").wait_for()
    assert tiles.first.locator(".small").first.inner_text() == records[12]["question"]
    page.get_by_role("button", name="Previous").click()
    page.get_by_text(f"1 to 12 of {len(records)} answers").wait_for()
    page.get_by_label("Answers").select_option("right")
    counted(len(right))
    assert set(tiles.locator(".right, .wrong").all_inner_texts()) == {"right"}
    page.get_by_label("Confidence").select_option("under 50 %")
    page.get_by_text("No answer passes these filters.").wait_for()
    page.get_by_label("Answers").select_option("wrong")
    counted(len(records) - len(right))
    page.get_by_label("Answers").select_option("all")
    page.get_by_label("Confidence").select_option("any")
    counted(len(records))
    page.get_by_label("Question type").select_option(kind)
    counted(number)


def test_compare(page: Any, server: Server, photo: Path) -> None:
    page.get_by_role("link", name="Compare").click()
    choose(page, photo)
    ask(page, "What is it?")
    columns = page.locator("#answers section")
    columns.nth(0).locator("article").wait_for()
    columns.nth(1).locator("article").wait_for()
    assert columns.locator("h2").all_inner_texts() == [str(server.run), str(server.other)]
    for number, which in enumerate(("first", "second")):
        (answer,) = server.answers(which, photo, "What is it?")
        assert texts(columns.nth(number)) == [answer or "(no word)"]
    assert fits(page)


def test_on_a_phone(page: Any, photo: Path) -> None:
    page.set_viewport_size(PHONE)
    for tab in ("Browse", "Compare", "Ask"):
        page.get_by_role("link", name=tab, exact=True).click()
        page.locator(f"nav a[aria-current=page]:text-is('{tab}')").wait_for()
        assert fits(page), tab
    choose(page, photo)
    ask(page, "What color is it?", "x" * 200)
    page.locator("#answers figure img").nth(1).wait_for()
    assert fits(page)
    card, figure = (page.locator(f"#answers {one}").first.bounding_box() for one in ("article", "figure"))
    text = page.locator("#answers article > div").first.bounding_box()
    assert figure["width"] > 0.8 * card["width"] and figure["y"] > text["y"] + text["height"] - 1


@pytest.mark.slow
def test_signing_in(chromium: Any, run: Path, tmp_path: Path, photo: Path) -> None:
    given = (f"checkpoint={run}", f"run.dir={tmp_path}")
    password = {"username": "anyone", "password": "a long secret"}
    with (
        started(*given, VLMVQA_TOKEN="a long secret") as url,
        chromium.new_context(viewport=PHONE, http_credentials=password) as context,
    ):
        assert httpx.get(url).status_code == 401
        page = context.new_page()
        page.goto(url)
        page.get_by_role("link", name="Compare").click()
        page.get_by_text("One model is served.").wait_for()
        page.get_by_role("link", name="Ask").click()
        choose(page, photo)
        ask(page, "What is it?")
        page.locator("#answers article").wait_for()


# --- startup errors ------------------------------------------------------------------------------------------------


def test_startup_errors(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (f"checkpoint={run}", f"run.dir={tmp_path}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is already in use" in sentence(call("serve", *given, f"port={port}"))
    assert "there is no token" in sentence(call("serve", *given, "host=0.0.0.0"))
    assert "browse=nowhere does not exist" in sentence(call("serve", *given, "browse=nowhere"))
    assert f"{tmp_path} has no predictions.jsonl; score" in sentence(call("serve", *given, f"browse={tmp_path}"))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'vlmvqa[demo]'" in sentence(call("serve", *given))


def test_bad_example_images_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    good = numbered_image(1)
    assert serve_run._accepted([image_file(picture(0), "TIFF"), good, good[:200]], Limits()) == [good]
    printed = capsys.readouterr().out
    assert printed.count("an example is skipped: ") == 2


def test_a_run_whose_dataset_is_missing_is_browsed_without_images(tmp_path: Path, run: Path) -> None:
    """The synthetic dataset is not generated again."""
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(run.parent / "data"), str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="nowhere does not exist"):
        scored_examples(moved)
    assert not (tmp_path / "nowhere").exists()
