"""Download and unpack a benchmark's official archives; existing files are kept, interrupted downloads are resumed.

root/archives/train2014.zip.part     incomplete; the next call resumes at its end
root/archives/train2014.zip          complete
root/archives/train2014.zip.done     marks an archive that was verified and unpacked into root
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import httpx

from vlmvqa.errors import InputError
from vlmvqa.ranks import bar

TIMEOUT = 60  # seconds without data


def download(root: Path, url: str, md5: str | None = None, into: str = ".") -> bool:
    """Download, verify and unpack an archive unless that was done before; return whether it was necessary.

    Args:
        root: the dataset's folder.
        url: the file on the benchmark's website.
        md5: the published checksum (None: only the length is checked).
        into: the folder below the root that a zip file is unpacked into and other files are copied to.

    Raises:
        InputError: the download fails, the checksum differs, or the disk is full.
    """
    path = root / "archives" / PurePosixPath(url).name
    done = path.with_name(f"{path.name}.done")
    if done.exists():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _fetch(url, path)
        if md5 is not None:
            _verify(path, url, md5)
        (root / into).mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            _unzip(path, root / into)
        else:
            shutil.copyfile(path, root / into / path.name)
        done.touch()
    except OSError as error:
        raise InputError(
            f"{root} cannot be written ({error.strerror or error}); free space or choose another data.root, and "
            "resume with the same command"
        ) from error
    return True


def _fetch(url: str, path: Path) -> None:
    """Download a file, resuming at the end of its `.part` file."""
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        with httpx.stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            if response.status_code != httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:  # else the .part file is complete
                response.raise_for_status()
                start = start if response.status_code == httpx.codes.PARTIAL_CONTENT else 0  # no ranges: start over
                total = start + int(response.headers.get("Content-Length", 0)) or None
                with (
                    part.open("ab" if start else "wb") as file,
                    bar(doing=path.name, unit="B", total=total, initial=start, unit_scale=True) as count,
                ):
                    for block in response.iter_raw():
                        count.update(file.write(block))
    except httpx.HTTPStatusError as error:
        raise InputError(
            f"{url} returned {error.response.status_code} ({error.response.reason_phrase}); find its new URL on the "
            f"benchmark's website, put the file into {path.parent}, and resume with the same command"
        ) from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise InputError(f"{url} cannot be reached ({error}); resume with the same command later") from error
    part.rename(path)


def _verify(path: Path, url: str, md5: str) -> None:
    """Delete a file with another checksum than the published one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        path.unlink()
        raise InputError(f"{url}: its checksum is {found}, not {md5} as published; download it again")


def _unzip(path: Path, into: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:  # extract() never writes outside of its folder
            for member in bar(archive.infolist(), doing=f"unpacking {path.name}", unit="files"):
                archive.extract(member, into)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        path.unlink()
        raise InputError(
            f"{path} is not a complete zip file ({error}); download it again with the same command"
        ) from error
