"""HTML page of a study: tables, differences, curves of the arms, and answers that differ between arms.

One self-contained HTML file like a run's report, and in its style. The template escapes all text. Runs from elsewhere
may have no log, and data may have been deleted: such curves and images are left out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import numpy as np

from vlmvqa.errors import InputError
from vlmvqa.extras.report import curves, gallery
from vlmvqa.extras.report.curves import Band, Points
from vlmvqa.extras.report.scored_data import scored_examples, training_questions
from vlmvqa.extras.report.templates import template
from vlmvqa.extras.study import tables
from vlmvqa.extras.study.results import RunResult
from vlmvqa.metrics.registry import metric

Record = Mapping[str, Any]
Results = Mapping[str, Mapping[str, RunResult]]
MAX_ANSWERS = 12  # questions in the gallery


def write_page(found: Record, results: Results, folder: Path) -> None:
    """Write `report.html`.

    Args:
        found: content of `study.json`.
        results: arm -> seed -> result, the baseline first.
        folder: the study's.
    """
    page = template("report.html.j2", "vlmvqa.extras.study").render(
        found=found,
        title=found["title"],
        comparison=tables.comparison(found),
        costs=tables.costs(found),
        notes=tables.notes(found),
        metric=metric(found["metric"]).title,
        colors=curves.ARM_COLORS,
        differences=_differences(found),
        plots=_plots(found["metric"], results),
        runs=_links(found, folder),
        **_answers(found["metric"], results),
    )
    # Scraped text may contain lone surrogates, which UTF-8 cannot encode.
    (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")


def _differences(found: Record) -> dict[str, Any] | None:
    """Return the plot of the differences to the baseline with its text alternative; None without another arm."""
    rows = [
        (arm, number, one["difference"], one["interval"] or one["image_interval"], one["interval"] is not None)
        for number, (arm, part) in enumerate(found["arms"].items())
        if (one := part.get("difference")) is not None
    ]
    text = "; ".join(f"{arm} {value:+.2f}, {low:+.2f} to {high:+.2f}" for arm, _, value, (low, high), _ in rows)
    if not rows:
        return None
    drawing = curves.draw_intervals(rows, f"difference in {metric(found['metric']).title}")
    return {"text": f"Differences: {text}", "drawing": drawing, "hollow": not all(filled for *_, filled in rows)}


def _links(found: Record, folder: Path) -> dict[str, list[tuple[str, float, str]]]:
    """Return seed, score, and the address of the report ("": none) of each arm's runs."""
    return {
        name: [
            (seed, score, quote(f"{part}/report.html") if (folder / part / "report.html").is_file() else "")
            for (seed, score), part in zip(arm["scores"].items(), arm["folders"].values(), strict=True)
        ]
        for name, arm in found["arms"].items()
    }


# ---- curves


def _plots(name: str, results: Results) -> list[dict[str, Any]]:
    """Return title, text alternative and drawing of each plot that has the curve of an arm."""
    logged = {arm: [run for run in runs.values() if run.steps] for arm, runs in results.items()}
    questions = training_questions([run.folder for runs in logged.values() for run in runs])
    seen = "epochs" if questions is None else "questions seen"
    arms = {
        arm: [_curves(name, run, questions[run.folder] if questions else 1) for run in runs]
        for arm, runs in logged.items()
    }
    score, plots = metric(name).title, []
    for title, label, values, amounts in (
        (f"Training loss by {seen}", seen, "loss", "seen"),
        (f"{score} by {seen}", seen, "score", "seen"),
        (f"{score} by training cost", "floating-point operations", "score", "operations"),
    ):
        bands = {
            number: band
            for number, runs in enumerate(arms.values())
            if (band := _band([(run[values], run[amounts]) for run in runs])) is not None
        }
        if bands:
            ends = (f"{arm} {bands[number].mean[-1]:.3g}" for number, arm in enumerate(arms) if number in bands)
            drawing = curves.draw_bands(title, bands, label, logarithmic=values == "loss")
            plots.append({"title": title, "text": f"{title}; at the end: {', '.join(ends)}", "drawing": drawing})
    return plots


def _curves(name: str, run: RunResult, questions: int) -> dict[str, Points]:
    """Return curves of a run over its steps: loss, score, questions seen, and operations so far."""
    log = run.log
    score = curves.points(log, f"eval_{name}")
    if not score or score[-1][0] < run.steps:
        score.append((run.steps, fmean(run.scores(name).values())))
    trained = [(record["step"], record["tera_flop"]) for record in log if "tera_flop" in record]
    operations = list(accumulate(trained, lambda before, one: (one[0], before[1] + 1e12 * one[1]), initial=(0, 0.0)))
    if trained:  # the steps after the last record are counted like those before it
        step, total = operations[-1]
        operations.append((run.steps, total * run.steps / step))
    return {
        "loss": curves.points(log, "loss"),
        "score": score,
        "seen": [(0, 0), *((record["step"], record["epoch"] * questions) for record in log if "epoch" in record)],
        "operations": operations,
    }


def _band(runs: Sequence[tuple[Points, Points]]) -> Band | None:
    """Return the band of an arm; None without a step that all its runs have passed.

    Args:
        runs: of each run, values and amounts (the x axis) over the steps; runs without either are left out.
    """
    known = [(np.array(values).T, np.array(amounts).T) for values, amounts in runs if values and len(amounts) > 1]
    if not known:
        return None
    first, last = max(values[0][0] for values, _ in known), min(values[0][-1] for values, _ in known)
    steps = [step for step in known[0][0][0] if first <= step <= last]
    if not steps:
        return None
    values, amounts = (np.stack([np.interp(steps, *pair[place]) for pair in known]) for place in (0, 1))
    return Band(amounts.mean(0), values.mean(0), values.min(0), values.max(0))


# ---- answers


def _answers(name: str, results: Results) -> dict[str, Any]:
    """Return the template's values for the answers that differ between the arms' first seeds."""
    first = {arm: next(iter(runs.values())) for arm, runs in results.items()}
    baseline = next(iter(first.values()))
    by_question = {
        question: {arm: run.records[question] for arm, run in first.items()} for question in baseline.records
    }
    different, scored = (
        [question for question, arms in by_question.items() if len({record[key] for record in arms.values()}) > 1]
        for key in ("answer", name)
    )
    generator, others = random.Random(0), sorted(set(different) - set(scored), key=repr)
    chosen = generator.sample(scored, min(MAX_ANSWERS, len(scored)))
    chosen += generator.sample(others, min(MAX_ANSWERS - len(chosen), len(others)))
    thumbnails = _thumbnails(baseline.folder, {baseline.records[question]["image_id"] for question in chosen})
    cards = [
        {
            **gallery.card(baseline.records[question], thumbnails, name),
            "given": {
                arm: {**record, "score": record[name], "right": metric(name).is_correct(record[name])}
                for arm, record in by_question[question].items()
            },
        }
        for question in chosen
    ]
    return {"cards": cards, "different": len(different), "scored": len(scored)}


def _thumbnails(folder: Path, shown: set[Any]) -> dict[Any, str]:
    """Return the images that a run was evaluated on and that are still there, by id as data URIs."""
    found = {}
    with suppress(InputError):
        for example in scored_examples(folder) if shown else ():
            with suppress(InputError):
                if example.image_id in shown:
                    found[example.image_id] = gallery.data_uri(gallery.picture(example))
    return found
