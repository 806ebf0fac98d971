"""Every study of conf/study at its smoke size, and studies whose result is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.scripts import call, done
from vlmvqa.paths import CONF

STUDIES = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))
QUIET = ("logger=none", "log_samples=0", "attributions=0", "report=false")


def run_study(name: str, folder: Path, *given: str, base: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a study; return the content of study.json."""
    more = [f"base={setting}" for setting in (*QUIET, *base)]
    done(call("study", f"study={name}", f"run.dir={folder}", *given, *more))
    return dict(json.loads((folder / "study.json").read_text()))


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if one == "loss" else pytest.mark.long) for one in STUDIES]
)
def test_every_study_is_planned_and_runs_at_its_smoke_size(name: str, tmp_path: Path) -> None:
    """Each arm is planned, trained and scored; test_study.py has more on `mask`."""
    done(call("plan", f"study={name}", "plan.gpus=1", f"run.dir={tmp_path / 'plan'}"))
    planned = json.loads((tmp_path / "plan" / "plan.json").read_text())["arms"]
    found = run_study(name, tmp_path / "study", "size=smoke", "seeds=[0]", base=(f"data.root={tmp_path / 'shapes'}",))
    assert found["arms"].keys() == planned.keys() and all(plan["fits"] for plan in planned.values())
    assert found["failed"] == {} and len(found["arms"]) == len(list((tmp_path / "study").glob("*/seed-0/metrics.json")))
    assert all(arm["steps"] >= 6 and arm["parameters"]["trained"] for arm in found["arms"].values())


@pytest.mark.long
@pytest.mark.timeout(1800)  # nine trainings of a minute
def test_a_null_arm_and_shuffled_images(tmp_path: Path) -> None:
    """Other seeds of the same config make no difference; images of other questions make the model worse.

    The shapes of the demo, fewer of them; the model is past the answers that need no image.
    """
    root, shuffled = tmp_path / "shapes", tmp_path / "shuffled"
    sizes = ("data.options.train_images=1500", "data.options.val_images=150", "trainer.num_train_epochs=7")
    base = (f"data.root={root}", *sizes, "copy_images=false", "trainer.eval_strategy=no")
    given = (f"study.arms.causal=['data.root={shuffled}','model.attention_pattern=blockwise_prefix']", "arms=[causal]")
    null = run_study("mask", tmp_path / "null", "arms=[]", "seeds=[3,4,5]", base=base)
    assert null["arms"].keys() == {"blockwise_prefix"}
    shutil.copytree(root, shuffled)
    images = sorted((shuffled / "train2014").iterdir())
    aside = [image.rename(image.with_suffix(".aside")) for image in images]
    for image, other in zip(images, [*aside[1:], aside[0]], strict=True):
        other.rename(image)
    runs = ",".join(str(tmp_path / "null" / "blockwise_prefix" / f"seed-{seed}") for seed in (3, 4, 5))
    found = run_study("mask", tmp_path / "study", *given, f"runs={{other_seeds:[{runs}]}}", base=base)
    worse, equal = (found["arms"][name]["difference"] for name in ("causal", "other_seeds"))
    assert equal["verdict"] == "no difference detected" and equal["pairs"] == 3
    assert worse["verdict"] == "worse" and worse["p_holm"] < 0.01 and worse["p_value"] < 0.01


@pytest.mark.long
def test_a_launcher_starts_a_job_for_each_seed(tmp_path: Path) -> None:
    """Submitit's local executor: two processes work on one study, and the table has the runs of both."""
    given = ("study=mask", "size=smoke", "arms=[causal]", "seeds=[0],[1]", f"run.dir={tmp_path / 'study'}")
    base = [f"base={setting}" for setting in (*QUIET, f"data.root={tmp_path / 'shapes'}")]
    done(call("study", "-m", "hydra/launcher=submitit_local", *given, *base))
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    assert found["failed"] == {} and list(found["arms"]["causal"]["scores"]) == ["0", "1"]
