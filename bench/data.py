"""Image loading speed, and the number of workers with which the model never waits for images.

    python -m bench.data --model mid

Photographs of COCO's size (640 x 480) with the questions of `--shape`, and pages of DocVQA's size (1700 x 2200) with
DocVQA's questions, as JPEG bytes in memory, pass through the project's `decode` and `to_tensor` in a torch DataLoader
with 0, 1 and 2 workers. They are decoded at full scale and at a reduced scale (`ImageSettings.reduced`), which changes
the pixels slightly; the difference is printed in grey levels of 255.

The rate that the model needs is an upper bound: the matrix rate measured on this device, divided by the FLOPs of a
training step for an image with its questions. `--need` sets it in images per second, for another device. The number of
workers follows from the speed of one worker, with one core each.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench import models, shapes, tables
from vlmvqa.data.images import ImageSettings, decode, to_tensor

HALF = (0.5, 0.5, 0.5)
WORKERS = (0, 1, 2)
QUALITY = 90


def photograph(width: int = 640, height: int = 480, seed: int = 0) -> Image.Image:
    """Generate slow colour gradients, noise with the 1 / frequency spectrum of photographs, and hard-edged objects."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    gradients = np.stack([64 + 50 * np.sin(x / (60 + 30 * c) + seed) * np.cos(y / (80 - 10 * c)) for c in range(3)], -1)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((3, height, width))) / frequency
    noise = np.fft.ifft2(spectrum).real.transpose(1, 2, 0)
    pixels = 64 + gradients + 40 * noise / noise.std()
    for _ in range(12):
        left, top = rng.integers(0, width - 60), rng.integers(0, height - 60)
        pixels[top : top + rng.integers(8, 160), left : left + rng.integers(8, 160)] = rng.integers(0, 256, 3)
    pixels += 4 * rng.standard_normal(pixels.shape)  # sensor noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def page(width: int = 1700, height: int = 2200, seed: int = 0) -> Image.Image:
    """Generate a printed page: black letters on white."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for top in range(80, height - 80, 44):
        words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(15)]
        draw.text((90, top), " ".join(words), fill="black", font=ImageFont.load_default(28))
    return image


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


class JpegDataset(Dataset[Tensor]):
    """`count` images, read from a few files in turn."""

    def __init__(self, files: Sequence[bytes], count: int, settings: ImageSettings) -> None:
        self.files, self.count, self.settings = files, count, settings

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index % len(self.files)]
        return to_tensor(decode(file, f"image {index}", self.settings), self.settings)


def images_per_second(images: JpegDataset, workers: int, repeats: int = 1, batch: int = 8) -> float:
    """Return the rate of the fastest of `repeats` epochs, with the workers already started."""
    loader = DataLoader(images, batch, num_workers=workers, persistent_workers=workers > 0)
    next(iter(loader))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in loader:
            pass
        seconds.append(time.perf_counter() - started)
    return len(images) / min(seconds)


def difference(files: Sequence[bytes], settings: ImageSettings) -> tuple[float, float]:
    """Return the mean and maximum difference, in grey levels, between full and reduced decoding."""
    full, reduced = (JpegDataset(files, len(files), replace(settings, reduced=reduced)) for reduced in (False, True))
    scale = 255 * settings.std[0]
    difference = torch.stack([(full[n] - reduced[n]).abs() * scale for n in range(len(files))])
    return difference.mean().item(), difference.max().item()


@dataclass(frozen=True)
class Kind:
    """A kind of images; `shape` sets their questions and the model's image size."""

    name: str
    render: Callable[..., Image.Image]
    shape: str
    share: int  # one in `share` of `--images` is used, because large images take long

    def files(self, count: int) -> list[bytes]:
        return [jpeg(self.render(seed=seed)) for seed in range(count)]


def kinds(shape: str) -> list[Kind]:
    pages = Kind("pages, 1700 x 2200", page, "docvqa", 8)
    return [pages] if shape == "docvqa" else [Kind("photographs, 640 x 480", photograph, shape, 1), pages]


def flops_an_image(model: str, shape: shapes.Shape, seed: int) -> float:
    """Return the FLOPs of a training step, forward and backward, per image with its questions."""
    built = models.build_model(model, shape, "meta", seed)
    documents = shapes.random_documents(shape, 16, models.vocabulary(built), seed)
    pixels = torch.empty(len(documents), 3, 1, 1)  # only their number matters
    batch = models.make_batch(built, [[document] for document in documents], pixels)
    return models.needed_flops(built, batch) / len(documents)


def compare(kind: Kind, images: int, need: float, repeats: int) -> list[tables.Row]:
    """Return a row per number of workers, for full and reduced decoding."""
    rows: list[tables.Row] = []
    count = max(images // kind.share, 1)
    files = kind.files(min(count, 8))
    full = ImageSettings(shapes.SHAPES[kind.shape].image_size, HALF, HALF)
    mean, largest = difference(files, full)
    for settings in (full, replace(full, reduced=True)):
        dataset = JpegDataset(files, count, settings)
        for workers in WORKERS:
            rate = images_per_second(dataset, workers, repeats)
            row = {"pictures": kind.name, "size": settings.size, "reduced": settings.reduced, "workers": workers}
            row |= {"images_per_second": rate, "need": need}
            row |= {"mean_difference": mean, "largest_difference": largest} if settings.reduced else {}
            rows.append(row)
    for row in rows:
        one = {r["reduced"]: r["images_per_second"] for r in rows if r["workers"] == 1}
        base = next(r for r in rows if r["workers"] == row["workers"])  # full decoding comes first
        row["ratio"] = row["images_per_second"] / base["images_per_second"]
        row["workers_needed"] = math.ceil(need / one[row["reduced"]])
    return rows


def main(arguments: Sequence[str] | None = None) -> list[tables.Row]:
    parser = tables.parser("data", __doc__, images=256)
    parser.add_argument("--need", type=float, help="images per second that the model needs (default: as above)")
    args = parser.parse_args(arguments)
    machine = tables.machine(args.device, torch.bfloat16 if args.model == "real" else torch.float32)
    print(tables.describe(machine))

    rows: list[tables.Row] = []
    for kind in kinds(args.shape):
        flops = flops_an_image(args.model, shapes.SHAPES[kind.shape], args.seed)
        need = args.need or machine["matrix_flops_per_second"] / flops
        rows += compare(kind, args.images, need, args.repeats)
        print(
            f"{kind.name}: the model needs {flops / 1e12:.3g} TFLOP per image with its questions ({kind.shape}), "
            f"at most {need:.3g} images/s; reduced decoding changes pixels by {rows[-1]['mean_difference']:.1f} of 255 "
            f"on average and by {rows[-1]['largest_difference']:.0f} at most"
        )
    shown = [
        (
            f"{row['pictures']} to {row['size']}, {'reduced' if row['reduced'] else 'full'}",
            row["workers"],
            f"{row['images_per_second']:.3g}",
            tables.times(row["ratio"]),
            f"{row['need']:.3g}",
            row["workers_needed"],
        )
        for row in rows
    ]
    print(tables.table(("", "workers", "images/s", "ratio", "needed", "workers that suffice"), shown))
    tables.write_json(args, machine, rows)
    return rows


if __name__ == "__main__":
    main()
