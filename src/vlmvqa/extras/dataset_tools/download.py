"""Download and unpack a benchmark's official archives; existing files are kept, interrupted downloads are resumed.

root/archives/train2014.zip          complete, with the published checksum
root/archives/train2014.zip.part     incomplete; the next call resumes at its end
root/archives/train2014.zip.done     marks an archive that was unpacked into root
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
from vlmvqa.ranks import bar

CHUNK = 2**20  # bytes
TIMEOUT = 60  # seconds without data


@dataclass(frozen=True)
class Archive:
    """A file on the benchmark's website.

    Attributes:
        url: its address.
        md5: the published checksum (None: only the length is checked).
        into: the folder below the root that a zip file is unpacked into and other files are copied to.
    """

    url: str
    md5: str | None = None
    into: str = "."

    @property
    def name(self) -> str:
        """The file name in the URL."""
        return PurePosixPath(self.url).name


def prepare(archive: Archive, root: Path) -> bool:
    """Download and unpack an archive unless that was done before; return whether it was necessary.

    Raises:
        InputError: the download fails, the checksum differs, or the disk is full.
    """
    folder = root / "archives"
    done = folder / f"{archive.name}.done"
    if done.exists():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = download(archive, folder)
        unpack(path, root / archive.into)
        done.touch()
    except OSError as error:
        raise InputError(
            f"{root} cannot be written ({error.strerror or error}); free space or choose another data.root, and "
            "resume with the same command"
        ) from error
    return True


def download(archive: Archive, folder: Path) -> Path:
    """Return the path of the complete, verified file, downloading what is missing."""
    path = folder / archive.name
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            start = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0  # no ranges: start over
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with (
                part.open("ab" if start else "wb") as file,
                bar(doing=archive.name, unit="B", total=total, initial=start, unit_scale=True) as count,
            ):
                while block := response.read(CHUNK):
                    file.write(block)
                    count.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the .part file is complete
            raise InputError(
                f"{archive.url} returned {error.code} ({error.reason}); find its new URL on the benchmark's website, "
                f"put the file into {folder}, and resume with the same command"
            ) from error
        total = start
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"{archive.url} cannot be reached ({reason}); resume with the same command later") from error
    size = part.stat().st_size
    if total is not None and size < total:
        raise InputError(
            f"{archive.url}: the connection closed after {size:,} of {total:,} bytes; resume with the same command"
        )
    if archive.md5 is not None and (found := _md5(part)) != archive.md5:
        part.unlink()
        raise InputError(f"{archive.url}: its checksum is {found}, not {archive.md5} as published; download it again")
    part.rename(path)
    return path


def unpack(path: Path, into: Path) -> None:
    """Unpack a zip file; copy any other file."""
    into.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".zip":
        shutil.copyfile(path, into / path.name)
        return
    try:
        with zipfile.ZipFile(path) as archive:  # extract() never writes outside of its folder
            for member in bar(archive.infolist(), doing=f"unpacking {path.name}", unit="files"):
                archive.extract(member, into)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        path.unlink()
        raise InputError(
            f"{path} is not a complete zip file ({error}); download it again with the same command"
        ) from error


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
