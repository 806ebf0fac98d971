"""Cached features equal the encoder's output bit by bit; stale ones are refused; a killed run is resumed."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tests import tiny
from vlmvqa.data.example import Example, Question
from vlmvqa.data.images import ImageSettings, decode, to_tensor
from vlmvqa.errors import BadRecords, InputError
from vlmvqa.extras.feature_cache.store import FeatureStore, check_dtype, feature_key
from vlmvqa.extras.feature_cache.writer import disk_space, write
from vlmvqa.models.build import build_vision_encoder
from vlmvqa.models.vision import VisionEncoder, VisionSettings
from vlmvqa.sequence.rows import Document

SETTINGS = ImageSettings(tiny.IMAGE_SIZE, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
IMAGES = 10
IMAGE_BYTES = 17 * 32 * 4  # per image in fp32: 1 + 4 x 4 tokens of width 32
Files = list[Example]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """JPEG files with integer and text ids."""
    found = []
    for n in range(IMAGES):
        path = tmp_path / f"{n}.jpg"
        pixels = np.random.default_rng(n).integers(0, 255, (20 + n, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        found.append(Example(path, n if n % 2 else f"page-{n}", (Question(n, "what?", "what?"),)))
    return found


@pytest.fixture
def encoder() -> VisionEncoder:
    return tiny.model().vision


def load_image(example: Example) -> Tensor:
    return to_tensor(decode(example.image, example.name), SETTINGS)


def documents(load: Callable[[Example], Tensor]) -> Callable[[Example], Document]:
    return lambda example: Document([load(example)], ())


def made(
    folder: Path,
    encoder: VisionEncoder,
    examples: Files,
    dtype: str = "float32",
    policy: str = "error",
    load: Callable[[Example], Tensor] = load_image,
    **options: int,
) -> FeatureStore:
    """Write features in batches of two images."""
    key = feature_key(encoder, SETTINGS, dtype)
    return write(folder, key, encoder, examples, documents(load), BadRecords(policy), **{"batch_size": 2, **options})


def computed(encoder: VisionEncoder, examples: Files, batch_size: int = 2) -> Tensor:
    """Return the encoder's output, computed in the writer's batches."""
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    with torch.no_grad():
        return torch.cat([encoder(torch.stack([load_image(example) for example in batch])) for batch in batches])


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_the_encoders_to_the_bit(
    tmp_path: Path, encoder: VisionEncoder, files: Files, workers: int
) -> None:
    made(tmp_path / "f", encoder, files, workers=workers)
    store = FeatureStore.open(tmp_path / "f", encoder, SETTINGS, files)
    assert len(store) == IMAGES and store.shape == (17, 32)
    for unknown in (0, "1"):
        with pytest.raises(InputError, match="compute them for this split"):
            store[unknown]
    for example, expected in zip(files, computed(encoder, files), strict=True):
        assert torch.equal(store[example.image_id], expected)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_halves_are_rounded_once(
    tmp_path: Path, encoder: VisionEncoder, files: Files, dtype: str, kind: torch.dtype
) -> None:
    store = made(tmp_path / "f", encoder, files, dtype, batch_size=3)
    stored = torch.stack([store[example.image_id] for example in files])
    expected = computed(encoder, files, batch_size=3)
    assert stored.dtype == kind and torch.equal(stored, expected.to(kind))
    assert (tmp_path / "f" / "features.bin").stat().st_size == IMAGES * IMAGE_BYTES // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_the_pixels(tmp_path: Path, files: Files, dtype: torch.dtype) -> None:
    """Cached and computed features give the same loss and gradients in the dtype of the model."""
    vlm = tiny.model()
    vlm.vision.requires_grad_(False)
    for parameter in vlm.parameters():
        parameter.data = parameter.data.to(dtype)
    store = made(tmp_path / "f", vlm.vision, files[:3], str(dtype).removeprefix("torch."), batch_size=3)
    rows = [[document] for document in tiny.documents((1, 2, 3))]
    pixels = tiny.batch(vlm, rows, torch.stack([load_image(example) for example in files[:3]]))
    cached = {**pixels, "image_features": torch.stack([store[example.image_id] for example in files[:3]])}
    del cached["pixel_values"]
    found = []
    for batch in (pixels, cached):
        vlm.zero_grad()
        loss = vlm(**batch)["loss"]
        loss.backward()
        found.append([loss, *(p.grad for p in vlm.parameters() if p.grad is not None)])
    assert found[0][0] > 0 and len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_workers_share_a_store(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    store = made(tmp_path / "f", encoder, files)
    alone = [store[example.image_id] for example in files]
    ids = [example.image_id for example in files]
    loader = DataLoader(Rows(store, ids), batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(loader, alone, strict=True))
    sent = pickle.loads(pickle.dumps(store))  # as for a spawned worker
    assert len(pickle.dumps(store)) < IMAGE_BYTES and torch.equal(sent[1], store[1])
    taken = store[1]
    taken.zero_()  # a copy
    assert torch.equal(store[1], alone[1])


@dataclasses.dataclass
class Rows:
    store: FeatureStore
    ids: list[int | str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.store[self.ids[index]]


def test_an_image_of_several_examples_is_stored_once(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    store = made(tmp_path / "f", encoder, [*files, *files[:4]])
    assert len(store) == IMAGES and (tmp_path / "f" / "features.bin").stat().st_size == IMAGES * IMAGE_BYTES
    other = dataclasses.replace(files[0], image=files[1].image)
    with pytest.raises(InputError, match=r"image id page-0 names both .*0\.jpg and .*1\.jpg"):
        made(tmp_path / "g", encoder, [*files, other])


# --- stale ---------------------------------------------------------------------------------------------


def bigger(encoder: VisionEncoder) -> VisionEncoder:
    torch.manual_seed(0)
    return build_vision_encoder(VisionSettings(image_size=42, weights="random", overrides=tiny.VISION))


def more_heads(encoder: VisionEncoder) -> VisionEncoder:
    """Return an encoder with the same weights in the same shapes that computes another function."""
    other = build_vision_encoder(
        VisionSettings(image_size=28, weights="random", overrides={**tiny.VISION, "num_heads": 4})
    )
    other.load_state_dict(encoder.state_dict())
    return other


def one_weight(encoder: VisionEncoder) -> VisionEncoder:
    with torch.no_grad():
        encoder.encoder.blocks[1].mlp.fc2.bias[3] += 1e-3
    return encoder


def another(encoder: VisionEncoder) -> VisionEncoder:
    return build_vision_encoder(VisionSettings("vit_tiny_patch16_224", 28, "random", tiny.VISION))


@pytest.mark.parametrize(
    ("change", "settings", "dtype", "said"),
    [
        (one_weight, {}, "float32", "the encoder's weights differ"),
        (more_heads, {}, "float32", "the encoder's weights differ"),
        (VisionEncoder.bfloat16, {}, "float32", "the encoder's weights differ"),
        (bigger, {"size": 42}, "float32", "the image size was 28, is now 42"),
        (another, {}, "float32", "the encoder was vit_base_patch14_dinov2.lvd142m, is now vit_tiny_patch16_224"),
        (None, {"resize": "center_crop"}, "float32", "the image resize was squash, is now center_crop"),
        (None, {"mean": (0.1, 0.4, 0.3)}, "float32", r"the image mean was \[0.5, 0.4, 0.3\], is now \[0.1"),
        (None, {}, "bfloat16", "the dtype was float32, is now bfloat16"),
    ],
)
def test_stale_features_are_refused(
    tmp_path: Path,
    encoder: VisionEncoder,
    files: Files,
    change: Callable[[VisionEncoder], VisionEncoder] | None,
    settings: dict[str, object],
    dtype: str,
    said: str,
) -> None:
    made(tmp_path / "f", encoder, files)
    changed = change(encoder) if change else encoder
    transform = dataclasses.replace(SETTINGS, **settings)  # type: ignore[arg-type]
    key = feature_key(changed, transform, dtype)
    if dtype == "float32":  # a run takes the stored data type
        again = r"python launch/prepare.py features features.dir=\S+ features.overwrite=true features.dtype=float32"
        with pytest.raises(InputError, match=rf"the features in \S+ are stale: .*{said}.*{again}") as refused:
            FeatureStore.open(tmp_path / "f", changed, transform, files)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=rf"has other features: .*{said}.*features.overwrite=true"):
        write(tmp_path / "f", key, changed, files, documents(load_image), BadRecords())


def test_the_same_encoder_built_again_finds_its_features(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    """Training mode and activation checkpointing do not change the key."""
    made(tmp_path / "f", encoder, files)
    again = tiny.model().train().vision
    again.requires_grad_(False)
    again.checkpoint_activations()
    assert len(FeatureStore.open(tmp_path / "f", again, SETTINGS, files)) == IMAGES


def test_other_features_are_replaced_with_overwrite(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    folder = tmp_path / "f"
    made(folder, encoder, files)
    with pytest.raises(InputError, match="has other features: they belong to other images"):
        made(folder, encoder, files[:4])
    (folder / "notes.txt").write_text("mine")
    store = made(folder, encoder, files[:4], overwrite=True)
    assert len(store) == 4 and (folder / "features.bin").stat().st_size == 4 * IMAGE_BYTES
    assert (folder / "notes.txt").exists()


def test_missing_and_damaged_features_are_named(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    folder = tmp_path / "f"
    with pytest.raises(InputError, match=r"has no features; compute them: python launch/prepare.py features"):
        FeatureStore(folder)
    store = made(folder, encoder, files[:9])
    with pytest.raises(InputError, match=r"image 9 has no features in \S+: compute them for this split"):
        store[9]
    FeatureStore.open(folder, encoder, SETTINGS, files[:9])
    with pytest.raises(InputError, match=r"lack 1 of the images \(the first is 9\)"):
        FeatureStore.open(folder, encoder, SETTINGS, files)
    whole = (folder / "features.bin").read_bytes()
    (folder / "features.bin").write_bytes(whole[:-1])
    with pytest.raises(InputError, match="are incomplete; run the command that computes them again"):
        FeatureStore(folder)
    made(folder, encoder, files[:9], batch_size=1)
    assert (folder / "features.bin").read_bytes() == whole
    (folder / "index.json").write_text('{"key":')
    with pytest.raises(InputError, match=r"index.json cannot be read .*recompute the features"):
        FeatureStore(folder)
    with pytest.raises(InputError, match=r"features.dtype=bfloat61 is unknown.*did you mean 'bfloat16'"):
        check_dtype("bfloat61")


# --- interrupted, unreadable, full ---------------------------------------------------------------------


def test_a_killed_run_resumes_at_its_last_batch(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    """Killed at its eighth image, in the fourth batch."""
    folder, whole = tmp_path / "f", made(tmp_path / "whole", encoder, files)

    def until_the_eighth(example: Example) -> Tensor:
        if example.image_id == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return load_image(example)

    process = multiprocessing.get_context("fork").Process(
        target=made, args=(folder, encoder, files), kwargs={"load": until_the_eighth}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(InputError, match="are incomplete; run the command that computes them again"):
        FeatureStore(folder)
    with (folder / "features.bin").open("ab") as file:
        file.write(b"part of an image")

    decoded: list[int | str] = []

    def counted(example: Example) -> Tensor:
        decoded.append(example.image_id)
        return load_image(example)

    store = made(folder, encoder, files, load=counted)
    assert decoded == [example.image_id for example in files[6:]]
    assert all(torch.equal(store[example.image_id], whole[example.image_id]) for example in files)
    assert content(folder) == content(tmp_path / "whole")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bad_image_stops_or_is_skipped(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    folder, bad = tmp_path / "f", files[4].image
    assert isinstance(bad, Path)
    whole = bad.read_bytes()
    bad.write_bytes(whole[:300])
    with pytest.raises(InputError, match=r"4\.jpg cannot be read .*set data.on_bad_record=skip"):
        made(folder, encoder, files, workers=1)
    for _ in range(2):  # the second time all features are kept, and the image is still listed
        skipping = BadRecords("skip")
        key = feature_key(encoder, SETTINGS, "float32")
        store = write(folder, key, encoder, files, documents(load_image), skipping, batch_size=2)
        assert len(skipping.seen) == 1 and "4.jpg cannot be read" in skipping.seen[0]
        assert len(store) == IMAGES - 1
        assert "4.jpg cannot be read" in store.skipped["page-4"]
        with pytest.raises(InputError, match=r"image page-4 has no features in \S+: .*4\.jpg cannot be read"):
            store["page-4"]
        FeatureStore.open(folder, encoder, SETTINGS, files)
    expected = computed(encoder, files[6:])  # the batches after the bad image's
    assert all(torch.equal(store[e.image_id], x) for e, x in zip(files[6:], expected, strict=True))
    with pytest.raises(InputError, match=r"4\.jpg cannot be read"):  # skipped images are read again
        made(folder, encoder, files)
    bad.write_bytes(whole)
    assert len(made(folder, encoder, files)) == IMAGES
    assert content(folder).keys() == {"index.json", "features.bin"}


def test_images_that_are_all_bad(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    for example in files:
        assert isinstance(example.image, Path)
        example.image.write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of the images could be read"):
        made(tmp_path / "f", encoder, files, policy="skip")
    with pytest.raises(InputError, match="the split has no images"):
        made(tmp_path / "g", encoder, [])


def test_features_that_overflow_a_dtype_are_refused(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    with torch.no_grad():
        encoder.encoder.norm.weight.mul_(1e6)
    with pytest.raises(InputError, match=r"image page-0: its features are not finite in float16; use .*bfloat16"):
        made(tmp_path / "f", encoder, files, "float16")
    assert len(made(tmp_path / "g", encoder, files, "bfloat16")) == IMAGES


def test_the_size_is_forecast(
    tmp_path: Path, encoder: VisionEncoder, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40_000_000_000))
    said = disk_space(tmp_path / "not" / "yet", 82_783, (257, 768), "bfloat16")
    assert "395kB each: 32.7GB of features" in said and "40.0GB are free" in said
    with pytest.raises(
        InputError, match=r"need 65.4GB, 25.4GB more than the disk of .* has; free .*dtype=bfloat16"
    ) as refused:
        disk_space(tmp_path, 82_783, (257, 768), "float32")
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    made(tmp_path / "f", encoder, files)
    assert "21.8kB of them already present" in disk_space(tmp_path / "f", IMAGES, (17, 32), "float32")


def test_a_full_disk_is_an_error_and_the_run_can_be_resumed(
    tmp_path: Path, encoder: VisionEncoder, files: Files
) -> None:
    def full(example: Example) -> Tensor:
        if example.image_id == 5:  # as if an earlier image filled it
            raise OSError(errno.ENOSPC, "No space left on device")
        return load_image(example)

    with pytest.raises(InputError, match=r"f cannot be written \(No space left on device\); free space and resume"):
        made(tmp_path / "f", encoder, files, load=full)
    assert len(made(tmp_path / "f", encoder, files)) == IMAGES


def test_a_folder_that_cannot_be_written(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*choose another features.dir"):
        made(tmp_path / "file" / "f", encoder, files)


def test_an_old_format_is_refused(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    made(tmp_path / "f", encoder, files)
    index = tmp_path / "f" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 1}))
    with pytest.raises(InputError, match=r"index.json is not of format 2; delete \S+ and recompute"):
        FeatureStore(tmp_path / "f")


def test_other_images_with_the_same_ids_are_refused(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    """A newly generated or another dataset can have the same ids, key and sizes."""
    made(tmp_path / "f", encoder, files)
    others = []
    for number, example in enumerate(files):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (30, 30), (9 * number, 0, 99)).save(path)
        others.append(dataclasses.replace(example, image=path))
    with pytest.raises(InputError, match=r"belong to other images: .*0\.png has changed since"):
        FeatureStore.open(tmp_path / "f", encoder, SETTINGS, others)
    with pytest.raises(InputError, match="has other features: they belong to other images"):
        made(tmp_path / "f", encoder, others)
    gone = [dataclasses.replace(example, image=tmp_path / "gone.png") for example in files]
    FeatureStore.open(tmp_path / "f", encoder, SETTINGS, gone)  # image files are not needed any more


def test_questions_about_several_images_have_no_cache(tmp_path: Path, encoder: VisionEncoder, files: Files) -> None:
    pair = [replace(files[0], more_images=(files[1].image,))]
    with pytest.raises(InputError, match=r"feature_cache supports one image per question, but .* is one of several"):
        made(tmp_path / "f", encoder, pair)
    made(tmp_path / "f", encoder, files)
    with pytest.raises(InputError, match="supports one image per question"):
        FeatureStore.open(tmp_path / "f", encoder, SETTINGS, pair)
