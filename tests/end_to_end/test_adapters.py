"""Adapters as a user trains them: saved alone, resumed as if never stopped, and refused where they cannot be."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlmvqa
from tests import forks
from tests.end_to_end.scripts import call, done, losses, metrics, sentence
from vlmvqa import fingerprint
from vlmvqa.errors import InputError

pytest.importorskip("peft", reason="peft is an extra: pip install 'vlmvqa[adapters]'")

DATA = ("data.row_tokens=null", "data.options.train_images=60", "data.options.val_images=12")
QUIET = ("trainer.report_to=none", "+trainer.use_cpu=true", "trainer.eval_strategy=no", "trainer.logging_steps=1")
STEPS = ("trainer.max_steps=6", "trainer.save_steps=3", "trainer.per_device_train_batch_size=4")
FLOAT = ("model.dtype=float32", "adapt.compute_dtype=float32")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.root={tmp_path_factory.mktemp('shapes')}"


Bases = Callable[[str], Path]


@pytest.fixture(scope="module")
def bases(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Of a family, a model that was trained a little, whole."""

    @functools.cache
    def trained(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        done(call("train", f"model=tiny_{family}", shapes, *DATA, *QUIET, *STEPS, f"run.dir={folder}"))
        return folder

    return trained


@pytest.fixture(scope="module")
def base(bases: Bases) -> Path:
    return bases("paligemma")


Adapted = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def adapted(bases: Bases, shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """The run of an adapter of a kind over the base of a family."""

    @functools.cache
    def trained(family: str, kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "run"
        done(call("train", *adapt(bases(family), shapes, folder, kind)))
        return folder

    return trained


def adapt(base: Path, shapes: str, folder: Path, kind: str, *more: str) -> tuple[str, ...]:
    """The arguments of a small training of adapters over a base."""
    given = (f"init_from={base}", "trainer=tiny_paligemma", f"adapt={kind}", shapes, *DATA, *QUIET, *STEPS, *FLOAT)
    return (*given, "adapt.rank=4", f"run.dir={folder}", *more)


def forget_the_end(run: Path) -> None:
    """As if the run had been killed after its third step."""
    shutil.rmtree(run / "checkpoint-6")
    shutil.rmtree(run / "model")
    (run / "latest").unlink()
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(line for line in log if json.loads(line).get("step", 0) <= 3))


@pytest.mark.parametrize(
    ("family", "kind"), [("paligemma", "lora"), pytest.param("idefics2", "qlora", marks=pytest.mark.slow)]
)
def test_adapters_resume_exactly(
    bases: Bases, adapted: Adapted, shapes: str, family: str, kind: str, tmp_path: Path
) -> None:
    """Six steps, and three steps and three: the same losses and answers. Checkpoints hold the adapters alone."""
    base, through, in_two = bases(family), adapted(family, kind), tmp_path / "two"
    shutil.copytree(through, in_two, symlinks=True)
    forget_the_end(in_two)
    again = done(call("train", *adapt(base, shapes, in_two, kind, "resume=auto")))
    assert f"resuming from {in_two / 'checkpoint-3'}" in again.out
    rest = {step: loss for step, loss in losses(through).items() if step > 3}
    assert {step: loss for step, loss in losses(in_two).items() if step > 3} == rest and len(rest) == 3
    assert (in_two / "predictions.jsonl").read_text() == (through / "predictions.jsonl").read_text()
    last, final = vlmvqa.load(through / "checkpoint-6", "cpu"), vlmvqa.load(through / "model", "cpu")
    assert last.adapter == final.adapter and fingerprint.weights(last.model) == fingerprint.weights(final.model)
    whole = sum(file.stat().st_size for file in (base / "model").glob("*.safetensors"))
    for folder in (through / "checkpoint-6", through / "model"):
        assert sum(file.stat().st_size for file in folder.glob("*model.safetensors")) < 0.1 * whole


@pytest.mark.parametrize(
    "own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["another folder's", "the run's own"]
)
def test_a_changed_base_stops_a_resumed_run(bases: Bases, shapes: str, own: bool, tmp_path: Path) -> None:
    """It would go on over other weights, and name these as its base when it is saved."""
    run, base = tmp_path / "run", tmp_path / "base"
    if own:
        given = ("model=tiny_paligemma", "adapt=lora", "trainer.use_cpu=true", *QUIET[:1], *QUIET[2:])
        given = (*given, shapes, *DATA, *STEPS, *FLOAT, f"run.dir={run}")
    else:
        shutil.copytree(bases("paligemma") / "model", base)
        given = adapt(base, shapes, run, "lora")
    done(call("train", *given))
    forget_the_end(run)
    file = (run / "base" if own else base) / "model.safetensors"
    save_file({name: weight * 1.1 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    said = sentence(call("train", *given, "resume=auto"))
    assert "checkpoint-3 was trained over other weights than" in said and not (run / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "projector"])
def test_the_saved_adapter_is_scored_as_the_run_was(
    base: Path, adapted: Adapted, shapes: str, whole: bool, tmp_path: Path
) -> None:
    """Beside it a projector that trains whole is kept in float32, over a base in bfloat16."""
    run = tmp_path / "run"
    if whole:
        given = [word for word in adapt(base, shapes, run, "lora") if word not in FLOAT]
        done(call("train", *given, "model.dtype=bfloat16", "trainable.projector=all"))
    else:
        run = adapted("paligemma", "lora")
    weights = load_file(run / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any("projector" in name for name in weights) == whole
    where = f"checkpoint={run}"
    done(call("eval", where, "data=shapes", shapes, *DATA[1:], "split=val", f"run.dir={tmp_path / 'eval'}"))
    assert metrics(tmp_path / "eval")["metrics"] == metrics(run)["metrics"]
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["adapter"]["base"] == str(base / "model")
    on = ("train", f"init_from={run}", "trainer=tiny_paligemma", shapes, *DATA, *QUIET)
    assert "is an adapter; merge it into its base first" in sentence(call(*on, f"run.dir={tmp_path / 'on'}"))


@pytest.mark.slow
def test_a_base_of_the_hub_is_named_by_its_id(
    base: Path, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by where it is kept here, which others have not."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"someone/base": base / "model"}[name])
    done(call("train", *adapt(Path("someone/base"), shapes, tmp_path / "run", "lora")))
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["adapter"]["base"] == config["started_from"]["model"] == "someone/base"
    assert "base_model: someone/base" in (tmp_path / "run" / "model" / "README.md").read_text()
    where = f"checkpoint={tmp_path / 'run'}"
    done(call("eval", where, "data=shapes", shapes, *DATA[1:], "split=val", f"run.dir={tmp_path / 'eval'}"))


@pytest.mark.slow
def test_a_run_that_failed_at_its_start_leaves_no_base(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed is another base: the adapters would be saved over one that they were not trained over."""

    def fail(*_: object, **__: object) -> None:
        raise InputError("as if its memory were too small")

    def given(name: str, seed: int) -> tuple[str, ...]:
        words = ("model=tiny_paligemma", "adapt=lora", shapes, *DATA, *FLOAT, "trainer.use_cpu=true", f"seed={seed}")
        return (*words, "trainer.report_to=none", "trainer.max_steps=1", f"run.dir={tmp_path / name}")

    done(call("train", *given("whole", 2)))
    for more in ((), ("resume=auto",)):
        run = tmp_path / f"run-{len(more)}"
        with monkeypatch.context() as patch:
            patch.setattr("vlmvqa.training.run.VqaTrainer.train", fail)
            assert "its memory" in sentence(call("train", *given(run.name, 1)))
        (run / ".wandb_run").write_text("of the run that failed")
        done(call("train", *given(run.name, 2), *more))
        assert fingerprint.weights_in(run / "base") == fingerprint.weights_in(tmp_path / "whole" / "base")
        assert metrics(run)["metrics"] == metrics(tmp_path / "whole")["metrics"]
        assert (run / ".wandb_run").exists() == bool(more)


@pytest.mark.slow
def test_a_random_base_is_kept_beside_its_adapters(shapes: str, tmp_path: Path) -> None:
    """Nothing else could bring it back; nor a model made of parts."""
    for model in ("tiny_paligemma", "tiny"):
        folder = tmp_path / model
        given = (f"model={model}", "adapt=lora", shapes, *DATA, *QUIET, *STEPS, *FLOAT, f"run.dir={folder}")
        given = tuple(word.replace("+trainer.use_cpu", "trainer.use_cpu") for word in given)
        done(call("train", *given))
        assert (folder / "base" / "config.json").exists()
        moved = folder.rename(tmp_path / f"{model}-moved")
        where = f"checkpoint={moved}"
        done(call("eval", where, "data=shapes", shapes, *DATA[1:], "split=val", f"run.dir={tmp_path / model}-eval"))
        assert metrics(Path(f"{tmp_path / model}-eval"))["metrics"] == metrics(moved)["metrics"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("adapt.targets=[language.*.q_prj]",), "adapt.targets: language.*.q_prj matches no linear layer"),
        (("trainable.language=all",), "trainable.language=all: adapt=lora freezes the model and trains adapters"),
        (("adapt.bits=4", "dist=fsdp"), "adapt.bits=4: fsdp cannot shard weights of 4 bits; use dist=ddp or zero2"),
        (("adapt.bits=4", "dist=zero3", "model.dtype=bfloat16"), "adapt.bits=4: zero3 cannot shard weights of 4 bits"),
        (("trainer.per_device_train_batch_size=0",), "trainer.per_device_train_batch_size=0 must be at least 1"),
        (("model.dtype=bfloat16", "dist=fsdp"), "model.dtype=bfloat16 under fsdp, which shards a block in one type"),
        (("trainer.optim=paged_adamw_8bit",), "trainer.optim=paged_adamw_8bit: paged states need CUDA"),
        (("adapt.rank=0",), "rank must be at least 1"),
        (("adapt.method=loha",), "adapt.method=loha is unknown"),
        (("data.row_tokens=224",), "data.row_tokens=224: rows of"),
        (("copy_images=true",), "already hold one question each; leave it out"),
        (("data.questions_per_row=4",), "takes one question per row, and data.questions_per_row=4"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    base: Path, shapes: str, more: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    given = [
        word
        for word in adapt(base, shapes, folder, "lora")
        if word.split("=")[0] not in {m.split("=")[0] for m in more}
    ]
    assert said in sentence(call("train", *given, *more))
    assert not folder.exists()


@pytest.mark.slow
def test_neftune_and_8_bit_optimizers(base: Path, shapes: str, tmp_path: Path) -> None:
    plain, noisy = tmp_path / "plain", tmp_path / "noisy"
    done(call("train", *adapt(base, shapes, plain, "lora", "trainer.optim=adamw_bnb_8bit")))
    noise = ("trainer.optim=adamw_bnb_8bit", "+trainer.neftune_noise_alpha=5")
    done(call("train", *adapt(base, shapes, noisy, "lora", *noise)))
    assert losses(plain)[1] != losses(noisy)[1]


@pytest.mark.parametrize(
    ("family", "kind", "dist"),
    [
        pytest.param("paligemma", "lora", "fsdp", marks=pytest.mark.slow),
        pytest.param("paligemma", "qlora", "ddp", marks=pytest.mark.long),
        pytest.param("idefics2", "qlora", "zero2", marks=pytest.mark.long),
    ],
)
def test_two_ranks_resume_exactly(bases: Bases, shapes: str, family: str, kind: str, dist: str, tmp_path: Path) -> None:
    def train(folder: Path, *more: str) -> None:
        given = adapt(
            bases(family), shapes, folder, kind, f"dist={dist}", "trainer.per_device_train_batch_size=2", *more
        )
        process = forks.ranks(2, ["launch/train.py", *given])
        printed, _ = process.communicate()
        assert process.returncode == 0, printed[-3000:]

    through, in_two = tmp_path / "through", tmp_path / "two"
    train(through)
    shutil.copytree(through, in_two, symlinks=True)
    forget_the_end(in_two)
    train(in_two, "resume=auto")
    rest = {step: loss for step, loss in losses(through).items() if step > 3}
    assert {step: loss for step, loss in losses(in_two).items() if step > 3} == pytest.approx(rest, abs=1e-6)
    assert (in_two / "predictions.jsonl").read_text() == (through / "predictions.jsonl").read_text()


def test_a_row_is_shown_as_the_processor_lays_it_out(shapes: str, tmp_path: Path) -> None:
    for family, said in (("tiny_paligemma", "image x 16 "), ("tiny_idefics2", "<end_of_utterance>")):
        ended = done(call("show", f"model={family}", shapes, *DATA, f"run.dir={tmp_path / family}"))
        assert said in ended.out and (tmp_path / family / "row.png").exists()
