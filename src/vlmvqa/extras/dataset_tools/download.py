"""Fetch a benchmark's official archives: files that exist are kept, and an interrupted download is resumed.

root/archives/train2014.zip          whole, its checksum right where one is published
root/archives/train2014.zip.part     being fetched; the next try resumes at its end
root/archives/train2014.zip.done     unpacked into root
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlmvqa.errors import InputError
from vlmvqa.progress import bar

CHUNK = 2**20  # bytes at a time
PATIENCE = 60  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """A file of the benchmark's own site.

    Attributes:
        url: where it is.
        md5: as published (None: it is not; then only the length is checked).
        into: folder below the root that a zip file is unpacked into; a file that is none is copied there.
    """

    url: str
    md5: str | None = None
    into: str = "."

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name


def prepare(archive: Archive, root: Path, progress: bool = True) -> bool:
    """Fetch and unpack an archive unless that is done; whether anything had to be.

    Raises:
        InputError: it cannot be fetched, is not what was published, or does not fit the disk.
    """
    folder = root / "archives"
    done = folder / f"{archive.name}.done"
    if done.exists():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = fetch(archive, folder, progress)
        unpack(path, root / archive.into, progress)
        done.touch()
    except OSError as error:
        raise InputError(
            f"{root} cannot be written ({error.strerror or error}); free space or choose another data.root, and "
            "resume with the same command"
        ) from error
    return True


def fetch(archive: Archive, folder: Path, progress: bool = True) -> Path:
    """The archive's file, whole and checked."""
    path = folder / archive.name
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            start = start if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0  # else it begins anew
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else None
            with (
                part.open("ab" if start else "wb") as file,
                bar(doing=archive.name, unit="B", total=total, shown=progress, initial=start, unit_scale=True) as done,
            ):
                while block := answer.read(CHUNK):
                    file.write(block)
                    done.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # nothing is missing
            raise InputError(
                f"{archive.url} answers {error.code} ({error.reason}); look for its new place on the benchmark's site, "
                f"put the file into {folder}, and resume with the same command"
            ) from error
        total = start
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"{archive.url} cannot be reached ({reason}); resume with the same command later") from error
    size = part.stat().st_size
    if total is not None and size < total:
        raise InputError(f"{archive.url} broke off at {size:,} of {total:,} bytes; resume with the same command")
    if archive.md5 is not None and (found := _md5(part)) != archive.md5:
        part.unlink()
        raise InputError(f"{archive.url}: its checksum is {found}, published is {archive.md5}; fetch it again")
    part.rename(path)
    return path


def unpack(path: Path, into: Path, progress: bool = True) -> None:
    """Unpack a zip file; a file of another kind is copied."""
    into.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".zip":
        shutil.copyfile(path, into / path.name)
        return
    try:
        with zipfile.ZipFile(path) as archive:  # which never writes outside of its folder
            for member in bar(archive.infolist(), doing=f"unpacking {path.name}", unit="files", shown=progress):
                archive.extract(member, into)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        path.unlink()
        raise InputError(f"{path} is not a whole zip file ({error}); fetch it again with the same command") from error


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
