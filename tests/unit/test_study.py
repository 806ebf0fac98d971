"""The files of conf/study, mistakes on the command line, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from tests.configs import config
from tests.conftest import ROOT
from vlmvqa.errors import InputError
from vlmvqa.extras.report.text_tables import piped
from vlmvqa.extras.study import tables
from vlmvqa.extras.study.results import RunResult, summarize
from vlmvqa.extras.study.settings import StudyConfig, StudyRun, build_arms, study_runs
from vlmvqa.paths import CONF

TWO_ARMS = ("study=mask", "arms=[causal]")  # the baseline and one more
STUDIES = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))


def study(*given: str) -> StudyConfig:
    return config(StudyConfig, "study", *given)


def build_runs(found: StudyConfig) -> list[StudyRun]:
    return study_runs(found, build_arms(found))


@pytest.mark.parametrize(("name", "size"), [*((name, "full") for name in STUDIES), ("mask", "smoke")])
def test_every_study_composes(name: str, size: str, tmp_path: Path) -> None:
    found = study(f"study={name}", f"size={size}", "seeds=[3,5]", f"run.dir={tmp_path}")
    runs = build_runs(found)
    assert found.study is not None and len(runs) == 2 * len(found.study.arms)
    assert runs[0].arm == found.study.baseline and {run.seed for run in runs} == {3, 5}
    assert runs[0].folder == tmp_path / found.study.baseline / "seed-3" and runs[0].config.seed == 3
    configs = {f"{run.config.model} {run.config.data} {run.config.trainer} {list(run.config.stages)}" for run in runs}
    others = {str(run.config.trainable) + str(run.config.learning_rates) + run.config.loss_weighting for run in runs}
    assert len(configs) > 1 or len(others) > 1  # the arms differ


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "study must be given; use study=... with one of encoder, "),
        (["study=mask", "size=small"], "size=small is unknown"),
        (["study=mask", "seeds=[1,1]"], "must be different numbers"),
        (["study=mask", "arms=[casual]"], "there is no arm 'casual'; did you mean 'causal'"),
        ([*TWO_ARMS, "base=seed=3"], "it is not the same in all runs"),
        ([*TWO_ARMS, "base=hub_id=a/b"], "it is not the same in all runs"),
        ([*TWO_ARMS, "base=data=mixture"], "a study compares one"),
        ([*TWO_ARMS, "runs={causal:[runs/a]}"], "the study has an arm of this name"),
        ([*TWO_ARMS, "runs={other:[nowhere/at/all]}"], "runs.other"),
        ([*TWO_ARMS, "base=modl=tiny"], "there is no key 'modl'; did you mean 'model=tiny'"),
        ([*TWO_ARMS, "base=trainer.max_steps=9"], "drop trainer.max_steps"),
        ([*TWO_ARMS, "study.equal=steps"], "study.equal=steps sets the length by trainer.max_steps"),
        ([*TWO_ARMS, "base=trainer.early_stopping_patience=3"], "leave it out of a study"),
        (["study=mask", "study.equal=time"], "study.equal=time is unknown"),
        ([*TWO_ARMS, "study.arms.causal=['trainer.num_train_epochs=2']"], "needs the same trainer.num_train_epochs"),
        ([*TWO_ARMS, "study.arms.causal=['model.projector.kidn=mlp']"], "1 of 2 arms cannot run: causal: "),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(given: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence.replace("(", "\\(")):
        build_runs(study(*given))


def test_an_experiment_replaces_the_studys_model_and_data(tmp_path: Path) -> None:
    """The command of docs/studies.md."""
    (tmp_path / "vqav2").mkdir()
    more = ("base=experiment=vlm_vqa_4xa10g", f"base=data.root={tmp_path / 'vqav2'}", "base=trainer.bf16=false")
    runs = build_runs(
        study("study=mask", f"run.dir={tmp_path}", *more, "base=dist=ddp", "base=trainer.optim=adamw_torch")
    )
    found = runs[1].config
    assert found.data.source == "vqav2" and found.trainer["gradient_accumulation_steps"] == 10
    assert found.model.language.name == "google/gemma-2-2b" and found.model.attention_pattern == "causal"


def test_a_saved_model_replaces_the_studys_model(tmp_path: Path) -> None:
    given = study("study=loss", f"run.dir={tmp_path}", "base=init_from=org/name")
    assert all(
        "model" not in run.config.given and run.config.init_from == {"model": "org/name"} for run in build_runs(given)
    )


def results(folder: Path, scores: dict[str, list[list[float]]]) -> dict[str, dict[str, RunResult]]:
    """Runs by arm and seed, of questions with these scores, two for each image."""
    found: dict[str, dict[str, RunResult]] = {}
    for arm, seeds in scores.items():
        for seed, values in enumerate(seeds):
            records = {
                number: {"image_id": number // 2, "question": "?", "answers": ["a"], "vqa_accuracy": value}
                for number, value in enumerate(values)
            }
            metrics = {
                "metric": "vqa_accuracy",
                "metric_version": "1",
                "data": "shapes",
                "split": "val",
                "controls": {"prior": {"overall": 30.0}},
            }
            part = folder / arm / f"seed-{seed}"
            numbers, measured = {"trained": 5, "total": 9}, {"questions_per_second": 70.0}
            run = RunResult(part, metrics, records, 100, "cosine, rate 0.001", numbers, measured)
            found.setdefault(arm, {})[str(seed)] = run
    return found


def summary(folder: Path, scores: dict[str, list[list[float]]], failed: dict[str, str]) -> dict[str, Any]:
    given = study("study=mask", f"run.dir={folder}")
    assert given.study is not None
    content = summarize(given.study, results(folder, scores), failed, folder)
    return dict(json.loads(json.dumps(content)))


def test_the_tables(tmp_path: Path) -> None:
    good, bad = [100.0, 0.0] * 40, [0.0, 0.0] * 40
    scores = {"blockwise_prefix": [good] * 3, "causal": [bad] * 3, "image_prefix": [good] * 3}
    found = summary(tmp_path, scores, {"prefix_lm/seed-0": "not finished"})
    assert found["arms"]["causal"]["mean"] == 0 and found["arms"]["causal"]["difference"]["difference"] == -50
    assert found["arms"]["causal"]["folders"]["2"] == "causal/seed-2"
    text = tables.text(found)
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "-50.00",
        "causal: worse",
        "image_prefix: no difference detected",
        "prefix_lm/seed-0 failed or is",
        "all arms: cosine",
    ):
        assert part in text
    assert "±" in tables.markdown(found) and "fewer" not in text.lower()
    lines = tables.latex(found).splitlines()
    assert lines[2].count("&") == lines[4].count("&") == 6 and r"VQA accuracy (\%)" in lines[2]


def test_means_and_deviations_over_seeds_are_scipys(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(50, 20, (4, 60))
    found = summary(tmp_path, {"blockwise_prefix": values.tolist(), "causal": (values + 1)[:3].tolist()}, {})
    expected = scipy.stats.describe(values.mean(1))
    baseline = found["arms"]["blockwise_prefix"]
    assert (baseline["mean"], baseline["deviation"]) == pytest.approx((expected.mean, expected.variance**0.5))
    causal = found["arms"]["causal"]["difference"]
    assert causal["difference"] == pytest.approx(1) and causal["pairs"] == 3  # of the seeds that both have


def test_two_seeds_have_no_interval_over_seeds(tmp_path: Path) -> None:
    good, bad = [100.0, 0.0] * 40, [0.0, 0.0] * 40
    text = tables.text(summary(tmp_path, {"blockwise_prefix": [good] * 2, "causal": [bad] * 2}, {}))
    assert "* Fewer than three seeds" in text and "causal: worse, with these seeds" in text


def test_runs_of_other_questions_are_refused(tmp_path: Path) -> None:
    scores = {"blockwise_prefix": [[100.0] * 8], "causal": [[100.0] * 6]}
    with pytest.raises(InputError, match="cannot be compared: they differ by 2 questions"):
        summary(tmp_path, scores, {})


def test_the_documented_table_is_the_recorded_one() -> None:
    """And its controls, which the text rounds."""
    found = json.loads((ROOT / "bench" / "recorded" / "study_mask.json").read_text())
    page = (ROOT / "docs" / "results.md").read_text()
    assert piped(tables.comparison(found)) in page
    shuffled = [arm["controls"]["shuffled"] for arm in found["arms"].values()]
    assert (
        round(min(shuffled)) == 40
        and round(max(shuffled)) == 41
        and f"{found['questions']:,} questions to score" in page
    )
