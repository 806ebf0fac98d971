"""Plots of the reports as inline SVG, in the page's CSS colours so that they follow its dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from vlmvqa.extras.report.calibration import Calibration

Points = Sequence[tuple[float, float]]
MAX_NAME = 26  # characters of a row's name
MAX_POINTS = 250  # per curve; more are indistinguishable at its width
# Placeholder colours, replaced in the SVG: matplotlib takes no CSS variables.
COLORS = {"#010203": "var(--accent)", "#040506": "currentColor", "#070809": "var(--second)", "#0a0b0c": "var(--other)"}
ARM_COLORS = 8  # of the arms of a study; further arms have dashed lines
COLORS |= {f"#0d0e{number:02x}": f"var(--arm-{number})" for number in range(ARM_COLORS)}
LINE, INK, SECOND, OTHER, *ARMS = COLORS


@dataclass(frozen=True)
class Band:
    """Curve of an arm with a band over its seeds: the mean, the lowest and the highest value at each x."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


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


def draw_loss(loss: Points, scores: Points, stages: Mapping[str, int] | None = None) -> Markup:
    """Plot the training loss and, on a second axis, the evaluation scores; a line marks where a stage begins."""
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
        for name, step in (stages or {}).items() if len(stages or {}) > 1 else ():
            axes.axvline(step, color=INK, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                name,
                (step, 1),
                xycoords=("data", "axes fraction"),
                fontsize=7,
                color=INK,
                xytext=(2, -8),
                textcoords="offset points",
            )
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


def draw_bands(name: str, bands: Mapping[int, Band], label: str, logarithmic: bool = False) -> Markup:
    """Plot curves with bands.

    Args:
        bands: by number of the arm, 0 for the baseline.
        label: of the x axis, which starts at 0.
        logarithmic: scale of the y axis.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    with svg_figure(name, (4.0, 2.5)) as (figure, svg):
        axes = plot_axes(figure)
        for number, band in bands.items():
            color, style = ARMS[number % ARM_COLORS], "-" if number < ARM_COLORS else "--"
            # The baseline is plotted first and wider, so that an equal curve does not hide it.
            width, marker = 1.3 if number else 2.6, "o" if len(band.x) < 20 else ""
            axes.fill_between(band.x, band.low, band.high, color=color, alpha=0.16, linewidth=0)
            axes.plot(band.x, band.mean, color=color, linewidth=width, linestyle=style, marker=marker, ms=3)
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.03 * max(band.x[-1] for band in bands.values()))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="y", which="minor", length=0)
    return svg[0]


def draw_intervals(rows: Sequence[tuple[str, int, float, tuple[float, float], bool]], label: str) -> Markup:
    """Plot differences with intervals, one row below the other, and a line at 0.

    Args:
        rows: name, number of the arm, difference, interval, and whether the marker is filled.
        label: of the x axis.
    """
    names = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..." for name, *_ in rows]
    size = 4.0, 0.6 + 0.26 * len(rows)
    with svg_figure("intervals", size, left=0.2 + 0.07 * max(map(len, names))) as (figure, svg):
        axes = plot_axes(figure, grid=False)
        axes.grid(axis="x", color=INK, alpha=0.14, linewidth=0.6)
        axes.axvline(0, color=ARMS[0], linewidth=1.2)
        for place, (_, number, difference, (low, high), filled) in enumerate(rows):
            color = ARMS[number % ARM_COLORS]
            axes.plot([low, high], [place, place], color=color, linewidth=1.8)
            face = color if filled else "none"
            axes.plot([difference], [place], "o", ms=5, color=color, markerfacecolor=face)
        axes.set_yticks(range(len(rows)), names, parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.06)
        axes.set_xlabel(label)
    return svg[0]


def _plot(axes: Any, curve: Points, color: str) -> None:
    axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.5, marker="o" if len(curve) < 20 else "", ms=3)


def plot_axes(figure: Any, grid: bool = True) -> Any:
    """Return a figure's axes in the report's style."""
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
def svg_figure(
    name: str, inches: tuple[float, float], right: float = 0.1, left: float = 0.6
) -> Iterator[tuple[Any, list[Markup]]]:
    """Yield a figure, and a list that receives its SVG on exit.

    Args:
        name: salt of the SVG's ids.
        inches: width and height.
        right, left: margins in inches. Fixed margins take a third of the time of a layout engine, which draws
            everything twice.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # pyplot would look for a display

    result: list[Markup] = []
    # Text stays text in the page's font; the salt makes ids unique among the plots of a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5}):
        figure = Figure(figsize=inches)
        width, height = inches
        figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=0.42 / height, top=1 - 0.12 / height)
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
