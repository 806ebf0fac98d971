"""The same fine-tuning with transformers' PaliGemma and `Trainer`, and with our model.

    python -m bench.peers --model mid --shape vqav2

    PaliGemma and Trainer   `PaliGemmaForConditionalGeneration`: one question per row, each with its own copy of the
                            image, padded to the longest of the batch; logits for every position
    ours, a question a row  the same function: pattern `prefix_lm`, an encoder with SigLIP's architecture
    ours, shared rows       all questions of an image in one row, with `--attention-pattern`: another function, because
                            PaliGemma's image attends to the question, so that two questions cannot share it

All start from the same weights (copied from PaliGemma) and use the same questions in every optimizer step: AdamW,
gradient clipping, a constant learning rate. Ours is a plain loop. Inputs are random pixels and token ids, assembled as
in PaliGemma's processor (image placeholders, prompt, answer, EOS; token type 0 for the prefix and 1 for the answer;
labels on the answer), so that neither side spends time on text or JPEGs, and no tokenizer is needed.

They run alternately, `--repeats` times one epoch each, from the same start. The first step of a turn is a warm-up; the
result is the mean of the other steps in the fastest turn. Peak memory is what training adds to the weights: gradients,
optimizer states, activations. "floor" is the measured time divided by the least possible time: images and tokens once,
in our shared rows, at the machine's matrix rate, or reading and writing the weights, gradients and optimizer states,
whichever takes longer. Needs accelerate, for the Trainer.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from bench import clock, models, shapes, tables
from vlmvqa.models.build import build_vision_encoder
from vlmvqa.models.interface import cast_parameters
from vlmvqa.models.language import LanguageModel
from vlmvqa.models.projector import Projector
from vlmvqa.models.vision import VisionSettings
from vlmvqa.models.vlm import VLM
from vlmvqa.sequence.rows import IGNORE, Document, TokenizedQuestion

ImageQuestion = tuple[int, TokenizedQuestion]  # index of the image, and the question
Peer = Any  # PaliGemmaForConditionalGeneration, whose configs have no types
LEARNING_RATE, CLIP = 1e-5, 1.0  # CLIP is the Trainer's default


@dataclass
class Record:
    """The loss and the end time of every step."""

    device: torch.device
    losses: list[Tensor] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Return the duration of every step except the first."""
        return [after - before for before, after in pairwise(self.ended)]

    def end_step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ended.append(time.perf_counter())


# --- models -------------- ---------------------------------------------------------------------------------


def build_peer(like: VLM, seed: int = 0) -> Peer:
    """Return a random PaliGemma with a decoder like that of `like` and a SigLIP as wide and deep as its encoder."""
    encoder = like.vision.encoder
    block = encoder.blocks[0]
    vision = SiglipVisionConfig(
        hidden_size=encoder.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=like.vision.image_size,
        patch_size=encoder.patch_embed.patch_size[0],
        vision_use_head=False,
    )
    text = copy.deepcopy(like.language.config)
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size,  # a token that no text has, as in the published models
        projection_dim=text.hidden_size,
    )
    torch.manual_seed(seed)
    parameter = next(like.parameters())
    with parameter.device:  # initialising 2.6 billion parameters on a CPU takes minutes
        peer: Peer = PaliGemmaForConditionalGeneration(config)
    cast_parameters(peer, parameter.dtype)
    return peer


def build_ours(peer: Peer, attention_pattern: str) -> VLM:
    """Return the same model as a `VLM`, with a copy of the weights."""
    tower, text = peer.config.vision_config, peer.config.text_config
    overrides = {
        "patch_size": tower.patch_size,
        "embed_dim": tower.hidden_size,
        "depth": tower.num_hidden_layers,
        "num_heads": tower.num_attention_heads,
        "mlp_ratio": tower.intermediate_size / tower.hidden_size,
        "act_layer": "gelu_tanh",  # the GELU approximation of transformers' SigLIP
    }
    parameter = next(peer.parameters())
    with parameter.device:
        vision = build_vision_encoder(
            VisionSettings("vit_base_patch16_siglip_224", tower.image_size, weights="random", overrides=overrides)
        )
        causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(text))
        projector = Projector(vision.features, text.hidden_size)
    vision.encoder.load_state_dict(siglip_weights(peer.model.vision_tower))
    causal_lm.get_decoder().load_state_dict(peer.model.language_model.state_dict())
    projector.layers[0].load_state_dict(peer.model.multi_modal_projector.linear.state_dict())
    model = VLM(vision, projector, LanguageModel(causal_lm), attention_pattern).to(parameter.device)
    return cast_parameters(model, parameter.dtype)


def siglip_weights(tower: Any) -> dict[str, Tensor]:
    """Return the weights of transformers' SigLIP under timm's names."""
    given = {name.removeprefix("vision_model."): weight for name, weight in tower.state_dict().items()}
    weights = {"pos_embed": given["embeddings.position_embedding.weight"][None]}
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names["self_attn.out_proj"] = "attn.proj"
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = given[f"embeddings.patch_embedding.{kind}"]
        weights[f"norm.{kind}"] = given[f"post_layernorm.{kind}"]
        for n in range(tower.config.num_hidden_layers):
            layer = f"encoder.layers.{n}."
            weights |= {f"blocks.{n}.{new}.{kind}": given[f"{layer}{old}.{kind}"] for old, new in names.items()}
            qkv = [given[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(qkv)
    return weights


# --- batches ---------------- -----------------------------------------------------------------------------


def peer_batch(
    asked: Sequence[ImageQuestion], pixels: Tensor, image_token: int, num_image_tokens: int
) -> dict[str, Tensor]:
    """Return questions with answers as PaliGemma's processor encodes them, padded to the longest."""
    rows = []
    for _, question in asked:
        prefix = [image_token] * num_image_tokens + list(question.prompt)
        rows.append((prefix + list(question.answer), len(prefix)))
    longest = max(len(ids) for ids, _ in rows)

    def pad(columns: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([column + [fill] * (longest - len(column)) for column in columns])

    return {
        "pixel_values": pixels[[image for image, _ in asked]],
        "input_ids": pad([ids for ids, _ in rows], 0),
        "attention_mask": pad([[1] * len(ids) for ids, _ in rows], 0),
        "token_type_ids": pad([[0] * prefix + [1] * (len(ids) - prefix) for ids, prefix in rows], 0),
        "labels": pad([[IGNORE] * prefix + ids[prefix:] for ids, prefix in rows], IGNORE),
    }


def our_batch(asked: Sequence[ImageQuestion], pixels: Tensor, model: VLM, share: bool) -> dict[str, Tensor]:
    """Return the same questions as a batch of a `VLM`: one row per image, or per question."""
    if share:
        images = dict.fromkeys(image for image, _ in asked)
        documents = [Document([image], [question for other, question in asked if other == image]) for image in images]
    else:
        documents = [Document([image], [question]) for image, question in asked]
    return models.make_batch(model, [[document] for document in documents], pixels, multiple=8)


# --- training --------------- ------------------------------------------------------------------------------


def require_trainer() -> None:
    """Import the Trainer before anything is built or measured.

    Raises:
        SystemExit: it lacks accelerate.
    """
    try:
        import accelerate  # noqa: F401
        from transformers import Trainer  # noqa: F401
    except ImportError as error:
        raise SystemExit("PaliGemma trains here with transformers' Trainer: `pip install accelerate`") from error


def train_peer(peer: Peer, asked: Sequence[ImageQuestion], pixels: Tensor, batch: int) -> Record:
    """Train one epoch with transformers' Trainer."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    record = Record(peer.device)

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.end_step()

    peer.register_forward_hook(lambda _, __, output: record.losses.append(output["loss"].detach()))
    num_image_tokens = peer.config.text_config.num_image_tokens
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            train_sampling_strategy="sequential",  # the same order as ours
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=peer.device.type == "cpu",
        )
        trainer = Trainer(
            peer,
            arguments,
            data_collator=lambda asked: peer_batch(asked, pixels, peer.config.image_token_id, num_image_tokens),
            train_dataset=list(asked),
            callbacks=[Steps()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return record


def train_ours(model: VLM, asked: Sequence[ImageQuestion], pixels: Tensor, batch: int, share: bool) -> Record:
    """Train one epoch in a plain loop."""
    device = models.device_of(model)
    record = Record(device)
    # Fused and without weight decay, like the Trainer's.
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
    for start in range(0, len(asked), batch):
        inputs = our_batch(asked[start : start + batch], pixels, model, share)
        loss = model(**{name: column.to(device) for name, column in inputs.items()})["loss"]
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(loss.detach())
        record.end_step()
    return record


# --- comparison -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A way to train: `train(build(peer))`; if `same`, its losses should equal those of the first contender."""

    name: str
    build: Callable[[Peer], Any]
    train: Callable[[Any], Record]
    same: bool = True


def contenders(asked: Sequence[ImageQuestion], pixels: Tensor, batch: int, attention_pattern: str) -> list[Contender]:
    work = (asked, pixels, batch)
    return [
        Contender("PaliGemma and Trainer", lambda peer: peer, lambda model: train_peer(model, *work)),
        Contender(
            "ours, a question a row",
            lambda peer: build_ours(peer, "prefix_lm"),
            lambda model: train_ours(model, *work, share=False),
        ),
        Contender(
            f"ours, shared rows, {attention_pattern}",
            lambda peer: build_ours(peer, attention_pattern),
            lambda model: train_ours(model, *work, share=True),
            same=False,
        ),
    ]


def take_turns(found: Sequence[Contender], like: VLM, repeats: int, seed: int) -> list[list[clock.Measured[Record]]]:
    """Measure the contenders alternately; each builds its own model at the start of its turn."""
    turns: list[list[clock.Measured[Record]]] = [[] for _ in found]
    for _ in range(repeats):
        for contender, measured in zip(found, turns, strict=True):
            model = contender.build(build_peer(like, seed)).train()
            with clock.PeakMemory(models.device_of(model)) as memory:
                record = contender.train(model)
            seconds = statistics.mean(record.seconds)
            measured.append(clock.Measured(seconds, memory.bytes, record))
            print(f"  {contender.name}: {seconds:.2f} s per step", flush=True)
            del model
    return turns


def compare(
    found: Sequence[Contender], turns: Sequence[Sequence[clock.Measured[Record]]], batch: int, floor: float
) -> list[tables.Row]:
    """Return a row per contender.

    Args:
        floor: seconds that a step needs at least.
    """
    rows: list[tables.Row] = []
    reference: list[float] = []
    for contender, measured in zip(found, turns, strict=True):
        losses = [loss.item() for loss in measured[0].result.losses]
        reference = reference or losses
        apart = max(abs(a - b) for a, b in zip(losses, reference, strict=True)) if contender.same else None
        seconds = min(turn.seconds for turn in measured)
        rows.append(
            {
                "name": contender.name,
                "questions_per_second": batch / seconds,
                "times_floor": seconds / floor,
                "peak_bytes": measured[0].peak,
                "losses": losses,
                "largest_loss_difference": apart,
            }
        )
        rows[-1]["ratio"] = rows[-1]["questions_per_second"] / rows[0]["questions_per_second"]
    return rows


def least_seconds(model: VLM, asked: Sequence[ImageQuestion], pixels: Tensor, batch: int, machine: tables.Row) -> float:
    """Return the least possible time of a step, averaged over an epoch."""
    steps = [our_batch(asked[at : at + batch], pixels, model, share=True) for at in range(0, len(asked), batch)]
    flops = sum(models.needed_flops(model, step) for step in steps) / len(steps)
    # AdamW reads weights, gradients and two moments, and writes all except the gradients.
    return tables.least_seconds(machine, flops, models.trained_bytes(model) * (3 + 7) / 3)


def main(arguments: Sequence[str] | None = None) -> list[tables.Row]:
    parser = tables.parser("peers", __doc__, images=12, repeats=3)
    parser.set_defaults(attention_pattern="blockwise_prefix")
    parser.add_argument("--batch", type=int, default=16, help="questions a step (default: %(default)s)")
    args = parser.parse_args(arguments)
    require_trainer()

    shape = shapes.SHAPES[args.shape]
    like = models.build_model(args.model, shape, args.device, args.seed)
    documents = shapes.random_documents(shape, args.images, models.vocabulary(like), args.seed)
    asked = [(document.images[0], question) for document in documents for question in document.questions]
    asked = asked[: len(asked) // args.batch * args.batch]  # complete steps only
    if len(asked) < 2 * args.batch:
        parser.error("the first step warms up, and there is no second; ask for more --images or a smaller --batch")
    pixels = models.random_pixels(
        like, args.images, args.seed
    ).cpu()  # moved to the device with their batch, as in a user's code
    machine = tables.machine(args.device, next(like.parameters()).dtype)
    print(tables.describe(machine))

    found = contenders(asked, pixels, args.batch, args.attention_pattern)
    model = build_ours(build_peer(like, args.seed), args.attention_pattern)
    floor = least_seconds(model, asked, pixels, args.batch, machine)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    rows = compare(found, take_turns(found, like, args.repeats, args.seed), args.batch, floor)
    print(
        f"{len(asked)} questions about {args.images} images, {args.batch} per step; all parameters train "
        f"({parameters / 1e6:,.1f} million)"
    )
    shown = [
        (
            row["name"],
            f"{row['questions_per_second']:.3g}",
            tables.times(row["ratio"]),
            tables.times(row["times_floor"]),
            tables.mib(row["peak_bytes"]),
            f"{row['losses'][0]:.5f}",
            f"{row['losses'][-1]:.5f}",
            "" if row["largest_loss_difference"] is None else f"{row['largest_loss_difference']:.1e}",
        )
        for row in rows
    ]
    headers = ("", "questions/s", "ratio", "floor", "peak MiB", "first loss", "last loss", "largest difference")
    print(tables.table(headers, shown))
    tables.write_json(args, machine, rows, questions=len(asked), parameters=parameters)
    return rows


if __name__ == "__main__":
    main()
