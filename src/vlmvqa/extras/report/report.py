"""HTML report of a run: scores with their controls, training curves, and sampled answers.

One self-contained HTML file, images and plots included, which can be mailed, archived and opened offline. The template
escapes all text from the dataset and the model. Empty sections are left out, with the reason where it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from PIL.Image import Image

from vlmvqa.extras.report import curves, gallery
from vlmvqa.extras.report.calibration import calibrate
from vlmvqa.extras.report.confusion import confusion_matrix
from vlmvqa.extras.report.gallery import Record
from vlmvqa.inference.baselines import CONTROLS
from vlmvqa.metrics.registry import metric

UNFOLDED_ROWS, MAX_ROWS = 12, 80  # VQAv2 has 65 question types

NAMES = {**{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}, "rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE"}
SHOWN_ELSEWHERE = ("unit", "metric", "metrics", "controls", "variants")
CURVES = {  # in addition to the loss
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "questions_per_second": "Questions per second",
    "peak_memory_gib": "Peak memory (GiB)",
}


def write_report(
    path: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    log: Sequence[Record],
    predictions: Sequence[Record],
    images: Mapping[Any, Image],
    config_yaml: str,
    samples: Sequence[Record] = (),
    attributions: Sequence[tuple[Record, Image]] | str = (),
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        title: heading of the page.
        metrics: content of `metrics.json`: "metrics", "controls", and the settings of the evaluation.
        log: records of `log.jsonl`, each with a "step"; empty if nothing was trained.
        predictions: all records of `predictions.jsonl`.
        images: image by "image_id" for the records that are shown (`shown_images`).
        config_yaml: the resolved config.
        samples: records of `samples.jsonl`.
        attributions: records of `predictions` with the image under its heat map; or the reason why there are none.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_template),
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        config_yaml=config_yaml,
        measured={key: _plain(value) for key, value in metrics.items() if key not in SHOWN_ELSEWHERE},
        max_points=curves.MAX_POINTS,
        heat=gallery.HEAT,
        unfolded_rows=UNFOLDED_ROWS,
        max_rows=MAX_ROWS,
        **_scores(metrics),
        **_training(metrics["metric"], log),
        **_answers(metrics["metric"], predictions, images, samples, attributions),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Scraped text may contain lone surrogates, which UTF-8 cannot encode.
    path.write_text(page, encoding="utf-8", errors="replace")


def shown_images(predictions: Sequence[Record], name: str, samples: Sequence[Record] = ()) -> set[Any]:
    """Return the "image_id" of every image that the report shows."""
    right, wrong = gallery.choose_gallery(predictions, name)
    return {record["image_id"] for record in (*right, *wrong, *samples)}


def _template(name: str) -> str:
    return resources.files("vlmvqa.extras.report").joinpath(name).read_text(encoding="utf-8")


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's values for the scores: the metric, its controls, and tables by type."""
    name, bars = metrics["metric"], _bars(metrics)
    tables = _tables(metrics)
    values = [value for rows in tables.values() for row in rows for value in (row["accuracy"], *row["controls"])]
    return {
        "metric": metric(name).title,
        "questions": metrics["n"],
        "unit": metrics["unit"],
        "interval": metrics["metrics"][name].get("interval"),
        "others": _others(metrics),
        "bars": bars,
        "longest": max(100.0, *(bar["percent"] or 0.0 for bar in bars)),  # CIDEr can exceed 100
        "tables": tables,
        "longest_in_tables": max([100.0, *(value for value in values if value is not None)]),
        "control_columns": list(_measured_controls(metrics)),
    }


def _training(name: str, log: Sequence[Record]) -> dict[str, Any]:
    """Return the template's values for the training curves."""
    loss, scores = curves.points(log, "loss"), curves.points(log, f"eval_{name}")
    others = {title: curves.points(log, key) for key, title in CURVES.items()}
    return {
        "loss_curve": curves.draw_loss(loss, scores) if loss or scores else None,
        "plotted": {"loss": bool(loss), "scores": bool(scores)},
        "curves": {
            title: curves.draw_curve(title, points) for title, points in others.items() if curves.varies(points)
        },
    }


def _answers(
    name: str,
    predictions: Sequence[Record],
    images: Mapping[Any, Image],
    samples: Sequence[Record],
    attributions: Sequence[tuple[Record, Image]] | str,
) -> dict[str, Any]:
    """Return the template's values for the answers: galleries, attributions, calibration and confusions."""
    limit = metric(name).correct_from
    galleries = zip(("right", "wrong"), (True, False), gallery.choose_gallery(predictions, name), strict=True)
    return {
        "galleries": {
            kind: (*gallery.heading(limit, right), [gallery.card(record, images, name) for record in records])
            for kind, right, records in galleries
        },
        "history": gallery.answer_history(samples, images, name),
        "attributions": []
        if isinstance(attributions, str)
        else [_attribution(*attribution, images, name) for attribution in attributions],
        "no_attributions": attributions if isinstance(attributions, str) else "",
        **_reliability(name, predictions),
        "confusion": None if limit is None else confusion_matrix(predictions),
    }


def _attribution(record: Record, overlay: Image, images: Mapping[Any, Image], name: str) -> dict[str, Any]:
    right = metric(name).is_correct(record[name])
    return {**gallery.card(record, images, name), "overlay": gallery.data_uri(overlay), "right": right}


def _reliability(name: str, predictions: Sequence[Record]) -> dict[str, Any]:
    """Return the calibration and its plot, for metrics whose scores are a degree of correctness."""
    values = {"calibration": None, "reliability": None, "no_calibration": ""}
    if metric(name).correct_from is None or all(record[name] is None for record in predictions):
        return values
    calibration = calibrate(predictions, name)
    if calibration is None:
        return {**values, "no_calibration": "the answers have no probabilities"}
    return {**values, "calibration": calibration, "reliability": curves.draw_reliability(calibration)}


def _controls(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return each control's scores, or the reason why they are missing; blank images only if measured."""
    measured = metrics["controls"]
    shown = [key for key in reversed(CONTROLS) if key in measured or key != "blank_images"]
    return {key: measured.get(key) or {"overall": None, "reason": "not measured"} for key in shown}


def _measured_controls(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the scores of the measured controls by column name."""
    return {
        CONTROLS[key].name.split()[0]: scores
        for key, scores in _controls(metrics).items()
        if scores["overall"] is not None
    }


def _bars(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the bars of the model and its controls: percent, or the reason why it is missing."""
    bars = [("This model", "", metrics["metrics"][metrics["metric"]])]
    bars += [
        (CONTROLS[key].name.capitalize(), CONTROLS[key].description, scores)
        for key, scores in _controls(metrics).items()
    ]
    return [
        {
            "name": name,
            "note": note,
            "percent": scores["overall"],
            "interval": scores.get("interval"),
            "reason": scores.get("reason"),
        }
        for name, note, scores in bars
    ]


def _others(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the numbers other than the main one, and those of other toolkits."""
    numbers = {NAMES.get(name, name.replace("_", " ")): scores for name, scores in metrics["metrics"].items()}
    numbers |= {name: {"overall": value} for name, value in metrics["variants"].items()}
    return [
        {"name": name, "value": scores["overall"], "reason": scores.get("reason")}
        for name, scores in numbers.items()
        if scores is not metrics["metrics"][metrics["metric"]]
    ]


def _tables(metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each table by its heading."""
    kinds = [key.removeprefix("per_") for key in metrics["metrics"][metrics["metric"]] if key.startswith("per_")]
    return {kind.replace("_", " ").capitalize(): rows for kind in kinds if (rows := _rows_per_type(metrics, kind))}


def _rows_per_type(metrics: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return name, question count and scores of each category in a table, the most frequent first."""
    model = metrics["metrics"][metrics["metric"]]
    values, counts, intervals = model[f"per_{kind}"], model[f"n_per_{kind}"], model.get(f"interval_per_{kind}", {})
    controls = [control.get(f"per_{kind}", {}) for control in _measured_controls(metrics).values()]
    return [
        {
            "name": name,
            "n": counts[name],
            "accuracy": values[name],
            "interval": intervals.get(name),
            "controls": [control.get(name) for control in controls],
        }
        for name in sorted(values, key=_order(counts))
    ]


def _order(counts: Mapping[str, int]) -> Callable[[str], tuple[int, str]]:
    """Return the sort key of categories: numeric ones by value, others by frequency."""
    numbers = all(name.isdecimal() for name in counts)
    return lambda name: (int(name) if numbers else -counts[name], name)


def _plain(value: Any) -> str:
    """Format a setting as one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)
