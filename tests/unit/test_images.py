"""Image decoding: all formats give one kind of tensor; other files give one sentence."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmvqa.data.images import ImageSettings, decode, to_tensor
from vlmvqa.errors import InputError

HALF = (0.5, 0.5, 0.5)
RED = (200, 30, 40)


def noise_image(width: int = 40, height: int = 24) -> Image.Image:
    """Noise, whose JPEG has many bytes to damage."""
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def close(pixel: object, color: tuple[int, int, int], by: int = 8) -> bool:
    assert isinstance(pixel, tuple) and len(pixel) == 3
    return max(abs(a - b) for a, b in zip(pixel, color, strict=True)) <= by


# --- decode: what is read -----------------------------------------------------------------------------


def test_a_path_its_bytes_and_a_pil_image_give_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise_image().save(path, quality=95)
    with Image.open(path) as opened:
        images = [decode(path, "a"), decode(path.read_bytes(), "a"), decode(opened, "a")]
    assert [(image.mode, image.size) for image in images] == [("RGB", (40, 24))] * 3
    assert len({image.tobytes() for image in images}) == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decode(Image.new(mode, (3, 2)), "x").mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGB", "WEBP")]
)
def test_a_red_image_stays_red(mode: str, form: str) -> None:
    expected = (80, 80, 80) if mode == "L" else RED  # Rec. 601 luma of the red
    image = Image.new("RGB", (16, 16), RED).convert(mode, palette=Image.Palette.ADAPTIVE)
    assert close(decode(encoded(image, form), "x").getpixel((8, 8)), expected)


def test_exif_rotation_is_applied_and_the_given_image_left_alone() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: show it turned by 90 degrees clockwise
    content = encoded(image, "JPEG", exif=exif, quality=95)
    turned = decode(content, "x")
    assert turned.size == (20, 40)
    assert close(turned.getpixel((10, 5)), RED) and close(turned.getpixel((10, 35)), (255, 255, 255))
    with Image.open(io.BytesIO(content)) as opened:
        assert decode(opened, "x").tobytes() == turned.tobytes()
        assert opened.size == (40, 20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, of what is tested
def test_unreadable_exif_data_do_not_cost_a_good_image() -> None:
    assert decode(encoded(noise_image(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0"), "x").size == (40, 24)


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    decoded = decode(encoded(image, "PNG"), "x")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert close(decoded.getpixel((1, 0)), (127, 127, 127), by=1)
    assert decode(Image.new("LA", (1, 1), (0, 0)), "x").getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 30, 40])
    image.putpixel((1, 0), 1)
    decoded = decode(encoded(image, "PNG", transparency=0), "x")
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_shades(form: str) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    decoded = decode(encoded(Image.fromarray(values), form), "x")
    assert np.array_equal(np.asarray(decoded)[..., 0].ravel(), np.arange(256))


def test_a_single_pixel_and_a_very_wide_image_are_read() -> None:
    for size in ((1, 1), (20_000, 1), (20_000, 30)):
        assert decode(encoded(Image.new("RGB", size, RED), "JPEG"), "x").size == size


# --- decode: what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_refused_and_never_filled_with_grey(tmp_path: Path, form: str) -> None:
    content = encoded(noise_image(200, 100), form)
    path = tmp_path / "cut"
    path.write_bytes(content[: int(len(content) * 0.6)])
    with pytest.raises(InputError, match=f"^{path} (cannot be read|is not an image)") as caught:
        decode(path, str(path))
    assert "\n" not in str(caught.value) and "fetch it again" in str(caught.value)


def test_a_lazily_opened_pil_image_that_is_truncated_is_refused() -> None:
    content = encoded(noise_image(200, 100), "JPEG")
    with (
        Image.open(io.BytesIO(content[: len(content) // 2])) as opened,
        pytest.raises(InputError, match=r"^row 3 cannot"),
    ):
        decode(opened, "row 3")


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"\0" * 1000, b"\xff\xd8\xff"])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path} (is not an image in a known format|cannot be read)"):
        decode(path, str(path))


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match=r"a\.jpg is empty \(0 bytes\); fetch it again\."):
        decode(tmp_path / "a.jpg", "a.jpg")
    with pytest.raises(InputError, match=r"^row 5 is empty"):
        decode(b"", "row 5")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jpg does not exist; fetch it, or correct the path\."):
        decode(tmp_path / "a.jpg", "a.jpg")
    with pytest.raises(InputError, match=r"^folder cannot be read \(Is a directory\)"):
        decode(tmp_path, "folder")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    """A PNG of a few bytes that declares `side` x `side` pixels: above Pillow's limit, and above twice that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is an error
        with pytest.raises(InputError, match=r"^bomb\.png has too many pixels \(over 89,478,485\)"):
            decode(bomb, "bomb.png")


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(InputError, match="floating-point"):
        decode(Image.new("F", (2, 2)), "x")
    with pytest.raises(InputError, match="32-bit"):
        decode(Image.new("I", (2, 2), 1_000_000), "x")


def test_random_damage_never_raises_anything_but_an_input_error() -> None:
    rng = np.random.default_rng(0)
    contents = [encoded(noise_image(), form) for form in ("JPEG", "PNG", "WEBP", "TIFF")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of damage in its own words, too
        for number in range(300):
            damaged = bytearray(contents[number % len(contents)])
            for place in rng.integers(0, len(damaged), 12):
                damaged[place] = rng.integers(0, 256)
            try:
                assert decode(bytes(damaged), "x").mode == "RGB"
            except InputError as error:
                assert str(error).startswith("x ")


# --- decode: at a reduced scale -----------------------------------------------------------------------


def reducing(size: int, **change: Any) -> ImageSettings:
    return ImageSettings(size, HALF, HALF, **{"reduced": True, **change})


@pytest.mark.parametrize("resize", ["squash", "center_crop"])
@pytest.mark.parametrize(
    ("given", "size", "expected"),
    [
        ((640, 480), 224, (320, 240)),
        ((480, 640), 240, (240, 320)),  # exactly what is needed
        ((640, 480), 241, (640, 480)),  # a half would be one pixel short
        ((641, 483), 60, (81, 61)),  # an eighth, rounded up
        ((4000, 60), 224, (4000, 60)),  # one side has nothing to give
        ((30, 20), 224, (30, 20)),
    ],
)
def test_a_jpeg_is_reduced_as_far_as_both_sides_allow(
    resize: str, given: tuple[int, int], size: int, expected: tuple[int, int]
) -> None:
    content = encoded(noise_image(*given), "JPEG")
    assert decode(content, "x", reducing(size, resize=resize)).size == expected
    assert decode(content, "x").size == decode(content, "x", ImageSettings(size, HALF, HALF)).size == given


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"}])
@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_a_reduced_image_shows_the_same_thing(options: dict[str, Any], resize: str) -> None:
    y, x = np.mgrid[0:480, 0:640]
    values = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.cos(y / 30), (x + y) / 5], axis=-1)
    image = Image.fromarray(values.astype(np.uint8)).convert(options.pop("mode", "RGB"))
    content = encoded(image, "JPEG", quality=90, **options)
    settings = reducing(100, resize=resize)
    reduced, whole = decode(content, "x", settings), decode(content, "x")
    assert reduced.mode == "RGB" and reduced.size == (160, 120)
    difference = (to_tensor(reduced, settings) - to_tensor(whole, settings)).abs() * 127.5
    assert difference.mean() < 1 and difference.max() < 12  # grey levels


def test_a_reduced_image_is_turned_as_its_exif_data_say() -> None:
    image = Image.new("RGB", (400, 200), "white")
    image.paste(RED, (0, 0, 200, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(image, "JPEG", exif=exif, quality=95), "x", reducing(50))
    assert turned.size == (50, 100)
    assert close(turned.getpixel((25, 25)), RED) and close(turned.getpixel((25, 75)), (255, 255, 255))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.95])
def test_a_cut_jpeg_is_refused_at_every_scale_with_the_same_words(options: dict[str, bool], kept: float) -> None:
    content = encoded(noise_image(200, 100), "JPEG", **options)
    said = set()
    for settings in (None, *(reducing(size) for size in (10, 20, 40, 90))):
        with pytest.raises(InputError, match=r"^x cannot be read") as caught:
            decode(content[: int(len(content) * kept)], "x", settings)
        said.add(str(caught.value))
    assert len(said) == 1


def test_random_damage_is_an_input_error_at_a_reduced_scale_too() -> None:
    rng = np.random.default_rng(0)
    content = encoded(noise_image(), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow tells of damage in its own words, too
        for _ in range(100):
            damaged = bytearray(content)
            for place in rng.integers(0, len(damaged), 12):
                damaged[place] = rng.integers(0, 256)
            try:
                assert decode(bytes(damaged), "x", reducing(8)).mode == "RGB"
            except InputError as error:
                assert str(error).startswith("x ")


def test_what_is_too_large_is_refused_before_it_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is an error
        with pytest.raises(InputError, match=r"too many pixels"):
            decode(encoded(noise_image(150, 100), "JPEG"), "x", reducing(10))


def test_a_given_pil_image_and_other_formats_are_not_reduced() -> None:
    settings = reducing(10)
    with Image.open(io.BytesIO(encoded(noise_image(80, 80), "JPEG"))) as opened:
        assert decode(opened, "x", settings).size == (80, 80)
        assert opened.size == (80, 80)
    for form in ("PNG", "WEBP", "GIF", "TIFF"):
        assert decode(encoded(noise_image(80, 80), form), "x", settings).size == (80, 80)


# --- to_tensor ----------------------------------------------------------------------------------------


def test_the_tensor_is_the_normalised_image_channels_first() -> None:
    image = noise_image(32, 32)
    tensor = to_tensor(image, ImageSettings(32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    expected = (np.asarray(image) / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    torch.testing.assert_close(tensor, torch.from_numpy(expected.transpose(2, 0, 1)).float())


def test_squash_keeps_the_whole_image_and_center_crop_the_middle_square() -> None:
    image = Image.new("RGB", (60, 20), "black")
    image.paste((255, 255, 255), (20, 0, 40, 20))  # the middle third is white
    squashed = to_tensor(image, ImageSettings(30, HALF, HALF, interpolation="nearest"))
    cropped = to_tensor(image, ImageSettings(30, HALF, HALF, interpolation="nearest", resize="center_crop"))
    assert squashed[:, :, :10].eq(-1).all() and squashed[:, :, 10:20].eq(1).all() and squashed[:, :, 20:].eq(-1).all()
    assert cropped.eq(1).all()


@pytest.mark.parametrize(("size", "box"), [((90, 30), (20, 0, 40, 20)), ((30, 90), (0, 20, 20, 40))])
def test_center_crop_is_resizing_the_shorter_side_and_then_cropping(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = noise_image(*size)
    tensor = to_tensor(image, ImageSettings(20, HALF, HALF, resize="center_crop"))
    smaller = image.resize((size[0] * 2 // 3, size[1] * 2 // 3), Image.Resampling.BICUBIC)
    whole = to_tensor(smaller.crop(box), ImageSettings(20, HALF, HALF))
    torch.testing.assert_close(tensor, whole, atol=2 / 127.5, rtol=0)  # one grey level of each of two roundings


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_making_a_image_smaller_averages_it(interpolation: str, resize: str) -> None:
    checkers = Image.fromarray(((np.indices((128, 128)).sum(0) % 2) * 255).astype(np.uint8)).convert("RGB")
    tensor = to_tensor(checkers, ImageSettings(16, HALF, HALF, interpolation, resize))
    assert tensor.abs().max() < 0.05


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (3, 2)])
@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_extreme_images_keep_their_colour(size: tuple[int, int], resize: str) -> None:
    tensor = to_tensor(Image.new("RGB", size, "white"), ImageSettings(224, HALF, HALF, resize=resize))
    assert tensor.shape == (3, 224, 224) and tensor.eq(1).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": 0}, "image size is 0 pixels"),
        ({"interpolation": "bicubik"}, "interpolation=bicubik is unknown .*did you mean 'bicubic'"),
        ({"resize": "stretch"}, r"resize=stretch is unknown \(use squash or center_crop or letterbox\)"),
        ({"std": (0.5, 0.0, 0.5)}, "three positive stds"),
        ({"mean": (0.5,)}, "three means"),
    ],
)
def test_settings_that_cannot_be_are_explained(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ImageSettings(**{"size": 8, "mean": HALF, "std": HALF, **change})  # type: ignore[arg-type]
