"""What else a user can get wrong, or meet while training: one sentence, exit status 1, nothing lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.scripts import SMALL, TRAIN_IMAGE, call, content, done, launch, sentence, truncate
from vlmvqa.training.checkpoints import complete_checkpoints
from vlmvqa.training.log import read_log

# --- checkpoints and run folders ----------------------------------------------------------------------


def test_a_wrong_checkpoint_is_named(tmp_path: Path, whole: Path, trained: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut, broken = tmp_path / "cut", tmp_path / "broken"
    for copied in (cut, broken):
        shutil.copytree(trained / "model", copied)
    truncate(cut / "model.safetensors")
    truncate(broken / "config.json")
    wrong = {
        str(tmp_path / "nowhere"): f"; the nearest is {tmp_path}; name a run's folder",
        str(tmp_path / "empty"): "is not a saved model: it is an empty folder",
        "someone/nowhere": "neither a folder here nor readable from the hub",
        "runs/my first run": "my first run",
        str(cut): str(cut / "model.safetensors"),
        str(broken): str(broken / "config.json"),
    }
    evaluated = ("data=vqav2", f"data.root={whole}", f"run.dir={tmp_path / 'run'}")
    asked = (f"image={whole / TRAIN_IMAGE}", "question=What is it?", f"run.dir={tmp_path / 'run'}")
    for checkpoint, problem in wrong.items():
        for script, rest in (("eval", evaluated), ("predict", asked)):
            said = sentence(call(script, f"checkpoint={checkpoint}", *rest))
            named = (f"error: {checkpoint}", f"error: no model at {Path(checkpoint).absolute()}")
            assert said.startswith(named) and problem in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path: Path, whole: Path, trained: Path) -> None:
    before = content(trained)
    data = ("data=vqav2", f"data.root={whole}", f"run.dir={trained}")
    for script, rest in (("train", SMALL), ("eval", (f"checkpoint={trained}",))):
        said = sentence(call(script, *data, *rest))
        assert str(trained) in said and "already holds" in said and "run.overwrite=true" in said
    assert content(trained) == before


def test_a_run_that_failed_before_its_first_step_does_not_keep_its_name(tmp_path: Path, root: Path) -> None:
    """The same command works once its picture is mended; resume=auto says that there is nothing to go on from."""
    given = ("data=vqav2", f"data.root={root}", f"run.dir={tmp_path / 'run'}", *SMALL)
    whole = (root / TRAIN_IMAGE).read_bytes()
    truncate(root / TRAIN_IMAGE)
    sentence(call("train", *given))
    (root / TRAIN_IMAGE).write_bytes(whole)
    for more in ((), ("run.overwrite=true",)):
        done(call("train", *given, *more))
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "run" / "config.yaml", tmp_path / "empty")
    again = done(call("train", *given[:2], f"run.dir={tmp_path / 'empty'}", *SMALL, "resume=auto"))
    assert "empty holds no checkpoint yet, so training starts from the beginning" in again.out


@pytest.mark.parametrize("how", ["run.overwrite=true", "resume=auto"])
@pytest.mark.parametrize(
    "wrong",
    [
        "data.root=/nowhere",
        "data.prompt=what",
        "model.attention_pattern=prefixlm",
        "model.vision.name=vit_bas_patch14_dinov2",
        "trainable.vision=7",
        "trainer.optim=adam",
        "data.on_bad_record=skipp",
    ],
)
def test_a_run_outlives_a_mistake_in_the_command_that_was_to_replace_it(
    tmp_path: Path, whole: Path, trained: Path, how: str, wrong: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    before = content(folder)
    sentence(call("train", "data=vqav2", f"data.root={whole}", f"run.dir={folder}", *SMALL, how, wrong))
    assert content(folder) == before


# --- the command line ---------------------------------------------------------------------------------


PROMPT_RULE = "must hold {question} once, and no other braces"
# what is given: what the sentence must say
MISSPELT: dict[str, tuple[str, ...]] = {
    "trainer.learning_rte=1": ("no key 'trainer.learning_rte'; did you mean 'trainer.learning_rate=1'?",),
    "trainer.adam_beta=0.9": ("no key 'trainer.adam_beta'; did you mean 'trainer.adam_beta",),
    "data.rooot=x": ("no key 'data.rooot'; did you mean 'data.root=x'?",),
    "model=tinny": ("model=tinny: there is no conf/model/tinny.yaml; did you mean 'tiny'?",),
    "data=vqav": ("data=vqav: there is no conf/data/vqav.yaml; did you mean 'vqav2'?",),
    "modle=tiny": ("no key 'modle'; did you mean 'model=tiny'?",),
    "+foo=1": ("no key 'foo'",),
    "+trainer.foo=1": ("no key 'trainer.foo'",),
    "model.attention_pattern=prefixlm": ("model.attention_pattern=prefixlm is unknown", "did you mean 'prefix_lm'?"),
    "model.vision.overrides.depht=3": ("model.vision.overrides", "'depht'", "did you mean 'depth'?"),
    "model.language.overrides.hiden_size=3": (
        "model.language.overrides",
        "'hiden_size'",
        "did you mean 'hidden_size'?",
    ),
    "trainer.optim=adamw_tork": ("trainer", "adamw_tork"),
    "trainer.max_steps=many": ("max_steps", "many"),
    "data.on_bad_record=skipp": ("data.on_bad_record=skipp is unknown; use one of error, skip",),
    "data.train_split=trian": ("'trian'", "did you mean 'train'?"),
    "trainable.vision=most": ("trainable.vision=most is unknown",),
    "resume=yes": ("resume=", "is unknown; use resume=auto"),
    "log_samples=-1": ("log_samples=-1 should be a whole number, at least 0",),
    "attributions=many": ("attributions=many should be a whole number",),
    "data.prompt={question} in {language}": ("data.prompt='{question} in {language}'", PROMPT_RULE),
    "data.prompt={question} {question}": ("data.prompt='{question} {question}'", PROMPT_RULE),
}


@pytest.mark.parametrize("wrong", MISSPELT)
def test_a_misspelt_key_or_choice_is_refused_with_the_nearest_right_one(
    tmp_path: Path, whole: Path, wrong: str
) -> None:
    folder = tmp_path / "run"
    ended = call("train", "data=vqav2", f"data.root={whole}", f"run.dir={folder}", *SMALL, wrong)
    assert all(part in sentence(ended) for part in MISSPELT[wrong]), sentence(ended)
    assert not (folder / "log.jsonl").exists()  # so the right command may follow in the same folder


def test_a_misspelt_key_costs_one_line_and_nothing_else(tmp_path: Path) -> None:
    ended = call("train", "trainer.learning_rte=1", f"run.dir={tmp_path / 'run'}")
    assert ended.err == "error: there is no key 'trainer.learning_rte'; did you mean 'trainer.learning_rate=1'?\n"
    assert ended.out == "" and not (tmp_path / "run").exists()


def test_how_activations_are_recomputed_is_not_to_be_set(tmp_path: Path, whole: Path) -> None:
    asked = ("trainer.activation_checkpointing=true", "trainer.activation_checkpointing_kwargs={use_reentrant: true}")
    ended = call("train", "data=vqav2", f"data.root={whole}", f"run.dir={tmp_path / 'run'}", *SMALL, *asked)
    assert sentence(ended) == (
        "error: trainer.activation_checkpointing_kwargs cannot be set: leave it out, there is only one method"
    )
    assert not (tmp_path / "run" / "log.jsonl").exists()


# --- during training ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_training_at_the_last_good_checkpoint(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    changed = ("trainer.max_steps=8", "trainer.save_steps=1", "trainer.save_total_limit=8")
    data = ("data=vqav2", f"data.root={whole}", f"run.dir={folder}")
    ended = call("train", *data, *SMALL, *changed, "trainer.learning_rate=1e30")
    kept = complete_checkpoints(folder)
    said = sentence(ended)
    assert kept and f"the last good checkpoint is {kept[-1]};" in said
    assert "nan" in said or "inf" in said
    weights = load_file(kept[-1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    step = int(kept[-1].name.removeprefix("checkpoint-"))
    assert f"at step {step + 1}," in said
    assert [record["step"] for record in read_log(folder / "log.jsonl") if "loss" in record] == list(range(1, step + 1))


@pytest.mark.slow
@pytest.mark.parametrize("full_at", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_costs_one_sentence_and_no_good_checkpoint(tmp_path: Path, whole: Path, full_at: str) -> None:
    """On a small tmpfs in a mount namespace of its own, which has room for one checkpoint and a part of the next."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size=$SIZE none {disk} || exit 99"
    namespace = ("env", "SIZE=1m", "unshare", "-rm", "sh", "-c")
    try:
        probe = subprocess.run([*namespace, inside], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if probe.returncode:
        pytest.skip(f"unshare or its mount is refused here: {probe.stderr.strip()}")

    # So large that what a removed part of a checkpoint frees looks like a disk with room.
    changed = ("model.language.overrides.intermediate_size=8192", "trainer.save_steps=1", "trainer.max_steps=3")
    data = ("data=vqav2", f"data.root={whole}", *SMALL, *changed)
    done(call("train", *data, "trainer.max_steps=1", f"run.dir={tmp_path / 'measured'}"))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "measured" / "checkpoint-1").iterdir()}
    room = sum(sizes.values()) + sizes["model.safetensors"] // 2
    if full_at == "optimizer.pt":
        room += sizes["model.safetensors"]

    script = f'{inside}; "$@"; status=$?; cp -r {disk}/run {kept}; exit $status'
    before = (*namespace[:1], f"SIZE={room}", *namespace[2:], script, "sh")
    said = sentence(launch("train", *data, f"run.dir={disk / 'run'}", before=before))
    assert "full" in said and f"{disk / 'run' / 'checkpoint-1'} is complete" in said and "resume=auto" in said
    assert [path.name for path in kept.glob("*checkpoint*")] == ["checkpoint-1"]
    assert [path.name for path in complete_checkpoints(kept)] == ["checkpoint-1"]
    assert sorted(path.name for path in (kept / "checkpoint-1").iterdir()) == sorted(sizes)
