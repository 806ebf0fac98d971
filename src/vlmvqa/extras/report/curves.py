"""Drawings of a report as inline SVG in the page's own colours, so that they turn dark with it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

from vlmvqa.extras.report.calibration import Calibration

Points = Sequence[tuple[float, float]]
MOST_POINTS = 250  # of a curve: more cannot be told apart at its width
# Stand-ins, replaced below: matplotlib takes no CSS variables.
COLORS = {"#010203": "var(--accent)", "#040506": "currentColor", "#070809": "var(--second)", "#0a0b0c": "var(--other)"}
LINE, INK, SECOND, OTHER = COLORS


def points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) in order, thinned by averaging; a step logged again after a resume counts as it was last."""
    values = {record["step"]: record[key] for record in log if record.get(key) is not None}
    found = sorted((step, value) for step, value in values.items() if math.isfinite(value))
    per_bin = math.ceil(len(found) / MOST_POINTS) or 1
    bins = [found[start : start + per_bin] for start in range(0, len(found), per_bin)]
    return [(_mean([step for step, _ in part]), _mean([value for _, value in part])) for part in bins]


def varies(curve: Points) -> bool:
    """Whether a curve shows more than a single number: its values differ by more than one percent of the largest."""
    values = [value for _, value in curve]
    return bool(values) and max(values) - min(values) > 0.01 * max(map(abs, values))


def draw_curve(name: str, curve: Points) -> Markup:
    """One curve over the steps."""
    with _figure(name, (2.7, 1.6)) as (figure, drawn):
        axes = _axes(figure)
        axes.locator_params(nbins=4)
        _plot(axes, curve, LINE)
    return drawn[0]


def draw_loss(loss: Points, scores: Points) -> Markup:
    """The training loss, and the evaluations' scores over the same steps on an axis of their own."""
    with _figure("loss and score", (4.6, 2.8), right=0.4) as (figure, drawn):
        axes = _axes(figure)
        if loss:
            _plot(axes, loss, LINE)
            axes.set_ylim(bottom=0)
        if scores:
            other = axes.twinx() if loss else axes
            _plot(other, scores, SECOND)
            _style(other)
            other.tick_params(axis="y", colors=SECOND)
            other.set_ylim(0, max(1.0, 1.08 * max(score for _, score in scores)))
            if loss:
                axes.tick_params(axis="y", colors=LINE)
    return drawn[0]


def draw_reliability(found: Calibration) -> Markup:
    """A bar a bin, its accuracy against its confidence, with the line on which they would be equal."""
    with _figure("reliability", (4.4, 3.2)) as (figure, drawn):
        axes = _axes(figure, grid=False)
        width = 1 / len(found.bins)
        for one in found.bins:
            middle = (one.low + one.high) / 2
            if one.accuracy is not None:
                axes.bar(middle, one.accuracy, width=0.88 * width, color=LINE, zorder=2)
                axes.plot([one.confidence], [one.accuracy], "o", ms=3.5, color=SECOND, zorder=4)
                axes.text(middle, one.accuracy + 0.025, f"{one.n:,}", ha="center", fontsize=7, color=INK, zorder=5)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (3, 3)), zorder=3)
        axes.set(xlim=(0, 1), ylim=(0, 1.08), xlabel="confidence", ylabel="accuracy")
        axes.yaxis.label.set_color(INK)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    return drawn[0]


def _plot(axes: Any, curve: Points, color: str) -> None:
    axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.5, marker="o" if len(curve) < 20 else "", ms=3)


def _axes(figure: Any, grid: bool = True) -> Any:
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    _style(axes)
    if grid:
        axes.grid(axis="y", color=INK, alpha=0.14, linewidth=0.6)
    return axes


def _style(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, length=2)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.offsetText.set_color(INK)


@contextmanager
def _figure(name: str, inches: tuple[float, float], right: float = 0.1) -> Iterator[tuple[Any, list[Markup]]]:
    """A figure to draw into; its SVG is the list's item afterwards.

    Args:
        right: the margin on the right, in inches. Fixed margins take a third of the time of a layout engine, which
            draws everything twice.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot nothing looks for a display

    drawn: list[Markup] = []
    # Text stays text and takes the page's font; the salt keeps the ids of one drawing out of the next.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5}):
        figure = Figure(figsize=inches)
        width, height = inches
        figure.subplots_adjust(left=0.6 / width, right=1 - right / width, bottom=0.42 / height, top=1 - 0.12 / height)
        yield figure, drawn
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, color in COLORS.items():
        svg = svg.replace(stand_in, color)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # addresses of vocabularies, of no use here
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"| font-family: [^;"]*;', "", svg)
    drawn.append(Markup(svg))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
