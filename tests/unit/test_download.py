"""Fetching archives from a server on this machine: whole, broken off, changed, unpacked once."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlmvqa.errors import InputError
from vlmvqa.extras.dataset_tools.download import Archive, fetch, prepare


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


CONTENT = zipped(train2014__a=b"a" * 5000, questions=b"{}")


@dataclass
class Site:
    """A server: what it holds, after how many bytes it breaks off, what it was asked for."""

    content: bytes = CONTENT
    breaks_at: int | None = None
    ranges: bool = True
    asked: list[str | None] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            made.asked.append(wanted)
            if not self.path.endswith("data.zip"):
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and made.ranges else 0
            if start and start >= len(made.content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            body = made.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: made.breaks_at])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


def archive(site: Site, **changes: Any) -> Archive:
    return Archive(**{"url": f"{site.address}/data.zip", "md5": hashlib.md5(CONTENT).hexdigest(), **changes})


def test_it_is_fetched_checked_and_unpacked_once(site: Site, tmp_path: Path) -> None:
    assert prepare(archive(site), tmp_path, progress=False)
    assert (tmp_path / "train2014" / "a").read_bytes() == b"a" * 5000 and (tmp_path / "questions").exists()
    assert not prepare(archive(site), tmp_path, progress=False) and len(site.asked) == 1


@pytest.mark.parametrize("ranges", [True, False], ids=["goes on", "begins anew"])
def test_one_that_broke_off_goes_on(site: Site, tmp_path: Path, ranges: bool) -> None:
    site.breaks_at, site.ranges = 100, ranges
    with pytest.raises(InputError, match=r"broke off at 100 of|cannot be reached"):
        fetch(archive(site), tmp_path, progress=False)
    site.breaks_at = None
    assert fetch(archive(site), tmp_path, progress=False).read_bytes() == CONTENT
    assert site.asked == [None, "bytes=100-"]


def test_all_there_but_not_renamed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.zip.part").write_bytes(CONTENT)
    assert fetch(archive(site), tmp_path, progress=False).read_bytes() == CONTENT


def test_another_files_checksum(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[:-1] + b"x"
    with pytest.raises(InputError, match="its checksum is"):
        fetch(archive(site), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_what_is_no_zip_is_fetched_again(site: Site, tmp_path: Path) -> None:
    site.content = b"<html>please log in</html>"
    with pytest.raises(InputError, match="not a whole zip file"):
        prepare(archive(site, md5=None), tmp_path, progress=False)
    site.content = CONTENT
    assert prepare(archive(site, md5=None), tmp_path, progress=False)


def test_a_place_that_has_moved_and_a_site_that_is_away(site: Site, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"answers 404 .*put the file into"):
        fetch(archive(site, url=f"{site.address}/moved"), tmp_path, progress=False)
    with pytest.raises(InputError, match="cannot be reached"):
        fetch(archive(site, url="http://127.0.0.1:9/data.zip"), tmp_path, progress=False)


def test_a_damaged_stream_inside_a_zip_is_fetched_again(site: Site, tmp_path: Path) -> None:
    at = CONTENT.index(b"train2014/a") + len(b"train2014/a")
    site.content = CONTENT[:at] + b"\xff" * 8 + CONTENT[at + 8 :]
    with pytest.raises(InputError, match="not a whole zip file"):
        prepare(archive(site, md5=None), tmp_path, progress=False)
    site.content = CONTENT
    assert prepare(archive(site, md5=None), tmp_path, progress=False)
