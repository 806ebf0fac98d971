"""The report is one safe, self-contained page that shows the run's numbers even if parts are missing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmvqa.data.example import Example
from vlmvqa.extras.report import gallery
from vlmvqa.extras.report.gallery import choose_gallery
from vlmvqa.extras.report.run_report import write_run_report

HOSTILE = "<script>alert(\"1\")</script><img src=x onerror=alert(2)> & 'so on'"


class Page(HTMLParser):
    """Tags, visible text, and every attribute value of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += " " * (self.text[-1:] not in ("", " ")) + " ".join(data.split())


def record(number: int, accuracy: float = 100.0, **changes: Any) -> dict[str, Any]:
    return {
        "question_id": number,
        "image_id": number // 2,
        "question": "What color is the bus?",
        "answer": "red",
        "log_probability": -0.1,
        "target": "red",
        "answers": ["red"] * 7 + ["dark red"] * 3,
        "question_type": "what color is the" if number % 3 else "is the",
        "answer_type": "other" if number % 3 else "yes/no",
        "vqa_accuracy": accuracy,
    } | changes


def sample(step: int, **changes: Any) -> dict[str, Any]:
    """Return a record of `samples.jsonl`."""
    return {
        "step": step,
        "task": "",
        "question_id": 7,
        "image_id": 3,
        "question": "Is it open?",
        "answer": "no",
        "log_probability": -0.5,
        "score": 0.0,
        "answers": ["yes"] * 10,
    } | changes


def scores(overall: float, answer_type: Mapping[str, float], question_type: Mapping[str, float]) -> dict[str, Any]:
    """Return scores in the format of `metrics.json`, with the question counts in `N`."""
    found: dict[str, Any] = {"overall": overall, "interval": [overall - 1, overall + 1]}
    for table, values in (("answer_type", answer_type), ("question_type", question_type)):
        found |= {f"per_{table}": dict(values), f"n_per_{table}": {name: N.get(name, 2) for name in values}}
    return found


N = {"yes/no": 10, "other": 20, "is the": 10, "what color is the": 20}
MODEL = scores(71.24, {"yes/no": 88.12, "other": 61.07}, {"is the": 87.5, "what color is the": 64.31})
PRIOR = scores(38.51, {"yes/no": 62.02, "other": 20.3}, {"is the": 61.99})
SHUFFLED = scores(45.07, {"yes/no": 63.4, "other": 31.41}, {"is the": 60.12, "what color is the": 33.33})
METRICS = {
    "n": 30,
    "unit": "question",
    "variants": {},
    "metric": "vqa_accuracy",
    "metrics": {"vqa_accuracy": MODEL},
    "controls": {"prior": PRIOR, "shuffled_images": SHUFFLED},
    "prompt": "{question} Answer shortly.",
    "split": "minival",
    "decoding": {"method": "greedy", "max_new_tokens": 16},
    "metric_version": "official script of 2021",
    "checkpoint": None,
}
LOG = [
    {"step": step, "loss": 3 / step, "learning_rate": 6e-4, "grad_norm": 1.2, "questions_per_second": 300.0}
    for step in range(10, 1000, 10)
] + [{"step": step, "eval_vqa_accuracy": 50 + step / 100} for step in (500, 1000)]


def write(folder: Path, **changes: Any) -> tuple[str, Page]:
    given: dict[str, Any] = {
        "title": "A run",
        "metrics": METRICS,
        "log": LOG,
        "samples": [],
        "predictions": [record(number, accuracy=30.0 * (number % 4)) for number in range(30)],
        "images": {},
        "config_yaml": "seed: 0\n",
        "attributions": (),
    } | changes
    run = folder / "runs"
    run.mkdir(parents=True, exist_ok=True)
    for name, records in {"log.jsonl": given["log"], "samples.jsonl": given["samples"]}.items():
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    examples = [Example(image, image_id, ()) for image_id, image in given["images"].items()]
    title, config, metrics, predictions = (given[key] for key in ("title", "config_yaml", "metrics", "predictions"))
    write_run_report(run, "", title, config, metrics, predictions, examples, given["attributions"])
    html = (folder / "runs" / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_scores_are_shown_with_their_controls(tmp_path: Path) -> None:
    _, page = write(tmp_path)
    assert "71.24 % VQA accuracy on 30 questions 95 % interval 70.24 to 72.24, over images" in page.text
    assert "This model 71.24 Shuffled images 45.07" in page.text
    assert "Majority baseline 38.51" in page.text
    assert "n model shuffled majority other 20 61.07 31.41 20.30 yes/no 10 88.12 63.40 62.02" in page.text
    assert "what color is the 20 64.31 33.33 \u2013 is the 10 87.50 60.12 61.99" in page.text


def test_says_what_the_numbers_were_measured_with(tmp_path: Path) -> None:
    _, page = write(tmp_path)
    assert "prompt {question} Answer shortly. split minival decoding method greedy, max_new_tokens 16" in page.text
    assert "metric version official script of 2021 checkpoint none" in page.text
    assert "seed: 0" in page.text


def test_a_control_without_a_number_gives_its_reason(tmp_path: Path) -> None:
    controls = {"prior": {"overall": None, "reason": "the training split has no answers"}, "shuffled_images": None}
    _, page = write(tmp_path, metrics=METRICS | {"controls": controls})
    assert "Shuffled images none: not measured Majority baseline none: the training split has no answers" in page.text
    assert "n model other 20 61.07 yes/no 10 88.12" in page.text


def test_a_split_without_answers_has_no_accuracy_and_says_why(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"overall": None, "interval": None, "reason": "the split has no answers"}
    metrics = METRICS | {"n": 1, "metrics": {"vqa_accuracy": nothing}, "controls": {}}
    unscored = [record(1, answers=[], target=None, question_type=None, answer_type=None) | {"vqa_accuracy": None}]
    _, page = write(tmp_path, metrics=metrics, predictions=unscored)
    assert "VQA accuracy on 1 question This model none: the split has no answers" in page.text
    assert "table" not in page.tags
    assert "Answered" not in page.text


def test_another_metric_brings_its_own_name_tables_and_numbers(tmp_path: Path) -> None:
    steps = {"per_steps": {"2": 40.0}, "n_per_steps": {"2": 7}}
    numbers = {"gqa_accuracy": {"overall": 61.5, **steps}, "binary": {"overall": 70.25}}
    numbers["validity"] = {"overall": None, "reason": "no choices were given"}
    metrics = METRICS | {
        "n": 1,
        "metric": "gqa_accuracy",
        "metrics": numbers,
        "variants": {"postprocess=llava": 63.0},
    }
    _, page = write(tmp_path, metrics=metrics, predictions=[record(1, gqa_accuracy=100.0)])
    assert "61.50 % GQA accuracy on 1 question" in page.text and "By steps" in page.text and "2 7 40.00" in page.text
    assert "binary 70.25 validity none: no choices were given postprocess=llava 63.00" in page.text


def test_answers_of_unknown_probability(tmp_path: Path) -> None:
    _, page = write(tmp_path, predictions=[record(1, log_probability=None)])
    assert "Answer: red Score: 100 References:" in page.text and "Confidence:" not in page.text


def test_a_long_list_of_skipped_records_is_cut_short(tmp_path: Path) -> None:
    skipped = [{"where": f"{number}.jpg", "problem": "cannot be read"} for number in range(100_000)]
    html, page = write(tmp_path, metrics=METRICS | {"skipped": skipped})
    assert "skipped where 0.jpg, problem cannot be read; where 1.jpg" in page.text
    assert len(html) < 500_000


def test_text_of_data_and_model_is_never_markup(tmp_path: Path) -> None:
    everywhere: dict[str, Any] = dict.fromkeys(
        ("question", "answer", "question_type", "answer_type", "image_id"), HOSTILE
    )
    metrics = METRICS | {
        "metrics": {"vqa_accuracy": scores(1.0, {HOSTILE: 1.0}, {HOSTILE: 1.0})},
        "controls": {"prior": {"overall": None, "reason": HOSTILE}},
        "prompt": HOSTILE,
        HOSTILE: {HOSTILE: HOSTILE},
    }
    html, page = write(
        tmp_path,
        title=HOSTILE,
        metrics=metrics,
        predictions=[record(1, **everywhere, answers=[HOSTILE] * 10)],
        images={HOSTILE: Image.new("RGB", (8, 8))},
        config_yaml=f"prompt: {HOSTILE}",
        samples=[sample(1, question=HOSTILE, answer=HOSTILE, answers=[HOSTILE], image_id=HOSTILE)],
        attributions=[(record(1, **everywhere, answers=[HOSTILE] * 10), Image.new("RGB", (8, 8)))],
    )
    assert "<script" not in html.lower()
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("img") == 4
    assert page.text.count(HOSTILE) >= 15


def test_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    html, page = write(tmp_path, images={number: Image.new("RGB", (20, 10)) for number in range(15)})
    assert "//" not in re.sub(r"base64,[\w+/=]+", "", html)  # no URL
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert sources
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in sources)


def test_curves_are_drawn_and_each_drawing_has_its_own_ids(tmp_path: Path) -> None:
    """Except constant ones, like the peak memory of a process on a CPU."""
    varying = [
        {"grad_norm": 1 + 1 / step, "learning_rate": 1 / step, "questions_per_second": step} for step in (1, 2, 3)
    ]
    log = [{"step": 1 + n, "loss": 1.0, "peak_memory_gib": 1 + n / 1000, **one} for n, one in enumerate(varying)]
    _, page = write(tmp_path, log=log)
    assert page.tags.count("figure") == 5 and "Gradient norm" in page.text and "Peak memory" not in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": float("nan")}], [{"step": 1, "loss": None}]])
def test_no_log_no_curves(tmp_path: Path, log: list[dict[str, Any]]) -> None:
    _, page = write(tmp_path, log=log)
    assert ("id", "training") not in page.attributes
    assert "Training" not in page.text


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    once, _ = write(tmp_path, log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    again, _ = write(tmp_path, log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 1.0}])
    assert once == again


def test_nothing_wrong_and_no_pictures(tmp_path: Path) -> None:
    _, page = write(tmp_path, predictions=[record(number) for number in range(3)])
    assert "Answered wrong None." in page.text
    assert page.text.count("no image") == 3


def test_a_card_shows_question_answer_probability_score_and_counted_references(tmp_path: Path) -> None:
    _, page = write(tmp_path, predictions=[record(1, accuracy=60.0)])
    answer = "Question: What color is the bus? Answer: red Confidence: 0.90 Score: 60"
    assert f"{answer} References: red \u00d77, dark red \u00d73" in page.text


def test_most_cards_of_a_gallery_are_collapsed(tmp_path: Path) -> None:
    html, page = write(
        tmp_path,
        predictions=[record(number, 100.0 * (number % 2)) for number in range(200)],
        samples=[sample(1, question_id=number) for number in range(8)],
        attributions=[(record(number), Image.new("RGB", (8, 8))) for number in range(8)],
    )
    shown = re.sub("<details>.*?</details>", "", html, flags=re.DOTALL)
    assert (html.count("<article"), shown.count("<article")) == (24 + 24 + 8 + 8, 4 + 4 + 2 + 2)
    assert page.text.count("20 more") == 2 and "script" not in page.tags


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode_stay_as_they_were(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (900, 600))
    _, page = write(tmp_path, predictions=[record(0)], images={0: image})
    assert page.tags.count("img") == 1
    assert (image.mode, image.size) == (mode, (900, 600))


def test_large_run_stays_under_five_megabytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    predictions = [record(number, 100.0 * (number % 2), question="why " * 500) for number in range(2000)]
    right, wrong = choose_gallery(predictions, "vqa_accuracy")
    images = {one["image_id"]: Image.fromarray(noise) for one in right + wrong}
    log = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in range(30_000)]
    html, page = write(tmp_path, predictions=predictions, images=images, log=log)
    assert page.tags.count("img") == 48
    assert len(html.encode()) < 5_000_000


def test_gallery_is_drawn_by_seed_and_sorted_by_confidence() -> None:
    predictions = [record(number, 30.0 * (number % 4), log_probability=-float(number % 7)) for number in range(200)]
    right, wrong = choose_gallery(predictions, "vqa_accuracy", most=10, seed=1)
    assert (right, wrong) == choose_gallery(predictions, "vqa_accuracy", most=10, seed=1)
    assert (right, wrong) != choose_gallery(predictions, "vqa_accuracy", most=10, seed=2)
    assert {one["vqa_accuracy"] for one in right} == {60.0, 90.0}
    assert {one["vqa_accuracy"] for one in wrong} == {0.0, 30.0}
    for part in (right, wrong):
        assert len(part) == 10
        assert [one["log_probability"] for one in part] == sorted(
            (one["log_probability"] for one in part), reverse=True
        )


def test_text_that_utf8_cannot_write_does_not_stop_the_report(tmp_path: Path) -> None:
    _, page = write(tmp_path, predictions=[record(1, answer="caf\ud800é")])
    assert "caf?é" in page.text


def test_captions_are_shown_by_halves_because_no_score_means_right() -> None:
    records = [{"cider": float(score), "log_probability": -1.0, "image_id": score} for score in range(100)]
    better, worse = choose_gallery(records, "cider")
    assert min(record["cider"] for record in better) >= 49.5 > max(record["cider"] for record in worse)


def test_confidence_and_confusions_are_shown_as_numbers(tmp_path: Path) -> None:
    given = [record(number, 100.0, log_probability=np.log(0.95)) for number in range(6)]
    given += [record(6 + n, 0.0, log_probability=np.log(0.55), answer="Blue ", target="red") for n in range(3)]
    given += [record(9 + n, 100.0, log_probability=np.log(0.55), answer="blue", target="blue") for n in range(3)]
    _, page = write(tmp_path, predictions=given)
    # Two bins of six: |1 - 0.95| and |0.5 - 0.55|.
    assert "0.050 expected calibration error over 12 answers" in page.text
    assert "0.5 to 0.6 6 0.550 0.500 0.9 to 1.0 6 0.950 1.000" in page.text
    assert "The 2 most frequently expected answers, in 12 of 12 questions" in page.text
    assert "red blue other red 6 3 0 blue 0 3 0" in page.text


def test_answers_are_followed_through_the_training(tmp_path: Path) -> None:
    """The first and the last of many evaluations are shown; the last record of a repeated step counts."""
    samples = [sample(step, answer=f"at {step}") for step in range(100, 2100, 100)]
    samples += [sample(2000, answer="yes", score=100.0, log_probability=-0.01)]
    html, page = write(tmp_path, samples=samples)
    followed = page.text[page.text.index("Is it open?") :]
    columns = "Step Answer Confidence 100 at 100 0.61 500 at 500 0.61"
    assert followed.startswith(f"Is it open? References: yes \u00d710 {columns}")
    assert "2,000 yes 0.99" in followed and "at 2000" not in page.text and "at 200 " not in page.text
    assert html.count('class="wrong-ink">at') == 5 and 'class="right-ink">yes' in html


def test_attributions_or_the_reason_for_none_are_shown(tmp_path: Path) -> None:
    one = record(1, 30.0)
    html, page = write(
        tmp_path, attributions=[(one, Image.new("RGB", (40, 30)))], images={0: Image.new("RGB", (40, 30))}
    )
    maps = page.text[page.text.rindex("Attention maps") :]
    assert (
        "from low (image unchanged) to high (yellow)" in maps
        and f'low<i class="heat" style="background-image: {gallery.HEAT}"' in html
    )
    assert "What color is the bus? Answer: red Confidence: 0.90 Score: 30" in maps
    _, page = write(tmp_path, attributions="no model was loaded, only its answers")
    assert "Attention maps Not shown: no model was loaded, only its answers." in page.text
    assert "Attention maps" not in write(tmp_path)[1].text


def test_answers_without_probabilities_have_no_calibration_and_say_so(tmp_path: Path) -> None:
    _, page = write(tmp_path, predictions=[record(n, log_probability=None) for n in range(4)])
    assert "Confidence Not shown: the answers have no probabilities." in page.text


def test_captions_have_no_right_answers_to_count(tmp_path: Path) -> None:
    captions = [record(n, question="", question_type=None, answer_type=None, cider=10.0 * n) for n in range(8)]
    numbers = {"cider": {"overall": 112.5, "interval": [100.0, 125.0]}, "bleu_4": {"overall": 31.0}}
    metrics = METRICS | {"metric": "cider", "unit": "image", "metrics": numbers}
    _, page = write(tmp_path, predictions=captions, metrics=metrics, samples=[sample(1, question="", score=40.0)])
    assert "112.50 CIDEr (x 100) on 30 images" in page.text and "BLEU-4 31.00" in page.text
    assert "The better half" in page.text and "Answers during training" in page.text
    for absent in ("calibration error", "Confusions", "Answered right", "By type"):
        assert absent not in page.text
