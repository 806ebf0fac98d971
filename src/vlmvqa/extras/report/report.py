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
        images: image by "image_id".
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


def _template(name: str) -> str:
    return resources.files("vlmvqa.extras.report").joinpath(name).read_text(encoding="utf-8")


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
    scale = metric(name)
    maps, reason = ((), attributions) if isinstance(attributions, str) else (attributions, "")
    groups = zip(("right", "wrong"), (True, False), gallery.choose_gallery(predictions, name), strict=True)
    galleries = {}
    for kind, right, records in groups:
        cards = [gallery.card(record, images, name) for record in records]
        galleries[kind] = (*gallery.heading(scale.correct_from, right), cards)
    attributed = []
    for record, overlay in maps:
        shown = {"overlay": gallery.data_uri(overlay), "right": scale.is_correct(record[name])}
        attributed.append({**gallery.card(record, images, name), **shown})
    return {
        "galleries": galleries,
        "history": gallery.answer_history(samples, images, name),
        "attributions": attributed,
        "no_attributions": reason,
        **_reliability(name, predictions),
        "confusion": None if scale.correct_from is None else confusion_matrix(predictions),
    }


def _reliability(name: str, predictions: Sequence[Record]) -> dict[str, Any]:
    """Return the calibration and its plot, for metrics whose scores are a degree of correctness."""
    values = {"calibration": None, "reliability": None, "no_calibration": ""}
    if metric(name).correct_from is None or all(record[name] is None for record in predictions):
        return values
    calibration = calibrate(predictions, name)
    if calibration is None:
        return {**values, "no_calibration": "the answers have no probabilities"}
    return {**values, "calibration": calibration, "reliability": curves.draw_reliability(calibration)}


def _rows(kind: str, model: Mapping[str, Any], controls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return name, question count and scores of each category in a table, the most frequent first."""
    values, counts, intervals = model[f"per_{kind}"], model[f"n_per_{kind}"], model.get(f"interval_per_{kind}", {})
    return [
        {
            "name": name,
            "n": counts[name],
            "accuracy": values[name],
            "interval": intervals.get(name),
            "controls": [control.get(f"per_{kind}", {}).get(name) for control in controls],
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
