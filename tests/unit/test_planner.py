"""The planner against exact counts: real optimizers, passes, shards and peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests import tiny
from tests.configs import config
from tests.conftest import ROOT
from vlmvqa.config.schema import DistSettings
from vlmvqa.errors import InputError
from vlmvqa.extras.planning import memory, report, verify
from vlmvqa.extras.planning.batches import Rows, RowShape, dummy_batch
from vlmvqa.extras.planning.gpus import GIB, GPUS, gpu
from vlmvqa.extras.planning.memory import Precision, build_on_meta, measure
from vlmvqa.extras.planning.memory_tracker import MemoryTracker
from vlmvqa.extras.planning.optimizer_memory import OPTIMIZERS, state_bytes
from vlmvqa.extras.planning.planner import STRATEGIES, Planner, RunChoice, Training
from vlmvqa.extras.planning.published_sizes import known_settings
from vlmvqa.extras.planning.run import PlanConfig, build_planner
from vlmvqa.extras.planning.strategy_memory import Weight, strategy_memory, weights_of
from vlmvqa.models.build import build
from vlmvqa.models.vlm import VLM, ModelSettings
from vlmvqa.sequence.rows import IGNORE, Document, TokenizedQuestion, build_row, pad_rows
from vlmvqa.training.distributed import shard
from vlmvqa.training.optimizer import set_trainable

ALL = {"vision": "all", "projector": "all", "language": "all"}
# Wide enough for tensors of the 8-bit optimizers' smallest size, and for masks much smaller than activations.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "query_pre_attn_scalar": 32}
ROWS = Rows(rows=2, questions=2, text_tokens=12, answer_tokens=3)


def wide(**language: Any) -> ModelSettings:
    return tiny.settings(**{**WIDE, **language})


def planner(**changes: Any) -> Planner:
    values: dict[str, Any] = {"trainable": ALL, "rows": ROWS, "training": Training("fp32", "adamw_torch")}
    return Planner(**{"settings": wide(), **values, "gpu": GPUS["a10g"], "gpus": 4, **changes})


def vlm_batch(model: VLM, rows: Rows) -> dict[str, Tensor]:
    """Return a batch of images with their questions, laid out like training data."""
    question = TokenizedQuestion([0] * (rows.text_tokens - rows.answer_tokens), [0] * rows.answer_tokens)
    tokens, pattern, size = model.num_image_tokens, model.attention_pattern, model.vision.image_size
    documents = [Document([image], [question] * rows.max_questions) for image in range(rows.rows)]
    built = [build_row([document], tokens, pattern, document.images[0]) for document in documents]
    return {"pixel_values": torch.zeros(rows.rows, 3 * len(model.vision.towers), size, size), **pad_rows(built, 8)}


def tensor_bytes(tensors: Iterator[Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


# ---- weights, gradients, optimizer states


def test_weights_and_gradients_are_those_of_the_model() -> None:
    model = build(wide())
    set_trainable(model.part("language"), 2, "language")
    batch = vlm_batch(model, ROWS)
    model(**batch)["loss"].backward()
    kept = strategy_memory(weights_of(model), DistSettings("ddp"), 1, Training("fp32", "adamw_torch"))
    assert kept.parameters == tensor_bytes(iter(model.parameters()))
    assert kept.gradients == tensor_bytes(p.grad for p in model.parameters() if p.grad is not None)
    two = strategy_memory(weights_of(model), DistSettings("ddp"), 2, Training("fp32", "adamw_torch"))
    assert two.gradients == kept.gradients and two.buffers == kept.buffers == 0


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_torch_8bit", "sgd"])
def test_optimizer_states_are_those_of_a_real_step(name: str) -> None:
    model = build(wide())
    optimizer = verify.build_optimizer(model, name)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.compiler.set_stance("force_eager")  # torchao compiles its step
    try:
        optimizer.step()
    finally:
        torch.compiler.set_stance("default")
    parts: list[Tensor] = []
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                inner = [getattr(value, field) for field in ("codes", "scale", "qmap") if hasattr(value, field)]
                parts += inner or [value]
    planned = state_bytes(name, [parameter.numel() for parameter in model.parameters()])
    assert planned == pytest.approx(tensor_bytes(iter(parts)), rel=0.05)
    if "8bit" in name:
        assert planned < 0.5 * state_bytes("adamw_torch", [parameter.numel() for parameter in model.parameters()])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_8_bit_optimizers_are_planned_with_fp32_moments_of_embeddings(strategy: str) -> None:
    """Gemma 2's embedding alone: 4.7 GB instead of 1.2."""
    embedding = Weight("language", None, (256_000, 2304), 4, True, embedding=True)

    def states(weight: Weight) -> int:
        training, gpus = Training("fp32", "adamw_bnb_8bit"), 1 if strategy == "ddp" else 4
        memory = strategy_memory([weight], DistSettings(strategy), gpus, training)
        return gpus * memory.optimizer - (4 * weight.numel if strategy.startswith("zero") else 0)

    assert states(embedding) == 8 * embedding.numel == 4_718_592_000
    assert states(replace(embedding, embedding=False)) == pytest.approx(2 * embedding.numel, rel=0.03)


@contextlib.contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """Create a process group in which only rank 0 exists."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_are_those_of_fully_shard(ranks: int) -> None:
    """Uneven shards too: the class token has one row."""
    model = build(tiny.settings())
    weights = weights_of(model)
    assert any(weight.shape[0] % ranks for weight in weights)
    with fake_group(ranks):
        shard(model, torch.device("cpu"), None, DistSettings("fsdp"))
    shards = [parameter.to_local() for parameter in model.parameters()]
    assert [weight.shard_numel(ranks) for weight in weights] == [shard.numel() for shard in shards]
    kept = strategy_memory(weights, DistSettings("fsdp"), ranks, Training("fp32", "adamw_torch"))
    assert kept.parameters == kept.gradients == 4 * sum(shard.numel() for shard in shards)
    assert kept.optimizer == 2 * kept.parameters


# ---- a pass


def kept_for_backward(model: VLM, batch: dict[str, Tensor], autocast: bool) -> int:
    """Return the bytes that autograd saves in a real forward pass, without weights and inputs."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *batch.values())}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch)["loss"]
    kept = tensor_bytes(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in known)
    del loss
    return kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_those_of_a_real_pass(autocast: bool, checkpointing: bool) -> None:
    """One pass without data predicts two other batch sizes."""
    plans = planner()
    profile = measure(
        build_on_meta(wide(), ALL), wide(), plans.shape, Precision(torch.float32, autocast), checkpointing
    )
    model = build(wide()).train()
    if checkpointing:
        model.checkpoint_activations()
    for images in (3, 8):
        batch = vlm_batch(model, replace(ROWS, rows=images))
        measured = kept_for_backward(model, batch, autocast)
        if checkpointing:  # its closures keep tensors shared by all layers: two masks and the rotary tables
            rows, length = batch["input_ids"].shape
            measured += 4 * rows * length * (2 * length + 2 * WIDE["head_dim"])
        assert profile.at(images).kept == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("trained", [ALL, {**ALL, "vision": "none"}, {"vision": 1, "projector": "all", "language": 2}])
def test_what_does_not_train_keeps_nothing(trained: dict[str, Any]) -> None:
    profile = measure(build_on_meta(wide(), trained), wide(), planner().shape, Precision(torch.float32, False), False)
    model = build(wide()).train()
    for part, choice in trained.items():
        set_trainable(model.part(part), choice, part)
    batch = vlm_batch(model, replace(ROWS, rows=4))
    assert profile.at(4).kept == pytest.approx(kept_for_backward(model, batch, False), rel=0.05)


def test_long_answers_are_scored_in_chunks() -> None:
    """With more supervised tokens than a chunk has, only a chunk's logits are in memory."""
    talkative = planner(settings=wide(vocab_size=8192), rows=replace(ROWS, answer_tokens=11))
    profile = talkative.profile(STRATEGIES["ddp"], True)
    images = int(1.5 * memory.CHUNK / profile.shape.supervised)
    model = build(talkative.settings).train()
    model.checkpoint_activations()
    batch = vlm_batch(model, replace(talkative.rows, rows=images))
    real = memory.profile(model, batch, profile.shape, Precision(None, False)).at(images)
    assert profile.at(images).decoder_peak == pytest.approx(real.decoder_peak, rel=0.05)
    assert profile.at(images).logits == pytest.approx(real.logits, rel=0.05)


def test_flex_attention_keeps_no_probabilities() -> None:
    dense, flex = wide(), wide()
    flex = replace(flex, language=replace(flex.language, attention="flex"))
    long = replace(planner().shape, tokens=512)
    held = [
        measure(build_on_meta(kind, ALL), kind, long, Precision(torch.float32, False), False).at(4)
        for kind in (dense, flex)
    ]
    assert held[1].activations < 0.6 * held[0].activations


def real_peak(model: VLM, batch: dict[str, Tensor], training: Training) -> int:
    """Return the most bytes alive in three real steps, without weights and inputs."""
    tracker = MemoryTracker()
    tracker.exclude([*model.parameters(), *model.buffers(), *batch.values()])
    with tracker:
        verify.train_steps(model, batch, training)
    return max(alive for alive, *_ in tracker.timeline)


@pytest.mark.parametrize(
    "optimizer,accumulation,checkpointing", [("adamw_torch", 1, True), ("adamw_torch", 2, False), ("sgd", 2, True)]
)
def test_the_worst_moment_is_that_of_a_real_run(optimizer: str, accumulation: int, checkpointing: bool) -> None:
    """Compared with three real steps under `MemoryTracker`."""
    alone = planner(gpus=1, training=Training("fp32", optimizer, accumulation))
    planned = alone.memory("ddp", 4, checkpointing)
    model = build(wide()).train()
    if checkpointing:
        model.checkpoint_activations()
    batch = vlm_batch(model, replace(ROWS, rows=4))
    assert planned.peak == pytest.approx(real_peak(model, batch, alone.training) + planned.parameters, rel=0.05)


KEPT = DistSettings("fsdp", reduce_dtype="bfloat16", keep_gathered=True)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [DistSettings("fsdp"), DistSettings("fsdp", keep_gathered=True), KEPT])
def test_fsdps_worst_moment_is_that_of_pytorchs_own_tracker(setting: DistSettings) -> None:
    """A real FSDP2 model, one of four ranks; the process group transfers nothing."""
    four = planner(settings=wide(vocab_size=4096), training=Training("bf16", "sgd", 2))
    four.add(setting)
    for images, checkpointing in ((4, True), (12, False)):
        with fake_group(4):
            model = build(four.settings).train()
            if checkpointing:
                model.checkpoint_activations()
            shard(model, torch.device("cpu"), torch.bfloat16, setting)
            batch = vlm_batch(model, replace(ROWS, rows=images))
            tracker = FSDPMemTracker(model)
            tracker.track_inputs((batch,))
            with tracker:
                for _ in range(2):
                    tracker.reset_mod_stats()
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(num_items_in_batch=torch.tensor(1), **batch)["loss"]
                    loss.backward()
            tracked = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        inputs = tensor_bytes(iter(batch.values()))
        assert four.memory("fsdp", images, checkpointing).peak == pytest.approx(tracked["Total"] - inputs, rel=0.1)


class RealMemoryTracker(MemoryTracker):
    """Ignores meta tensors, which DeepSpeed creates."""

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "meta":
            super()._track(storage)


def deepspeed_peaks(rank: int, file: str, port: int, buckets: dict[str, Any]) -> None:
    """Train under ZeRO-1, 2 and 3 as one of two ranks and write the peak bytes, without inputs, to a file."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.init_distributed("gloo")
    peaks = []
    for stage in (1, 2, 3):
        model = build(wide(vocab_size=8192)).train()
        model.checkpoint_activations()
        embedding = model.language.decoder.get_input_embeddings().weight
        batch = vlm_batch(model, ROWS)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, **buckets},
        }
        groups = [
            [p for p in part.parameters() if (p.ndim > 1) == d] for part in model.children() for d in (True, False)
        ]
        tracker = RealMemoryTracker()
        tracker.exclude(batch.values())
        with tracker:
            optimizer = torch.optim.AdamW([{"params": params} for params in groups], foreach=True)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
            if stage == 3:
                deepspeed.zero.register_external_parameter(model, embedding)  # the tied head
            begun = len(tracker.timeline)
            for _ in range(4):
                engine.backward(engine(num_items_in_batch=torch.tensor(1), **batch)["loss"])
                engine.step()
        peaks.append(max(alive for alive, *_ in tracker.timeline[begun:]))
    if rank == 0:
        Path(file).write_text(json.dumps(peaks))


@pytest.mark.long
def test_zeros_worst_moment_is_that_of_deepspeed(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    buckets = {"overlap_comm": False, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    torch.multiprocessing.spawn(deepspeed_peaks, (str(tmp_path / "peaks"), port, buckets), nprocs=2)
    two = planner(settings=wide(vocab_size=8192), gpus=2, training=Training("bf16", "adamw_torch", 2))
    for stage, measured in enumerate(json.loads((tmp_path / "peaks").read_text()), start=1):
        name = two.add(DistSettings(f"zero{stage}", options={"zero_optimization": buckets}))
        assert two.memory(name, ROWS.rows, True).peak == pytest.approx(measured, rel=0.1)


# ---- plans

COUNTED = planner()


def on_a_gpu_of(memory: float) -> Planner:
    small = COUNTED.vary()
    small.gpu = replace(small.gpu, memory=memory)
    return small


@pytest.mark.slow
@given(
    name=strategies.sampled_from(sorted(STRATEGIES)),
    optimizer=strategies.sampled_from(OPTIMIZERS),
    gpus=strategies.integers(1, 16),
    images=strategies.integers(1, 64),
    precision=strategies.sampled_from(("fp32", "bf16")),
)
@settings(max_examples=25, deadline=None)
def test_more_ranks_never_need_more_and_more_images_never_less(
    name: str, optimizer: str, gpus: int, images: int, precision: str
) -> None:
    one = COUNTED.vary(gpus, Training(precision, optimizer, 2))
    if name != "ddp":
        more = one.vary(gpus + 1).strategy_memory(STRATEGIES[name])
        kept = one.strategy_memory(STRATEGIES[name])
        # torchao's 8-bit states want shards of 256 elements' multiples: another number of ranks may make fp32 of them.
        sizes = ("parameters", "gradients") if "8bit" in optimizer else ("parameters", "gradients", "optimizer", "step")
        assert all(getattr(more, size) <= getattr(kept, size) for size in sizes)
        assert more.buffers + more.decoder <= kept.buffers + kept.decoder
    assert one.memory(name, images + 1, True).needed >= one.memory(name, images, True).needed


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    small = on_a_gpu_of(0.85)
    for name in STRATEGIES:
        most = small.max_rows(name, False)
        if most:
            assert small.memory(name, most, False).fits
        assert not small.memory(name, most + 1, False).fits


def test_a_packed_row_is_full() -> None:
    """A packed row has row_tokens tokens, in documents of average size: 257 + 5.36 x 13 tokens for VQAv2."""
    packed = build_planner(
        config(PlanConfig, "plan", "experiment=vlm_vqa_4xa10g", "data.questions_per_row=null", "data.row_tokens=2048")
    )
    assert (packed.shape.tokens, packed.shape.images, packed.rows.text_tokens) == (2048, 6, 13)
    assert packed.shape.supervised == 33 * 4  # 6 x 5.36 questions of 4 tokens
    given = dummy_batch(tiny.settings(), RowShape(100, 2, 6), 2)
    assert given["labels"].shape == (2, 100) and len(given["pixel_values"]) == 4


def test_a_rows_shape_is_that_of_training_data() -> None:
    labels, model = vlm_batch(tiny.model(), ROWS)["labels"], tiny.model()
    assert planner(settings=tiny.settings()).shape == RowShape(labels.shape[1], 1, int((labels[0] != IGNORE).sum()))
    question = TokenizedQuestion([0] * (ROWS.text_tokens - ROWS.answer_tokens), [0] * ROWS.answer_tokens)
    tiled = tiny.batch(model, [[Document(range(5), [question] * ROWS.max_questions, [5])]], tiny.images(5))["labels"]
    planned = planner(settings=tiny.settings(), rows=replace(ROWS, tiles=5))
    assert planned.shape == RowShape(tiled.shape[1], 5, int((tiled != IGNORE).sum()))


@pytest.mark.long
def test_the_recipe_fits_under_fsdp_and_not_under_ddp() -> None:
    recipe = build_planner(config(PlanConfig, "plan", "experiment=vlm_vqa_4xa10g"))
    assert (recipe.gpu.name, recipe.gpus, recipe.rows.rows, recipe.shape.tokens) == ("A10G (24 GB)", 4, 6, 320)
    fsdp, ddp = recipe.memory("fsdp", 6, True), recipe.strategy_memory(STRATEGIES["ddp"])
    assert fsdp.fits
    assert ddp.parameters + ddp.gradients + ddp.optimizer + ddp.buffers > recipe.gpu.memory * GIB
    # 2,701,838,592 parameters: fp32 shards and gradients of a quarter; states of two bytes a parameter with their
    # scales, and of eight for the embedding.
    quarter = 2_701_838_592 / 4
    assert fsdp.parameters == pytest.approx(4 * quarter, rel=0.001) and fsdp.gradients == fsdp.parameters
    embedding = 256_000 * 2304 / 4
    assert fsdp.optimizer == pytest.approx(2.03125 * (quarter - embedding) + 8 * embedding, rel=0.01)
    assert ddp.parameters == 4 * 2_701_838_592
    assert "dist=fsdp trainer.per_device_train_batch_size=6" in report.overrides(RunChoice("fsdp", 6, True, 10))
    # The projector alone: frozen weights have no gradients and states.
    projector = replace(recipe, gpus=1, trainable={"vision": "none", "projector": "all", "language": "none"})
    alone = projector.memory("ddp", 6, True)
    assert alone.fits and alone.gradients == 4 * (768 * 2304 + 2304)


@pytest.mark.long
def test_the_documented_plan_is_the_recipes() -> None:
    """docs/scaling.md contains the plan; VLMVQA_WRITE_DOCS=1 updates it."""
    recipe = build_planner(config(PlanConfig, "plan", "experiment=vlm_vqa_4xa10g"))
    found = report.markdown(recipe, recipe.compare(True), "fsdp", True).partition("\n\n")[2]
    page = ROOT / "docs" / "scaling.md"
    before, begin, rest = page.read_text().partition("<!-- plan -->\n")
    written, end, after = rest.partition("<!-- end of plan -->")
    assert begin and end
    if os.environ.get("VLMVQA_WRITE_DOCS"):
        page.write_text(f"{before}{begin}{found}{end}{after}")
    else:
        assert written == found


def test_a_recommendation_names_what_to_set() -> None:
    plans = COUNTED.compare(False)
    said = report.recommend(COUNTED, plans, "ddp")
    assert said.startswith("Set dist=ddp trainer.per_device_train_batch_size=2")
    heavy = planner(settings=wide(vocab_size=400_000), gpu=replace(GPUS["a10g"], memory=2.0))
    said = report.recommend(heavy, heavy.compare(False), "ddp")
    assert said.startswith("ddp does not fit") and "Set instead" in said
    none = on_a_gpu_of(0.8)
    assert "No strategy fits a single row" in report.recommend(none, none.compare(False), "ddp")
    for one in (COUNTED, heavy):
        table = report.table(one.compare(False), "zero3_offload")
        assert len(table.splitlines()) == 2 * (1 + len(STRATEGIES)) + 1 and "zero3_offload *" in table
        text = [*table.splitlines(), *report.headline(one, True).splitlines(), *report.LEGEND.splitlines()]
        assert max(map(len, text)) <= 100


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(InputError, match=r"T4 .* does not support bfloat16; set trainer\.bf16=false"):
        planner(gpu=GPUS["t4"], training=Training("bf16", "adamw_torch"))
    half = planner(gpu=GPUS["t4"], training=Training("fp16", "adamw_torch"))
    assert [name for name in half.names() if "fsdp" in name] == []
    with pytest.raises(InputError, match=r"plan\.gpu=A100-81 is unknown.*did you mean 'a100_80'"):
        gpu("A100-81")
    with pytest.raises(InputError, match=r"trainer\.optim=adamw_bnb_8bits cannot be planned.*did you mean"):
        Training("fp32", "adamw_bnb_8bits")
    with pytest.raises(InputError, match=r"plan\.gpus=four must be a whole number"):
        planner(gpus="four")
    with pytest.raises(InputError, match="nothing is trained"):
        planner(trainable={"vision": "none", "projector": "none", "language": "none"}).plan("ddp", False)
    with pytest.raises(InputError, match="a plan uses no network"):
        known_settings(replace(wide(), language=replace(wide().language, name="nobody/nothing")))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="verify=true runs steps on a GPU"):
            verify.verify(planner(), False)


def test_deepspeeds_options_are_planned_as_set() -> None:
    small = {"zero_optimization": {"reduce_bucket_size": 1000}}
    plans = planner()
    before = plans.memory("zero2", 2, False).buffers
    assert plans.add(DistSettings("zero2", options=small)) == "zero2"
    assert plans.memory("zero2", 2, False).buffers < before / 1000
    assert COUNTED.memory("zero2", 2, False).buffers == before


def test_a_weight_larger_than_a_bucket_is_sent_alone() -> None:
    weights = [Weight("language", None, (600_000_000,), 4, True)]
    kept = strategy_memory(weights, DistSettings("zero2"), 2, Training("bf16", "adamw_torch"))
    assert kept.reduction == 2 * 2 * 600_000_000


@pytest.mark.slow
def test_the_command_prints_and_writes_the_plan(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), f"run.dir={tmp_path}", "dist=zero2", "plan.gpu=L4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "zero2 *" in done.stdout and "Set dist=zero2" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["chosen"] == "zero2" and len(written["plans"]) == len(STRATEGIES)
    assert all(row["needed"] > 0.8 * GIB for row in written["plans"])
    assert "| zero2 * |" in (tmp_path / "plan.md").read_text()


def test_a_module_outside_every_block_is_in_the_root_unit() -> None:
    weights = weights_of(build_on_meta(wide(), ALL))
    assert {weight.unit for weight in weights} == {None, *range(6)}
    root = sum(weight.numel for weight in weights if weight.unit is None)
    model = build(wide())
    blocks: list[nn.Module] = [*model.vision.blocks, *model.language.blocks]
    assert root == sum(p.numel() for p in model.parameters()) - sum(p.numel() for b in blocks for p in b.parameters())
