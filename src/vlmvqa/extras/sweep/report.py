"""The report of a sweep: `sweep.json`, the printed table, and `report.html` with plots."""

from __future__ import annotations

import json
import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import optuna
from markupsafe import Markup
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from vlmvqa.config.help import as_installed
from vlmvqa.extras.report.curves import INK, LINE, OTHER, SECOND, plot_axes, svg_figure
from vlmvqa.extras.report.templates import template
from vlmvqa.extras.run_series.settings import latest
from vlmvqa.extras.sweep.search import RECORD
from vlmvqa.extras.sweep.settings import SweepConfig
from vlmvqa.extras.sweep.space import override
from vlmvqa.metrics.registry import metric
from vlmvqa.paths import CALLED_AS, replace_file
from vlmvqa.training.log import read_log

WIDTH = 99  # columns of the terminal
LEAST = 10  # complete trials for the importance of parameters
BEST_SHARE = 0.25  # of the trials, which importance compares with the others


def write_report(study: optuna.Study, config: SweepConfig, metric_name: str) -> None:
    """Write the report of the trials that have ended, and print their table."""
    folder = config.run.folder
    found = summarize(study, config, metric_name)
    replace_file(folder / "sweep.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    replace_file(folder / "report.html", page(found))
    print(f"\n{text(found)}\n\nsweep: {folder / 'report.html'}, {folder / 'sweep.json'}")


def summarize(study: optuna.Study, config: SweepConfig, metric_name: str) -> dict[str, Any]:
    """Return the content of `sweep.json`."""
    record, trials = study.user_attrs[RECORD], []
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            continue
        log = read_log(config.run.folder / f"trial-{trial.number}" / "log.jsonl")
        one = {
            "number": trial.number,
            "parameters": trial.params,
            "state": trial.state.name.lower(),
            "score": trial.value,
            "steps": max((line["step"] for line in log), default=0),
            "report": (config.run.folder / f"trial-{trial.number}" / "report.html").is_file(),
        }
        trials.append({**one, **({"error": trial.user_attrs["error"]} if "error" in trial.user_attrs else {})})
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = None
    if complete:
        best = max(complete, key=lambda trial: trial["score"])  # of equal ones the first
        settings = [*record["base"], *(override(key, value) for key, value in best["parameters"].items())]
        run = [f"seed={record['seed']}", f"run.name={config.run.name}-best"]
        words = shlex.join([*latest(settings), *run])
        best = {"number": best["number"], "score": best["score"], "command": f"python launch/train.py {words}"}
    importance = None
    if len(complete) >= LEAST and len(complete[0]["parameters"]) > 1:
        importance = get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE), normalize=True
        )
    return {
        "title": config.search.title,
        "metric": metric_name,
        "size": record["size"],
        "seed": record["seed"],
        "trials": trials,
        "best": best,
        "importance": importance,
    }


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each trial: number, state, score, steps, settings or error."""
    cells = []
    for trial in found["trials"]:
        score = "-" if trial["score"] is None else f"{trial['score']:.2f}"
        settings = " ".join(override(key, value) for key, value in trial["parameters"].items())
        error = f" ({trial['error'].splitlines()[-1]})" if trial.get("error") else ""
        cells.append([str(trial["number"]), trial["state"], score, f"{trial['steps']:,}", settings + error])
    return cells


def text(found: Mapping[str, Any]) -> str:
    """Return the table for the terminal, and the command that repeats the best trial."""
    lines = [
        f"{found['title']}: {metric(found['metric']).title}",
        f"{'trial':>5}  state     {'score':>7}  {'steps':>7}",
    ]
    for number, state, score, steps, settings in rows(found):
        line = f"{number:>5}  {state:<8}  {score:>7}  {steps:>7}  {settings}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=" " * 35, drop_whitespace=True, break_on_hyphens=False)
    if found["importance"]:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in found["importance"].items())
        lines += textwrap.wrap(f"importance: {shares}", WIDTH, subsequent_indent="  ")
    if found["best"]:
        command = found["best"]["command"]
        command = as_installed(command) if CALLED_AS in os.environ else command
        lines += ["", f"best: trial {found['best']['number']}, {found['best']['score']:.2f}; the same run again:"]
        lines.append(" \\\n".join(textwrap.wrap(command, WIDTH - 2, subsequent_indent="    ", break_long_words=False)))
    return "\n".join(lines)


def page(found: Mapping[str, Any]) -> str:
    """Return the HTML report."""
    scored = [trial for trial in found["trials"] if trial["score"] is not None]
    return template("report.html.j2", "vlmvqa.extras.sweep").render(
        found=found,
        rows=[(trial["report"], row) for trial, row in zip(found["trials"], rows(found), strict=True)],
        metric=metric(found["metric"]).title,
        history=draw_history(scored) if scored else None,
        importance=draw_importance(found["importance"]) if found["importance"] else None,
        least=LEAST,
    )


def draw_history(trials: Sequence[Mapping[str, Any]]) -> Markup:
    """Plot the score of each trial, and the best score of complete trials so far."""
    with svg_figure("history", (6.4, 3.2)) as (figure, svg):
        axes = plot_axes(figure)
        for state, color in (("complete", LINE), ("pruned", OTHER)):
            shown = [(trial["number"], trial["score"]) for trial in trials if trial["state"] == state]
            if shown:
                axes.plot(*zip(*shown, strict=True), "o", color=color, ms=4, zorder=3)
        complete = [(trial["number"], trial["score"]) for trial in trials if trial["state"] == "complete"]
        if complete:
            numbers, scores = zip(*complete, strict=True)
            best = [*accumulate(scores, max)]
            # The best score so far holds until the last trial.
            axes.step([*numbers, trials[-1]["number"]], [*best, best[-1]], where="post", color=SECOND, linewidth=1.5)
        axes.set_xlabel("trial")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return svg[0]


def draw_importance(importance: Mapping[str, float]) -> Markup:
    """Plot the importance of each parameter as a bar."""
    height = 0.7 + 0.35 * len(importance)
    with svg_figure("importance", (6.4, height)) as (figure, svg):
        axes = plot_axes(figure, grid=False)
        axes.barh(range(len(importance)), list(importance.values()), height=0.35, color=LINE)
        for place, key in enumerate(importance):
            axes.text(0, place - 0.25, key, va="bottom", fontsize=8, color=INK)
        axes.set(yticks=[], xlim=(0, 1), ylim=(len(importance) - 0.4, -0.7), xlabel="share of importance")
    return svg[0]
