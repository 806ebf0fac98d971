"""Plots of the report as inline SVG, in the page's CSS colours so that they follow its dark mode."""

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
MAX_POINTS = 250  # per curve; more are indistinguishable at its width
# Placeholder colours, replaced in the SVG: matplotlib takes no CSS variables.
COLORS = {"#010203": "var(--accent)", "#040506": "currentColor", "#070809": "var(--second)", "#0a0b0c": "var(--other)"}
LINE, INK, SECOND, OTHER = COLORS


def points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) in order, averaged down to `MAX_POINTS`; the last record of a repeated step counts."""
    values = {record["step"]: record[key] for record in log if record.get(key) is not None}
    curve = sorted((step, value) for step, value in values.items() if math.isfinite(value))
    per_bin = math.ceil(len(curve) / MAX_POINTS) or 1
    bins = [curve[start : start + per_bin] for start in range(0, len(curve), per_bin)]
    return [(_mean([step for step, _ in part]), _mean([value for _, value in part])) for part in bins]


def varies(curve: Points) -> bool:
    """Return whether the values of a curve differ by more than one percent of the largest."""
    values = [value for _, value in curve]
    return bool(values) and max(values) - min(values) > 0.01 * max(map(abs, values))


def draw_curve(name: str, curve: Points) -> Markup:
    """Plot one curve over the steps."""
    with svg_figure(name, (2.7, 1.6)) as (figure, svg):
        axes = plot_axes(figure)
        axes.locator_params(nbins=4)
        _plot(axes, curve, LINE)
    return svg[0]


def draw_loss(loss: Points, scores: Points) -> Markup:
    """Plot the training loss and, on a second axis, the evaluation scores."""
    with svg_figure("loss and score", (4.6, 2.8), right=0.4) as (figure, svg):
        axes = plot_axes(figure)
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
    return svg[0]


def draw_reliability(calibration: Calibration) -> Markup:
    """Plot accuracy against confidence, one bar per bin, with the diagonal of perfect calibration."""
    with svg_figure("reliability", (4.4, 3.2)) as (figure, svg):
        axes = plot_axes(figure, grid=False)
        width = 1 / len(calibration.bins)
        for one in calibration.bins:
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
    return svg[0]


def _plot(axes: Any, curve: Points, color: str) -> None:
    axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.5, marker="o" if len(curve) < 20 else "", ms=3)


def plot_axes(figure: Any, grid: bool = True) -> Any:
    """Add a plot in the page's style, over the steps."""
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
def svg_figure(name: str, inches: tuple[float, float], right: float = 0.1) -> Iterator[tuple[Any, list[Markup]]]:
    """Yield a figure, and a list that receives its SVG on exit.

    Args:
        name: salt of the SVG's ids.
        inches: width and height.
        right: right margin in inches. Fixed margins take a third of the time of a layout engine, which draws
            everything twice.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # pyplot would look for a display

    result: list[Markup] = []
    # Text stays text in the page's font; the salt makes ids unique among the plots of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5}):
        figure = Figure(figsize=inches)
        width, height = inches
        figure.subplots_adjust(left=0.6 / width, right=1 - right / width, bottom=0.42 / height, top=1 - 0.12 / height)
        yield figure, result
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, color in COLORS.items():
        svg = svg.replace(placeholder, color)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # URLs of vocabularies
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"| font-family: [^;"]*;', "", svg)
    result.append(Markup(svg))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
