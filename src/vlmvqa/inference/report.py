"""The page a run leaves: its numbers beside their controls, its curves, and answers to look at.

One HTML file with everything in it (pictures and drawings too), so that it can be mailed, archived and opened
offline. All text of the data set and of the model is escaped by the template.
"""

from __future__ import annotations

import base64
import io
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL.Image import Image

from vlmvqa.inference.baselines import CONTROLS
from vlmvqa.inference.scores import metric

Record = Mapping[str, Any]

THUMBNAIL = (320, 320)  # pixels; 48 JPEGs of this size are about 1 MB
UNFOLDED_ROWS, MOST_ROWS = 12, 80  # VQAv2 has 65 question types
MOST_POINTS = 250  # of a curve: more cannot be told apart at its width

NAMES = {**{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}, "rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE"}
SHOWN_ABOVE = ("unit", "metric", "metrics", "controls", "variants")
CURVES = {
    "loss": "Training loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "questions_per_second": "Questions per second",
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
) -> None:
    """Write the page to `path`.

    Args:
        title: what was run.
        metrics: what `metrics.json` holds: "metrics", "controls", and what they were measured with.
        log: records of `log.jsonl`, each with a "step"; empty when nothing was trained.
        predictions: records of `predictions.jsonl`, all of them.
        images: picture by "image_id" for the records that `choose_gallery` takes.
        config_yaml: the resolved config.
    """
    name = metrics["metric"]
    title_of_metric = metric(name).title
    right, wrong = choose_gallery(predictions, name)
    limit, bars = metric(name).right_from, _bars(metrics)
    curves = {"loss": CURVES["loss"], f"eval_{name}": f"Evaluated {title_of_metric}", **CURVES}
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(resources.files("vlmvqa.inference").joinpath("report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        metric=title_of_metric,
        questions=metrics["n"],
        unit=metrics["unit"],
        interval=metrics["metrics"][name].get("interval"),
        others=_others(metrics),
        bars=bars,
        longest=max(100.0, *(bar["percent"] or 0.0 for bar in bars)),  # CIDEr goes beyond 100
        tables=_tables(metrics),
        control_columns=list(_measured_controls(metrics)),
        most_points=MOST_POINTS,
        unfolded_rows=UNFOLDED_ROWS,
        most_rows=MOST_ROWS,
        curves=[(drawn, _draw(drawn, points)) for key, drawn in curves.items() if (points := _points(log, key))],
        galleries={
            "right": (*_gallery_words(limit, True), [_card(record, images, name) for record in right]),
            "wrong": (*_gallery_words(limit, False), [_card(record, images, name) for record in wrong]),
        },
        measured={key: _plain(value) for key, value in metrics.items() if key not in SHOWN_ABOVE},
        config_yaml=config_yaml,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Scraped text may hold half a surrogate pair, which UTF-8 cannot write.
    path.write_text(page, encoding="utf-8", errors="replace")


def choose_gallery(
    predictions: Sequence[Record], name: str, most: int = 24, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """The answers to show, right and wrong: at most so many of each, drawn at random, the surest first.

    Where no score means right, the better and the worse half.
    """
    scored = [record for record in predictions if record[name] is not None]
    limit = metric(name).right_from
    if limit is None:
        limit = median(record[name] for record in scored) if scored else 0.0
    right = [record for record in scored if record[name] >= limit]
    wrong = [record for record in scored if record[name] < limit]
    draw = random.Random(seed)
    right, wrong = (draw.sample(records, min(most, len(records))) for records in (right, wrong))
    return sorted(right, key=_probability, reverse=True), sorted(wrong, key=_probability, reverse=True)


def _gallery_words(limit: float | None, right: bool) -> tuple[str, str]:
    """A gallery's heading, and which answers it shows."""
    drawn = "Drawn at random, the surest first"
    if limit is None:
        heading, which = (
            ("The better half", "the median or more") if right else ("The worse half", "less than the median")
        )
    else:
        heading = "Answered right" if right else "Answered wrong"
        which = f"{limit:.0f} or more" if right else f"less than {limit:.0f}"
    legend = ": the question, the model's answer with its probability p and its score, and the reference answers"
    return heading, f"Scored {which}. {drawn}{legend if right else ''}."


def _probability(record: Record) -> float:
    """0 where it is not known: answers that another program wrote."""
    known = record["log_probability"]
    return 0.0 if known is None else math.exp(known)


def _controls(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each control's figures, or a reason why there are none; blank images only by request."""
    given = metrics["controls"]
    shown = [key for key in reversed(CONTROLS) if key in given or key != "blank_images"]
    return {key: given.get(key) or {"overall": None, "reason": "not measured"} for key in shown}


def _measured_controls(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The controls that have figures, by the name of their column."""
    return {key.partition("_")[0]: of for key, of in _controls(metrics).items() if of["overall"] is not None}


def _bars(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model and its controls, as the page compares them: percent, or the reason why there is none."""
    compared = [("This model", "", metrics["metrics"][metrics["metric"]])]
    compared += [(key.replace("_", " ").capitalize(), CONTROLS[key], of) for key, of in _controls(metrics).items()]
    return [
        {"name": name, "note": note, "percent": figures["overall"], "reason": figures.get("reason")}
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
    return {kind.replace("_", " ").capitalize(): _rows_per_type(metrics, kind) for kind in kinds}


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


def _card(record: Record, images: Mapping[Any, Image], metric: str) -> dict[str, Any]:
    image = images.get(record["image_id"])
    return {
        **record,
        "score": record[metric],
        "probability": None if record["log_probability"] is None else _probability(record),
        "picture": None if image is None else _data_uri(image),
        "counted": Counter(record["answers"]).most_common(),
    }


def _data_uri(image: Image) -> str:
    small = image.convert("RGB")
    small.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _points(log: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """(step, value) in order, thinned by averaging; a step logged again after a resume counts as it was last."""
    values = {record["step"]: record[key] for record in log if record.get(key) is not None}
    points = sorted((step, value) for step, value in values.items() if math.isfinite(value))
    per_bin = math.ceil(len(points) / MOST_POINTS) or 1
    bins = [points[start : start + per_bin] for start in range(0, len(points), per_bin)]
    return [(_mean([step for step, _ in part]), _mean([value for _, value in part])) for part in bins]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw(name: str, points: Sequence[tuple[float, float]]) -> Markup:
    """The curve as inline SVG in the page's own colours, so that it turns dark with the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot nothing looks for a display

    line, ink = "#010203", "#040506"  # stand-ins, replaced below: matplotlib takes no CSS variables
    # Text stays text and takes the page's font; the salt keeps the ids of one drawing out of the next.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8}):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), color=line, linewidth=1.4, marker="o" if len(points) < 20 else "", ms=3)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        axes.tick_params(colors=ink, length=2)
        axes.xaxis.label.set_color(ink)
        axes.yaxis.offsetText.set_color(ink)
        axes.grid(color=ink, alpha=0.12, linewidth=0.6)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(line, "var(--accent)").replace(ink, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # addresses of vocabularies, of no use here
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"| font-family: [^;"]*;', "", svg)
    return Markup(svg)


def _plain(value: Any) -> str:
    """A setting as one line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)
