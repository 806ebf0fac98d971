"""HTML report of a scored run: scores with their controls, training curves, and sampled answers.

One self-contained HTML file, images and plots included, which can be mailed, archived and opened offline. The template
escapes all text from the dataset and the model. Empty sections are left out, with the reason where it is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from vlmvqa.data import images
from vlmvqa.data.example import Example
from vlmvqa.errors import InputError
from vlmvqa.extras.report import curves, gallery
from vlmvqa.extras.report.attribution import attribute, draw
from vlmvqa.extras.report.calibration import calibrate
from vlmvqa.extras.report.confusion import confusion_matrix
from vlmvqa.extras.report.gallery import Record, choose_gallery, evenly
from vlmvqa.extras.report.templates import template
from vlmvqa.extras.stages.log import join, stage_logs
from vlmvqa.extras.vision.several_images import refuse_several_images
from vlmvqa.inference.baselines import CONTROLS
from vlmvqa.inference.predictor import Predictor
from vlmvqa.metrics.registry import metric
from vlmvqa.ranks import bar
from vlmvqa.training.log import SAMPLES, read_log

UNFOLDED_ROWS, MAX_ROWS = 12, 80  # VQAv2 has 65 question types

NAMES = {**{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}, "rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE"}
SHOWN_ELSEWHERE = ("unit", "metric", "metrics", "controls", "variants")
CURVES = {  # in addition to the loss
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "questions_per_second": "Questions per second",
    "peak_memory_gib": "Peak memory (GiB)",
}


def attributions(
    predictor: Predictor, prompt: str, examples: Sequence[Example], predictions: Sequence[Record], name: str, most: int
) -> Sequence[tuple[Record, Image]] | str:
    """Return answers with the image under their attribution map, or the reason why attribution failed.

    Args:
        prompt: the template of these questions: each task of a mixture has its own.
        name: the metric, by which answers are right or wrong.
        most: how many answers at most, half of them correct if possible; each costs a forward pass.
    """
    if most < 1:
        return []
    predictor = replace(predictor, prompt=prompt)
    chosen = [record for group in choose_gallery(predictions, name) for record in evenly(group, -(-most // 2))]
    questions = {question.id: (example, question) for example in examples for question in example.questions}
    overlays: list[tuple[Record, Image]] = []
    try:
        for record in bar(chosen[:most], doing="attribution", unit="answers"):
            example, question = questions[record["question_id"]]
            refuse_several_images([example], "attribution")
            image = images.decode(example.image, example.name)
            # Captions have no question text, and their prompt has no place for one.
            attribution = attribute(predictor, image, question.text or "caption", record["answer"])
            overlays.append((record, draw(image, attribution)))
    except InputError as error:
        return str(error).rstrip(".")
    except torch.OutOfMemoryError:  # must not lose the answers
        return "the GPU has too little memory for eager attention"
    return overlays


def write_run_report(
    run: Path,
    task: str,
    title: str,
    config_yaml: str,
    metrics: Mapping[str, Any],
    predictions: Sequence[Record],
    examples: Sequence[Example],
    maps: Sequence[tuple[Record, Image]] | str,
) -> None:
    """Write `report.html`.

    Args:
        run: the run's folder, which has `log.jsonl` and `samples.jsonl` if it was trained here; the page of a mixture's
            task is written to a folder of its name in it.
        task: that name; "" for a single task.
        title: heading of the page.
        config_yaml: the resolved config.
        metrics: content of `metrics.json`.
        predictions: all records of `predictions.jsonl`.
        examples: the images of the questions.
        maps: `attributions`.
    """
    prefix = f"eval_{task}_" if task else "eval_"
    records, stages = join(stage_logs(run))
    log = [{key.replace(prefix, "eval_", 1): value for key, value in record.items()} for record in records]
    samples = [record for record in read_log(run / SAMPLES) if record["task"] == task]
    page = template("report.html.j2").render(
        title=title,
        config_yaml=config_yaml,
        measured={key: _plain(value) for key, value in metrics.items() if key not in SHOWN_ELSEWHERE},
        max_points=curves.MAX_POINTS,
        heat=gallery.HEAT,
        unfolded_rows=UNFOLDED_ROWS,
        max_rows=MAX_ROWS,
        **_scores(metrics),
        **_training(metrics["metric"], log, stages),
        **_answers(metrics["metric"], predictions, examples, samples, maps),
        **_reliability(metrics["metric"], predictions),
    )
    path = run / task / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Scraped text may contain lone surrogates, which UTF-8 cannot encode.
    path.write_text(page, encoding="utf-8", errors="replace")


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's values for the scores: the metric, its controls, and tables by type."""
    name, given = metrics["metric"], metrics["controls"]
    model = metrics["metrics"][name]
    controls = {
        CONTROLS[key]: given.get(key) or {"overall": None, "reason": "not measured"}
        for key in reversed(CONTROLS)
        if key in given or key != "blank_images"  # shown only if measured
    }
    bars = [{"name": "This model", "note": "", **model}]
    bars += [{"name": one.name.capitalize(), "note": one.description, **scores} for one, scores in controls.items()]
    measured = {one.name.split()[0]: scores for one, scores in controls.items() if scores["overall"] is not None}
    others = {key: scores for key, scores in metrics["metrics"].items() if key != name}
    kinds = [key.removeprefix("per_") for key in model if key.startswith("per_")]
    tables = {kind.replace("_", " ").capitalize(): _rows(kind, model, list(measured.values())) for kind in kinds}
    values = [value for rows in tables.values() for row in rows for value in (row["accuracy"], *row["controls"])]
    return {
        "metric": metric(name).title,
        "questions": metrics["n"],
        "unit": metrics["unit"],
        "interval": model.get("interval"),
        "others": {NAMES.get(key, key.replace("_", " ")): scores for key, scores in others.items()}
        | {key: {"overall": value} for key, value in metrics["variants"].items()},
        "bars": bars,
        "longest": max(100.0, *(bar["overall"] or 0.0 for bar in bars)),  # CIDEr can exceed 100
        "tables": {heading: rows for heading, rows in tables.items() if rows},
        "longest_in_tables": max([100.0, *(value for value in values if value is not None)]),
        "control_columns": list(measured),
    }


def _training(name: str, log: Sequence[Record], stages: Mapping[str, int]) -> dict[str, Any]:
    """Return the template's values for the training curves; `stages`: the steps before each stage."""
    loss, scores = curves.points(log, "loss"), curves.points(log, f"eval_{name}")
    others = {title: curves.points(log, key) for key, title in CURVES.items()}
    return {
        "loss_curve": curves.draw_loss(loss, scores, stages) if loss or scores else None,
        "plotted": {"loss": bool(loss), "scores": bool(scores)},
        "curves": {
            title: curves.draw_curve(title, points) for title, points in others.items() if curves.varies(points)
        },
    }


def _answers(
    name: str,
    predictions: Sequence[Record],
    examples: Sequence[Example],
    samples: Sequence[Record],
    maps: Sequence[tuple[Record, Image]] | str,
) -> dict[str, Any]:
    """Return the template's values for the answers: galleries, their history during training, and attributions."""
    chosen = choose_gallery(predictions, name)
    overlays, reason = ([], maps) if isinstance(maps, str) else (maps, "")
    records = (*chosen[0], *chosen[1], *samples, *(record for record, _ in overlays))
    shown, thumbnails = {record["image_id"] for record in records}, {}
    for example in examples:
        with suppress(InputError):  # another program may have answered about an unreadable image
            if example.image_id in shown:
                thumbnails[example.image_id] = gallery.data_uri(gallery.picture(example))
    scale = metric(name)
    return {
        "galleries": {
            kind: (
                *gallery.heading(scale.correct_from, kind == "right"),
                [gallery.card(record, thumbnails, name) for record in records],
            )
            for kind, records in zip(("right", "wrong"), chosen, strict=True)
        },
        "history": gallery.answer_history(samples, thumbnails, name),
        "attributions": [
            {
                **gallery.card(record, thumbnails, name),
                "overlay": gallery.data_uri(overlay),
                "right": scale.is_correct(record[name]),
            }
            for record, overlay in overlays
        ],
        "no_attributions": reason,
    }


def _reliability(name: str, predictions: Sequence[Record]) -> dict[str, Any]:
    """Return calibration and confusions, for metrics whose scores are a degree of correctness."""
    graded = metric(name).correct_from is not None
    scored = graded and any(record[name] is not None for record in predictions)
    calibration = calibrate(predictions, name) if scored else None
    return {
        "calibration": calibration,
        "reliability": calibration and curves.draw_reliability(calibration),
        "no_calibration": "the answers have no probabilities" if scored and calibration is None else "",
        "confusion": confusion_matrix(predictions) if graded else None,
    }


def _rows(kind: str, model: Mapping[str, Any], controls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return name, question count and scores of each category in a table, by frequency (numbers by value)."""
    values, counts, intervals = model[f"per_{kind}"], model[f"n_per_{kind}"], model.get(f"interval_per_{kind}", {})
    numbers = all(name.isdecimal() for name in counts)
    return [
        {
            "name": name,
            "n": counts[name],
            "accuracy": values[name],
            "interval": intervals.get(name),
            "controls": [control.get(f"per_{kind}", {}).get(name) for control in controls],
        }
        for name in sorted(values, key=lambda name: (int(name) if numbers else -counts[name], name))
    ]


def _plain(value: Any) -> str:
    """Format a setting as one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)
