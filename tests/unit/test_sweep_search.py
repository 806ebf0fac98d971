"""The files of conf/sweep, mistakes in a search space, proposals, pruning decisions and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tests.configs import config
from vlmvqa.config.overrides import compose
from vlmvqa.errors import InputError
from vlmvqa.extras.sweep.command_line import compose_sweep
from vlmvqa.extras.sweep.report import page, summarize, text
from vlmvqa.extras.sweep.search import JOURNAL, Pruning, Search
from vlmvqa.extras.sweep.settings import SweepConfig, check_space, trial_config
from vlmvqa.extras.sweep.space import override, read_space
from vlmvqa.paths import CONF

SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


def sweep(folder: Path, *given: str) -> SweepConfig:
    return config(SweepConfig, "sweep", "sweep=learning_rate", f"run.dir={folder}", *given)


def test_a_sweep_must_be_chosen() -> None:
    with pytest.raises(InputError, match=r"sweep must be given; use sweep=\.\.\. with one of learning_rate"):
        check_space(config(SweepConfig, "sweep"))


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes(name: str, tmp_path: Path) -> None:
    found = config(SweepConfig, "sweep", f"sweep={name}", "size=smoke", "seed=3", f"run.dir={tmp_path}")
    assert check_space(found) == "vqa_accuracy"
    first = {key: parameter.checked[0] for key, parameter in found.space.items()}
    run = trial_config(found, 7, first)
    assert (run.run.folder, run.seed, run.resume) == (tmp_path / "trial-7", 3, "auto")
    assert run.trainer["learning_rate"] == 1e-4 and not run.report


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["trials=0"], "trials=0 should be a whole number, at least 1"),
        (["size=small"], "size=small is unknown"),
        (["sweep.space.trainer.learning_rate.low=1"], "low=1 must be below high=0.01 and above 0, because of log=true"),
        (["sweep.space.trainer.learning_rate.low=a"], "sweep.space.trainer.learning_rate.low=a should be a number"),
        (["sweep.space.trainer.learning_rate.lo=1"], "has no key 'lo'; did you mean 'low'"),
        (["sweep.space.trainer.weight_decay={low:0,high:0.1,choices:[1]}"], "has choices and a range"),
        (["sweep.space.model.projector.kind={choices:linear}"], "should be a list of texts, numbers"),
        (["sweep.space.clip_percentile=95"], "should be a range {low: .., high: ..} or {choices: [..]}"),
        (["sweep.space.trainer.weigth_decay={choices:[0.1]}"], "there is no key 'trainer.weigth_decay'"),
        (["sweep.space.trainer.optim={choices:[adamw_torch,adam]}"], "trainer.optim=adam has no states"),
        (["sweep.space.seed={choices:[0,1]}"], "seed cannot be set in a sweep: it is not the same in all runs"),
        (["base=trainer.learning_rate=1e-3"], "the sweep searches trainer.learning_rate; leave it out"),
        (["base=trainer.eval_strategy=no"], "sweep.pruning compares evaluations during training"),
        (["base=data=mixture"], "a sweep compares one"),
        (["sweep.space.data.metric={choices:[vqa_accuracy,anls]}"], "changes data.metric"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(given: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as found:
        check_space(sweep(tmp_path, *given))
    assert sentence in str(found.value)


def test_a_given_range_or_choice_replaces_a_part_of_the_files(tmp_path: Path) -> None:
    nested = {"trainer": {"learning_rate": {"high": 1}}, "model": {"projector": {"kind": {"low": 1, "high": 3}}}}
    (values,) = (job.values for job in compose(["sweep=learning_rate"], "sweep").jobs)
    found = read_space({**values["sweep"]["space"], **nested})
    assert (found["trainer.learning_rate"].low, found["trainer.learning_rate"].high) == (1e-4, 1)
    assert found["model.projector.kind"].checked == (1, 3)  # a range instead of choices
    assert len(compose_sweep(values)) == 3  # the ends of one, and the choices of the other


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (None, "null"), (1e-05, "1e-05"), (3, "3"), ("mlp", "mlp"), ("a b", "'a b'")]
)
def test_values_in_the_grammar_of_the_command_line(value: Any, text: str) -> None:
    assert override("a.b", value) == f"a.b={text}"


def proposals(search: Search, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        asked = search.next_trial()
        assert asked is not None
        found.append(asked[1])
        search.study.tell(search.trial, 50 + 1e4 * asked[1]["trainer.learning_rate"])
    return found


def test_proposals_are_the_same_after_a_kill(tmp_path: Path) -> None:
    """In the middle of a trial, and while the journal is written."""
    given = ("sweep.startup_trials=3", "trials=7")
    whole = proposals(Search(sweep(tmp_path / "whole", *given)), 7)
    proposals(Search(sweep(tmp_path / "parts", *given)), 4)
    interrupted = Search(sweep(tmp_path / "parts", *given))
    assert interrupted.next_trial() == (4, whole[4])
    interrupted.trial.report(3.0, 5)
    with (tmp_path / "parts" / JOURNAL).open("a") as journal:
        journal.write('{"op_code": 4, "wor')
    (tmp_path / "parts" / f"{JOURNAL}.lock").symlink_to(tmp_path / "parts" / JOURNAL)
    assert proposals(Search(sweep(tmp_path / "parts", *given)), 3) == whole[4:]
    last = Search(sweep(tmp_path / "parts", *given))
    assert last.next_trial() is None and last.study.trials[4].intermediate_values == {5: 3.0}
    assert len({str(one) for one in whole}) == 7
    assert all(len(f"{one['trainer.learning_rate']:.16g}".replace(".", "").lstrip("0")) <= 4 for one in whole)


def test_a_range_of_whole_numbers_and_choices_of_other_types(tmp_path: Path) -> None:
    more = "sweep.space.data.questions_per_row={choices:[null,1]}"
    search = Search(sweep(tmp_path, "sweep.space.trainer.num_train_epochs={low:1,high:3}", more))
    found = proposals(search, 8)
    assert {one["trainer.num_train_epochs"] for one in found} <= {1, 2, 3}
    assert {one["data.questions_per_row"] for one in found} == {None, 1}


def evaluated(search: Search, scores: dict[int, float]) -> Pruning:
    """A callback after these evaluations of the trial that was asked for last."""
    callback, arguments = Pruning(search.trial, "vqa_accuracy"), TrainingArguments(use_cpu=True)
    for step, score in scores.items():
        control, state = TrainerControl(), TrainerState(global_step=step, max_steps=12)
        callback.on_evaluate(arguments, state, control, {"eval_vqa_accuracy": score})
        assert control.should_training_stop == callback.pruned
    return callback


def test_a_trial_below_the_median_is_pruned(tmp_path: Path) -> None:
    """Unless it ends anyway; evaluations that are repeated after a kill were decided before it."""
    given = sweep(tmp_path, "sweep.pruning.startup_trials=1", "trials=4")
    search = Search(given)
    search.next_trial()
    assert not evaluated(search, {4: 10.0, 8: 20.0, 12: 30.0}).pruned
    search.study.tell(search.trial, 30.0)
    search.next_trial()
    assert not evaluated(search, {4: 10.0, 8: 25.0, 12: 26.0}).pruned
    search.study.tell(search.trial, 26.0)
    search.next_trial()
    assert evaluated(search, {4: 15.0, 8: 16.0}).pruned  # 22.5 is the median
    again = Search(given)
    assert again.next_trial() is not None and again.trial.number == 2
    assert not evaluated(again, {4: 15.0}).pruned
    callback = evaluated(again, {8: 16.0})
    for step, ends in ((4, False), (8, True), (12, False)):  # resumed: only at the pruned evaluation, before the end
        resumed, control = Pruning(again.trial, "vqa_accuracy"), TrainerControl()
        resumed.on_train_begin(TrainingArguments(use_cpu=True), TrainerState(global_step=step, max_steps=12), control)
        assert resumed.pruned == control.should_training_stop == ends
    with pytest.raises(optuna.TrialPruned):
        callback.on_train_end(TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())


def test_the_report(tmp_path: Path) -> None:
    given = sweep(tmp_path, "sweep.startup_trials=4", "trials=13", "sweep.title=A <search>", "run.name=s")
    search = Search(given)
    proposals(search, 11)
    search.next_trial()
    search.trial.report(12.5, 4)
    assert search.finish(None, pruned=True) == "trial 11: pruned"
    search.next_trial()
    assert search.finish("too large;\nlower it", pruned=False).startswith("trial 12 failed: too large")
    found = summarize(search.study, given, "vqa_accuracy")
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 11 + ["pruned", "fail"]
    assert found["trials"][11]["score"] == 12.5 and found["trials"][12]["error"] == "too large;\nlower it"
    best = max(found["trials"][:11], key=lambda trial: trial["score"])
    assert found["best"]["number"] == best["number"]
    assert f"trainer.learning_rate={best['parameters']['trainer.learning_rate']!r}" in found["best"]["command"]
    assert found["importance"]["trainer.learning_rate"] > 0.5 and sum(found["importance"].values()) == pytest.approx(1)
    printed, html = text(found), page(found)
    assert max(map(len, printed.splitlines())) <= 100 and "importance: trainer.learning_rate " in printed
    assert "(lower" in printed and "   11  pruned      12.50" in printed
    assert "A &lt;search&gt;" in html and html.count("<svg") == 2 and "share of importance" in html


def test_other_settings_are_refused_and_overwriting_deletes_the_trials(tmp_path: Path) -> None:
    proposals(Search(sweep(tmp_path)), 1)
    (tmp_path / "trial-0").mkdir()
    with pytest.raises(InputError, match="seed, space differ from the sweep's first start"):
        Search(sweep(tmp_path, "seed=1", "sweep.space.trainer.learning_rate.high=1"))
    assert len(Search(sweep(tmp_path, "seed=1", "run.overwrite=true")).study.trials) == 0
    assert not (tmp_path / "trial-0").exists()
