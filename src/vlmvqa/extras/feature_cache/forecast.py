"""Disk space that cached features need."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from vlmvqa.errors import InputError, counted
from vlmvqa.extras.feature_cache.store import bytes_per_image


@dataclass(frozen=True)
class Forecast:
    """Size of the features of a number of images.

    Attributes:
        shape: N tokens per image and Dv vision width.
        present: bytes of features in the folder already, which are kept or replaced.
        free: free bytes on its disk.
    """

    folder: Path
    images: int
    shape: tuple[int, int]
    dtype: str
    present: int
    free: int

    @property
    def bytes(self) -> int:
        """Size of all features."""
        return self.images * bytes_per_image(self.shape, self.dtype)

    def __str__(self) -> str:
        present = f", {format_size(self.present)} of them already present" if self.present else ""
        return (
            f"{counted(self.images, 'image')} of {self.shape[0]} tokens x {self.shape[1]} numbers in {self.dtype}, "
            f"{format_size(bytes_per_image(self.shape, self.dtype))} each: {format_size(self.bytes)} of features in "
            f"{self.folder}{present}; {format_size(self.free)} are free"
        )

    def refuse(self) -> None:
        """Raise if the disk has too little space."""
        missing = self.bytes - self.present - self.free
        if missing > 0:
            smaller = ", use features.dtype=bfloat16" if self.dtype == "float32" else ""
            raise InputError(
                f"the features need {format_size(self.bytes)}, {format_size(missing)} more than the disk of "
                f"{self.folder} has; free space there{smaller}, or choose another features.dir"
            )


def forecast(folder: Path, images: int, shape: tuple[int, int], dtype: str) -> Forecast:
    """Return the size of the features of a number of images in `folder`; `shape` is N and Dv."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    present = sum(path.stat().st_size for path in folder.glob("shard-*"))
    return Forecast(folder, images, shape, dtype, present, shutil.disk_usage(existing).free)


def format_size(count: int) -> str:
    """Return a number of bytes in decimal units: `32.7 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
