"""A program that compares FSDP2's loss, gradients and communication with those of ranks that are not sharded.

python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.fsdp_units
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests import tiny
from tests.distributed.flex import loss_and_gradients
from tests.unit.test_planner_adapters import tiny_settings
from vlmvqa.config.schema import DistSettings
from vlmvqa.extras.planning.batches import RowShape, dummy_batch
from vlmvqa.extras.planning.published_sizes import known_config
from vlmvqa.extras.pretrained.build import build_pretrained
from vlmvqa.models.build import build
from vlmvqa.models.interface import Model
from vlmvqa.training import distributed

# bfloat16 rounds to 2**-8 of a value, twice: each rank's gradient, and their sum.
ROUNDING = 2 * 2.0**-8


def own(tied: bool) -> tuple[Model, Callable[[int], dict[str, Tensor]]]:
    """Return our model, and a function that returns a rank's batch."""
    vlm = build(tiny.settings(tie_word_embeddings=tied)).train()

    def batch(seed: int) -> dict[str, Tensor]:
        return tiny.batch(vlm, [[document] for document in tiny.documents([2, 3], seed)], tiny.images(2, seed))

    return vlm, batch


def pretrained() -> tuple[Model, Callable[[int], dict[str, Tensor]]]:
    """Return PaliGemma, whose output head is a module that shares the embedding's weight."""
    settings = tiny_settings("paligemma")
    model = build_pretrained(settings, known_config(settings)).train()

    def batch(seed: int) -> dict[str, Tensor]:
        made = dummy_batch(settings, RowShape(40, 1, 4), 2)
        torch.manual_seed(seed)
        text = made["input_ids"] == 0
        made["input_ids"][text] = torch.randint(5, 1000, (int(text.sum()),))
        return {**made, "pixel_values": torch.randn_like(made["pixel_values"])}

    return model, batch


def compare(made: Callable[[], tuple[Model, Callable[[int], dict[str, Tensor]]]], name: str) -> None:
    """Compare every setting with the mean of the ranks' gradients."""

    def fresh() -> tuple[Model, Callable[[int], dict[str, Tensor]]]:
        torch.manual_seed(0)
        return made()

    apart = []
    for rank in range(dist.get_world_size()):
        model, batch = fresh()
        apart.append(loss_and_gradients(model, batch(rank)))
    names = apart[0].keys() - {"loss"}
    mean = {key: torch.stack([found[key] for found in apart]).mean(0) for key in names}
    magnitude = {key: torch.stack([found[key].abs() for found in apart]).mean(0) for key in names}
    for kept in (False, True):
        for reduced in ("float32", "bfloat16"):
            for recomputed in (False, True):
                model, batch = fresh()
                if recomputed:
                    model.checkpoint_activations()
                blocks = len(model.blocks)
                settings = DistSettings("fsdp", reduce_dtype=reduced, keep_gathered=kept)
                distributed.shard(model, torch.device("cpu"), None, settings)
                with CommDebugMode() as communication:
                    found = loss_and_gradients(model, batch(dist.get_rank()))
                case = f"{name}, {settings}, recomputed={recomputed}"
                torch.testing.assert_close(found["loss"], apart[dist.get_rank()]["loss"], rtol=1e-6, atol=1e-6)
                errors = {key: (found[key] - mean[key]).abs() for key in names}
                if reduced == "float32":
                    assert all((errors[key] <= 1e-6 * (1 + mean[key].abs())).all() for key in names), case
                else:
                    # Norms, not elements: a tied weight's two gradients are rounded before they are added. The 1e-7 are
                    # for key biases, whose gradient is zero up to fp32's rounding.
                    limits = {key: ROUNDING * magnitude[key].norm() + 1e-7 for key in names}
                    assert all(errors[key].norm() <= limits[key] for key in names), case
                    assert max(float(error.max()) for error in errors.values()) > 1e-6, case
                counts = {str(key): count for key, count in communication.get_comm_counts().items()}
                gathers = sum(count for key, count in counts.items() if "_allgather_base" in key)
                # Root and embedding are gathered once, and so are kept blocks. With another type for the reduction, the
                # embedding belongs to the root.
                expected = (2 if reduced == "float32" else 1) + blocks * (1 if kept else 2)
                assert gathers == expected, (case, counts)


def compare_half(made: Callable[[], tuple[Model, Callable[[int], dict[str, Tensor]]]]) -> None:
    """Compare bfloat16's reduction and the embedding's unit with fp32's reduction in the root unit."""
    found = []
    for settings in (DistSettings("fsdp"), DistSettings("fsdp", reduce_dtype="bfloat16", keep_gathered=True)):
        torch.manual_seed(0)
        model, batch = made()
        distributed.shard(model, torch.device("cpu"), torch.bfloat16, settings)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(loss_and_gradients(model, batch(dist.get_rank())))
    plain, kept = found
    assert torch.equal(plain.pop("loss"), kept.pop("loss"))
    for key, gradient in plain.items():
        # Where the ranks' gradients cancel, rounding is larger than their sum.
        error = (gradient - kept[key]).norm()
        assert gradient.dtype == kept[key].dtype == torch.float32 and error <= 0.03 * gradient.norm() + 1e-4, key


def main() -> None:
    """Compare models with a tied head, an untied head, and a head that shares the embedding's weight."""
    dist.init_process_group("gloo")
    compare(lambda: own(True), "tied")
    compare(lambda: own(False), "untied")
    compare(pretrained, "pretrained")
    compare_half(lambda: own(True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
