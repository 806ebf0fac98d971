"""The report in a browser: nothing wider than the screen, no request, no console message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import chromium
from tests.unit.test_report import HOSTILE, METRICS, PRIOR, SHUFFLED, record, sample, scores, write

__all__ = ["chromium"]  # a fixture

CUT = "() => [...document.querySelectorAll('.types td.number')].filter(one => one.scrollWidth > one.clientWidth).length"
LONG = "pneumonoultramicroscopicsilicovolcanoconiosis" * 6  # a word that no line can hold
SCROLLED = (
    "() => [...document.querySelectorAll('.scroll, pre')].filter(one => one.scrollWidth > one.clientWidth).length"
)
LINES = """() => [...document.querySelectorAll(".matrix thead span")]
    .map(one => one.getBoundingClientRect().width / parseFloat(getComputedStyle(one).lineHeight))"""
WIDER = """() => [...document.querySelectorAll("body *")]
    .filter(one => !one.closest(".scroll, pre") && one.getBoundingClientRect().right > innerWidth + 1)
    .map(one => one.tagName + " " + one.className)"""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all sections, each with overlong text."""
    folder = tmp_path_factory.mktemp("report")
    kinds = {f"{LONG} {n}": float(n) for n in range(30)}
    model = scores(71.2, {"yes/no": 88.1, LONG: 61.0}, kinds)
    model |= {"interval_per_answer_type": {"yes/no": [100.0, 100.0], LONG: [0.0, 9.9]}}
    metrics = METRICS | {
        "metrics": {"vqa_accuracy": model, "helm_bleu_1": {"overall": 50.0}, LONG: {"overall": None, "reason": LONG}},
        "controls": {"prior": PRIOR, "shuffled_images": SHUFFLED, "blank_images": SHUFFLED},
        "checkpoint": LONG,
    }
    predictions = [
        record(n, 30.0 * (n % 4), answer=f"{LONG}{n % 9}", target=f"{LONG}{n % 8}", answers=[LONG, "a b", HOSTILE])
        for n in range(90)
    ]
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    images = {n: Image.fromarray(noise) for n in range(45)}
    samples = [
        sample(step, question_id=n, question=LONG, answer=LONG[: 9 * n])
        for step in range(100, 900, 100)
        for n in range(8)
    ]
    write(
        folder,
        title=LONG,
        metrics=metrics,
        predictions=predictions,
        images=images,
        samples=samples,
        attributions=[(one, Image.fromarray(noise)) for one in predictions[:8]],
        config_yaml=f"prompt: {LONG * 9}",
    )
    return folder / "runs" / "report.html"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a split without answers, where nothing was trained."""
    nothing: dict[str, Any] = {"overall": None, "interval": None, "reason": "the split has no answers"}
    folder = tmp_path_factory.mktemp("bare")
    unscored = [record(1, answers=[], target=None) | {"vqa_accuracy": None}]
    write(folder, metrics=METRICS | {"metrics": {"vqa_accuracy": nothing}}, log=[], predictions=unscored)
    return folder / "runs" / "report.html"


@pytest.mark.parametrize("colors", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("report", ["full", "bare"])
def test_a_page_fits_and_needs_nothing(
    chromium: Any, request: pytest.FixtureRequest, report: str, width: int, colors: str
) -> None:
    path: Path = request.getfixturevalue(report)
    with chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=colors) as context:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda one: asked.append(one.url))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(WIDER) == [] and page.evaluate(CUT) == 0
        assert said == []
        assert [url for url in asked if not url.startswith("data:image/jpeg")] == [path.as_uri()]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, background.removeprefix("rgb(").rstrip(")").split(",")))
        assert (brightness < 150) == (colors == "dark")
        if report == "full":  # links lead somewhere, and pictures are pictures
            targets = page.eval_on_selector_all("nav a", "all => all.map(one => one.getAttribute('href'))")
            assert len(targets) == 9 and all(page.locator(target).count() == 1 for target in targets)
            sizes = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
            assert len(sizes) >= 48 and min(sizes) > 0


def test_a_phone_shows_a_short_page_in_which_nothing_scrolls_sideways(chromium: Any, tmp_path: Path) -> None:
    kinds = [*("yes", "no", "bottom right", "triangle", "rectangle", "yellow", "purple", "grey"), *"1234"]
    predictions = [record(n, answer=kinds[n % 12], target=kinds[n % 12 if n % 9 else n % 5]) for n in range(1800)]
    predictions += [record(n, 0.0) for n in range(1800, 1900)]
    picture = Image.new("RGB", (64, 48))
    write(
        tmp_path,
        predictions=predictions,
        images=dict.fromkeys(range(950), picture),
        samples=[sample(step, question_id=n) for step in range(100, 900, 100) for n in range(8)],
        attributions=[(one, picture) for one in predictions[:8]],
    )
    with chromium.new_context(viewport={"width": 390, "height": 844}) as context:
        page = context.new_page()
        page.goto((tmp_path / "runs" / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollHeight") < 8500
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollHeight") > 12_000
        assert page.evaluate(SCROLLED) == 0
        broken = page.evaluate(LINES)
        assert len(broken) == 13 and max(broken) < 1.5  # lines of a rotated header: no word is broken
