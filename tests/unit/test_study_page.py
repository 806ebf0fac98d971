"""The page of a study shows its arms, and is safe and complete although parts of the runs are missing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser import chromium
from tests.unit.test_report import HOSTILE, Page
from tests.unit.test_report_browser import WIDER
from vlmvqa.extras.study.report_page import write_page
from vlmvqa.extras.study.results import read_run, summarize
from vlmvqa.extras.study.settings import StudySettings

__all__ = ["chromium"]  # a fixture


def write_run(folder: Path, right: float, seed: int, questions: int = 40, **changes: Any) -> None:
    """Write a finished run whose answers are right with this probability."""
    folder.mkdir(parents=True)
    generator = random.Random(f"{folder.parent.name} {seed}")
    lines = []
    for number in range(questions):
        score = 100.0 * (generator.random() < right)
        record = {
            "question_id": number,
            "image_id": f"{number // 2}.png",
            "question": f"Which color is shape {number}?",
            "answer": "red" if score else "blue",
            "log_probability": -0.1,
            "answers": ["red"],
            "vqa_accuracy": score,
        }
        lines.append(record | changes)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    metrics = {
        "metric": "vqa_accuracy",
        "metrics": {"vqa_accuracy": {"overall": 100 * right}},
        "controls": {"prior": {"overall": 30.0}},
        "split": "val",
        "max_samples": None,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def write_log(folder: Path, loss: float, cost: float, steps: int = 100) -> None:
    """Write the log of a training of four epochs with five evaluations."""
    lines: list[dict[str, Any]] = []
    for step in range(5, steps + 1, 5):
        done = {"step": step, "epoch": 4 * step / steps}
        speed = {"questions_per_second": 70.0, "tera_flop": cost, "peak_memory_gib": 1.0, "peak_rss_gib": 1.0}
        lines.append(done | {"loss": loss + 4 * math.exp(-step / 20)} | speed)
        if step % 20 == 0:
            lines.append(done | {"eval_vqa_accuracy": 60 - 40 * math.exp(-step / 40)})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_data(folder: Path) -> Path:
    """Write 20 images with two questions each, for training and for evaluation."""
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (60, 40), (8 * number, 90, 40)).save(folder / f"{number}.png")
    for split in ("train", "val"):
        lines = (
            {
                "image": f"{number // 2}.png",
                "question": f"Which color is shape {number}?",
                "answers": ["red"],
                "id": number,
            }
            for number in range(40)
        )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def page_of(folder: Path, arms: Mapping[str, list[str]], failed: Mapping[str, str] | None = None) -> tuple[str, Page]:
    """Write the page of the runs in a folder, `arms` with their settings, and return it."""
    study = StudySettings(
        title="Colors & shapes",
        motivation="Which arm sees colors?",
        arms=arms,
        baseline=next(iter(arms)),
        published=[{"finding": "More is better", "source": "Someone 2024"}],
    )
    results = {arm: {run.name[5:]: read_run(run) for run in sorted((folder / arm).glob("seed-*"))} for arm in arms}
    found = json.loads(json.dumps(summarize(study, results, failed or {}, folder)))
    write_page(found, results, folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def write_study(folder: Path, arms: Mapping[str, float], seeds: int = 3) -> dict[str, list[str]]:
    """Write runs of a study with logs and data; return the settings of the arms."""
    data = write_data(folder / "data")
    for number, (arm, right) in enumerate(arms.items()):
        for seed in range(seeds):
            run = folder / arm / f"seed-{seed}"
            write_run(run, right, seed)
            write_log(run, 0.3 + 0.1 * number + 0.02 * seed, 1 + 0.3 * number)
            (run / "config.yaml").write_text(f"data: {{source: jsonl, root: {data}, prompt: '{{question}}'}}\n")
    return {arm: [f"model.kind={arm}"] for arm in arms}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    folder = tmp_path_factory.mktemp("study")
    arms = write_study(folder, {"plain": 0.4, "large": 0.9, "small": 0.3})
    (folder / "large" / "seed-1" / "report.html").write_text("the run's")
    return folder, *page_of(folder, arms, {"small/seed-3": "out of memory"})


def test_a_page_has_tables_findings_and_failed_runs(study: tuple[Path, str, Page]) -> None:
    _, _, page = study
    for text in (
        "Colors & shapes",
        "Which arm sees colors?",
        "arm seeds VQA accuracy (%) difference 95 % interval p (Holm) detectable plain 3",
        "arm majority shuffled trained steps TFLOP questions/s peak GiB plain 30.00 - - 100 20 70 -",
        "large: no difference detected",
        "small/seed-3 failed or is missing: out of memory",
        "More is better (Someone 2024)",
        "large model.kind=large",
    ):
        assert text in page.text, text
    assert [value for name, value in page.attributes if name == "href"][-1] == "large/seed-1/report.html"


def test_curves_are_over_questions_and_operations(study: tuple[Path, str, Page]) -> None:
    """160 questions in four epochs; loss and score after the last step, the mean of three seeds."""
    _, html, page = study
    texts = [value for name, value in page.attributes if name == "aria-label"]
    assert texts[1].startswith("Differences: large +") and texts[1].count(" to ") == 2
    assert texts[2] == "Training loss by questions seen; at the end: plain 0.347, large 0.447, small 0.547"
    assert texts[3] == "VQA accuracy (%) by questions seen; at the end: plain 56.7, large 56.7, small 56.7"
    assert texts[4].startswith("VQA accuracy (%) by training cost") and len(texts) == 5
    assert ">160<" in html and ">30T<" in html  # labels of the x axes
    assert "lowest to the highest seed" in page.text


def test_the_answers_that_differ_are_shown_with_their_images(study: tuple[Path, str, Page]) -> None:
    folder, _, page = study
    runs = [read_run(folder / arm / "seed-0").records for arm in ("plain", "large", "small")]
    different = [number for number in runs[0] if len({records[number]["answer"] for records in runs}) > 1]
    assert f"answer {len(different)} differently, and {len(different)} with different scores" in page.text
    assert page.tags.count("article") == 12
    images = [value for name, value in page.attributes if name == "src"]
    assert len(images) == 12 and all(image.startswith("data:image/jpeg") for image in images)
    number = next(number for number in different if f"shape {number}?" in page.text)
    plain, large, small = (f"{one[number]['answer']} {one[number]['vqa_accuracy']:.0f}" for one in runs)
    shown = f"Which color is shape {number}? References: red Arm Answer Score plain {plain} large {large} small {small}"
    assert shown in page.text


def test_runs_without_log_data_or_different_answers(tmp_path: Path) -> None:
    """Only the first arm has a log, whose training data is gone: its curves are over epochs."""
    for arm in ("first", "second"):
        write_run(tmp_path / arm / "seed-0", 0.5, 0, answer="red", vqa_accuracy=100.0)
    write_log(tmp_path / "first" / "seed-0", 0.2, 1.0)
    _, page = page_of(tmp_path, {"first": [], "second": []})
    texts = [value for name, value in page.attributes if name == "aria-label"]
    assert "Training loss by epochs; at the end: first 0.227" in texts
    assert "answer 0 differently" in page.text and "article" not in page.tags
    (tmp_path / "first" / "seed-0" / "log.jsonl").unlink()
    _, page = page_of(tmp_path, {"first": []})
    assert "Training" not in page.text and "first 1 100.00 baseline" in page.text


def test_an_arm_without_images_has_cards_without_them(tmp_path: Path) -> None:
    for arm, answer in {"first": "red", "second": "blue"}.items():
        write_run(tmp_path / arm / "seed-0", 0.5, 0, answer=answer, vqa_accuracy=0.0)
    _, page = page_of(tmp_path, {"first": [], "second": []})
    assert "answer 40 differently, and 0 with different scores" in page.text
    assert page.text.count("no image") == page.tags.count("article") == 12


def test_all_text_is_escaped(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "|") + " $x$"
    arms = {"plain": [HOSTILE], name: [HOSTILE]}
    for arm in arms:
        write_run(tmp_path / arm / "seed-0", 0.5, 0, answer=HOSTILE + arm, question=HOSTILE, answers=[HOSTILE])
        write_log(tmp_path / arm / "seed-0", 0.2, 1.0)
    _, page = page_of(tmp_path, arms, {HOSTILE: HOSTILE})
    assert "script" not in page.tags and "img" not in page.tags and page.text.count("<script>") > 30
    assert all(not name.startswith("on") for name, _ in page.attributes)


def test_a_page_of_many_arms_fits_and_needs_nothing(chromium: Any, tmp_path: Path) -> None:
    arms = write_study(tmp_path, {f"an_arm_with_a_long_name_{number}": number / 10 for number in range(10)}, seeds=1)
    page_of(tmp_path, arms)
    for width, colors in ((390, "light"), (1280, "dark")):
        with chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=colors) as context:
            page = context.new_page()
            said: list[str] = []
            asked: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("request", lambda one, asked=asked: asked.append(one.url))
            page.goto((tmp_path / "report.html").as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth") == width and page.evaluate(WIDER) == []
            assert said == [] and [url for url in asked if not url.startswith("data:image/jpeg")] == [page.url]
