"""A study's tables: text for the terminal, Markdown, and LaTeX with booktabs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from vlmvqa.errors import counted
from vlmvqa.extras.report.text_tables import aligned, piped
from vlmvqa.metrics.registry import metric

Record = Mapping[str, Any]
WIDTH = 99  # columns of the terminal
LATEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "±": r"$\pm$"}


def comparison(found: Record) -> list[list[str]]:
    """Return the scores of the arms and their differences to the baseline as cells, the header first."""
    head = ["arm", "seeds", metric(found["metric"]).title, "difference", "95 % interval", "p (Holm)", "detectable"]
    return [head, *(_row(name, arm) for name, arm in found["arms"].items())]


def _row(name: str, arm: Record) -> list[str]:
    score = f"{arm['mean']:.2f}" + ("" if arm["deviation"] is None else f" ± {arm['deviation']:.2f}")
    cells = [name, str(len(arm["scores"])), score]
    difference = arm.get("difference")
    if difference is None:
        return [*cells, "baseline", "", "", ""]
    shown = "{:+.2f} to {:+.2f}".format(*(difference["interval"] or difference["image_interval"]))
    shown += "" if difference["interval"] else " *"
    p = f"{difference['p_holm']:.4f}" if difference["p_holm"] < 0.05 else f"{difference['p_holm']:.2f}"
    return [*cells, f"{difference['difference']:+.2f}", shown, p, f"{difference['detectable']:.2f}"]


def costs(found: Record) -> list[list[str]]:
    """Return the controls and costs of the arms as cells, the header first."""
    head = ["arm", "majority", "shuffled", "trained", "steps", "TFLOP", "questions/s", "peak GiB"]
    rows = []
    for name, arm in found["arms"].items():
        measured, trained = arm["measured"], arm["parameters"].get("trained")
        values = [
            *(_number(arm["controls"].get(control), ".2f") for control in ("majority", "shuffled")),
            _number(trained, ",d"),
            _number(arm["steps"] or None, ",d"),
            _number(measured.get("tera_flop"), ",.3g"),
            _number(measured.get("questions_per_second"), ",.0f"),
            _number(measured.get("peak_memory_gib"), ".2f"),
        ]
        rows.append([name, *values])
    return [head, *rows]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def notes(found: Record) -> list[str]:
    """Return the notes below the tables."""
    differences = {name: arm["difference"] for name, arm in found["arms"].items() if "difference" in arm}
    lines = [
        f"{counted(found['questions'], 'question')} about {counted(found['images'], 'image')}; equal {found['equal']}; "
        "± is the standard deviation over seeds.",
        "Intervals cover seeds and images. p is of a test that exchanges two arms' scores image by image, jointly over "
        "seeds and conditional on these seeds, with Holm's correction over the arms.",
        "detectable: the smallest difference that is found with 80 % power. A difference is reported where that test "
        "and one over seeds and images find it at 5 %.",
    ]
    schedules = {name: arm["schedule"] for name, arm in found["arms"].items() if arm["schedule"]}
    if len(set(schedules.values())) == 1:
        lines.append(f"schedule of all arms: {next(iter(schedules.values()))}")
    else:
        lines += [f"schedule of {name}: {schedule}" for name, schedule in schedules.items()]
    if any(one["interval"] is None for one in differences.values()):
        lines.append("* Fewer than three seeds: the interval covers images only, conditional on these seeds.")
    for arm, one in differences.items():
        seeds = "" if one["interval"] or one["verdict"].startswith("no ") else ", with these seeds"
        lines.append(f"{arm}: {one['verdict']}{seeds}")
        if one["pairs"] < len(found["arms"][arm]["scores"]):
            lines.append(f"{arm}: the difference is over {counted(one['pairs'], 'seed')} that the baseline has too")
    lines += [f"{run} failed or is missing: {error}" for run, error in found["failed"].items()]
    return lines


def text(found: Record) -> str:
    """Return the tables and notes for the terminal."""
    below = "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in notes(found))
    return "\n\n".join([aligned(comparison(found)), aligned(costs(found)), below])


def markdown(found: Record) -> str:
    """Return a page with motivation, tables, notes, and published findings."""
    parts = [f"# {found['title']}", found["motivation"], piped(comparison(found)), piped(costs(found))]
    parts.append("\n".join(f"- {line}" for line in notes(found)))
    if found["published"]:
        listed = [f"- {one['finding']} ({one['source']})" for one in found["published"]]
        parts.append("\n".join(["Published findings, on other data and models:", "", *listed]))
    return "\n\n".join(parts) + "\n"


def latex(found: Record) -> str:
    """Return the comparison as a LaTeX table with booktabs."""
    head, *rows = [[_escaped(cell) for cell in row] for row in comparison(found)]
    lines = [
        r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(f"% {line}" for line in notes(found)),
    ]
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    return "".join(LATEX.get(character, character) for character in cell)
