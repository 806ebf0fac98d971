"""The page a run leaves: its numbers beside their controls, its curves, and answers to look at.

One HTML file with everything in it (pictures and drawings too), so that it can be mailed, archived and opened
offline. All text of the data set and of the model is escaped by the template. A part for which there is nothing is left
out; where one would look for it, the page says why.
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
from vlmvqa.extras.report.confusion import confuse
from vlmvqa.extras.report.gallery import Record
from vlmvqa.inference.baselines import CONTROLS
from vlmvqa.metrics.registry import metric

UNFOLDED_ROWS, MOST_ROWS = 12, 80  # VQAv2 has 65 question types

NAMES = {**{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}, "rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE"}
SHOWN_ABOVE = ("unit", "metric", "metrics", "controls", "variants")
CURVES = {  # beside that of the loss
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
    """Write the page to `path`.

    Args:
        title: what was run.
        metrics: what `metrics.json` holds: "metrics", "controls", and what they were measured with.
        log: records of `log.jsonl`, each with a "step"; empty when nothing was trained.
        predictions: records of `predictions.jsonl`, all of them.
        images: picture by "image_id" for the records that are shown (`shown_images`).
        config_yaml: the resolved config.
        samples: records of `samples.jsonl`.
        attributions: records of `predictions`, each with its attention map drawn over the image; or the reason for
            having none.
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
        measured={key: _plain(value) for key, value in metrics.items() if key not in SHOWN_ABOVE},
        most_points=curves.MOST_POINTS,
        heat=gallery.HEAT,
        unfolded_rows=UNFOLDED_ROWS,
        most_rows=MOST_ROWS,
        **_scores(metrics),
        **_training(metrics["metric"], log),
        **_answers(metrics["metric"], predictions, images, samples, attributions),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Scraped text may hold half a surrogate pair, which UTF-8 cannot write.
    path.write_text(page, encoding="utf-8", errors="replace")


def shown_images(predictions: Sequence[Record], name: str, samples: Sequence[Record] = ()) -> set[Any]:
    """The "image_id" of every picture that a report of these shows."""
    right, wrong = gallery.choose_gallery(predictions, name)
    return {record["image_id"] for record in (*right, *wrong, *samples)}


def _template(name: str) -> str:
    return resources.files("vlmvqa.extras.report").joinpath(name).read_text(encoding="utf-8")


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The page's numbers: of the metric, of its controls, by type."""
    name, bars = metrics["metric"], _bars(metrics)
    tables = _tables(metrics)
    found = [value for rows in tables.values() for row in rows for value in (row["accuracy"], *row["controls"])]
    return {
        "metric": metric(name).title,
        "questions": metrics["n"],
        "unit": metrics["unit"],
        "interval": metrics["metrics"][name].get("interval"),
        "others": _others(metrics),
        "bars": bars,
        "longest": max(100.0, *(bar["percent"] or 0.0 for bar in bars)),  # CIDEr goes beyond 100
        "tables": tables,
        "longest_in_tables": max([100.0, *(value for value in found if value is not None)]),
        "control_columns": list(_measured_controls(metrics)),
    }


def _training(name: str, log: Sequence[Record]) -> dict[str, Any]:
    """The curves."""
    loss, scores = curves.points(log, "loss"), curves.points(log, f"eval_{name}")
    beside = {title: curves.points(log, key) for key, title in CURVES.items()}
    return {
        "loss_curve": curves.draw_loss(loss, scores) if loss or scores else None,
        "drawn": {"loss": bool(loss), "scores": bool(scores)},
        "curves": {
            title: curves.draw_curve(title, points) for title, points in beside.items() if curves.varies(points)
        },
    }


def _answers(
    name: str,
    predictions: Sequence[Record],
    images: Mapping[Any, Image],
    samples: Sequence[Record],
    attributions: Sequence[tuple[Record, Image]] | str,
) -> dict[str, Any]:
    """What is shown of the answers: one by one, and what can be counted of them."""
    limit = metric(name).correct_from
    galleries = zip(("right", "wrong"), (True, False), gallery.choose_gallery(predictions, name), strict=True)
    return {
        "galleries": {
            kind: (*gallery.words(limit, right), [gallery.card(record, images, name) for record in records])
            for kind, right, records in galleries
        },
        "over_training": gallery.over_training(samples, images, name),
        "attributions": [] if isinstance(attributions, str) else [_look(*look, images, name) for look in attributions],
        "no_attributions": attributions if isinstance(attributions, str) else "",
        **_reliability(name, predictions),
        "confusion": None if limit is None else confuse(predictions),
    }


def _look(record: Record, drawn: Image, images: Mapping[Any, Image], name: str) -> dict[str, Any]:
    right = metric(name).is_correct(record[name])
    return {**gallery.card(record, images, name), "drawn": gallery.data_uri(drawn), "right": right}


def _reliability(name: str, predictions: Sequence[Record]) -> dict[str, Any]:
    """Confidence against accuracy, where there is a score that says how far an answer is right."""
    nothing = {"calibration": None, "reliability": None, "no_calibration": ""}
    if metric(name).correct_from is None or all(record[name] is None for record in predictions):
        return nothing
    found = calibrate(predictions, name)
    if found is None:
        return {**nothing, "no_calibration": "the answers came without probabilities"}
    return {**nothing, "calibration": found, "reliability": curves.draw_reliability(found)}


def _controls(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each control's figures, or a reason why there are none; blank images only by request."""
    given = metrics["controls"]
    shown = [key for key in reversed(CONTROLS) if key in given or key != "blank_images"]
    return {key: given.get(key) or {"overall": None, "reason": "not measured"} for key in shown}


def _measured_controls(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The controls that have figures, by the name of their column."""
    return {CONTROLS[key].name.split()[0]: of for key, of in _controls(metrics).items() if of["overall"] is not None}


def _bars(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model and its controls, as the page compares them: percent, or the reason why there is none."""
    compared = [("This model", "", metrics["metrics"][metrics["metric"]])]
    compared += [(CONTROLS[key].name.capitalize(), CONTROLS[key].about, of) for key, of in _controls(metrics).items()]
    return [
        {
            "name": name,
            "note": note,
            "percent": figures["overall"],
            "interval": figures.get("interval"),
            "reason": figures.get("reason"),
        }
        for name, note, figures in compared
    ]


def _others(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers beside the one that the metric is known by, and what other toolkits would print."""
    numbers = {NAMES.get(name, name.replace("_", " ")): of for name, of in metrics["metrics"].items()}
    numbers |= {name: {"overall": value} for name, value in metrics["variants"].items()}
    return [
        {"name": name, "value": of["overall"], "reason": of.get("reason")}
        for name, of in numbers.items()
        if of is not metrics["metrics"][metrics["metric"]]
    ]


def _tables(metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each table by its heading."""
    kinds = [key.removeprefix("per_") for key in metrics["metrics"][metrics["metric"]] if key.startswith("per_")]
    return {kind.replace("_", " ").capitalize(): rows for kind in kinds if (rows := _rows_per_type(metrics, kind))}


def _rows_per_type(metrics: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Name, number of questions and figures of each kind in a table, the most frequent first."""
    model = metrics["metrics"][metrics["metric"]]
    values, counts, sure = model[f"per_{kind}"], model[f"n_per_{kind}"], model.get(f"interval_per_{kind}", {})
    controls = [control.get(f"per_{kind}", {}) for control in _measured_controls(metrics).values()]
    return [
        {
            "name": name,
            "n": counts[name],
            "accuracy": values[name],
            "interval": sure.get(name),
            "controls": [control.get(name) for control in controls],
        }
        for name in sorted(values, key=_order(counts))
    ]


def _order(counts: Mapping[str, int]) -> Callable[[str], tuple[int, str]]:
    """Numbers in their order, other kinds by how frequent they are."""
    numbers = all(name.isdecimal() for name in counts)
    return lambda name: (int(name) if numbers else -counts[name], name)


def _plain(value: Any) -> str:
    """A setting as one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)
