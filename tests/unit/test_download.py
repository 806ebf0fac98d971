"""Archives downloaded from a local server: complete, interrupted, changed, and unpacked once."""

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
from vlmvqa.extras.dataset_tools.download import download


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


CONTENT = zipped(train2014__a=b"a" * 5000, questions=b"{}")


@dataclass
class Site:
    """A server: its content, the number of bytes after which it closes the connection, the requested ranges."""

    content: bytes = CONTENT
    closes_after: int | None = None
    ranges: bool = True
    requested: list[str | None] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            made.requested.append(wanted)
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
            self.wfile.write(body[: made.closes_after])

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()


def prepare(site: Site, root: Path, **changes: Any) -> bool:
    return download(root, **{"url": f"{site.address}/data.zip", "md5": hashlib.md5(CONTENT).hexdigest(), **changes})


def test_it_is_downloaded_verified_and_unpacked_once(site: Site, tmp_path: Path) -> None:
    assert prepare(site, tmp_path)
    assert (tmp_path / "train2014" / "a").read_bytes() == b"a" * 5000 and (tmp_path / "questions").exists()
    assert not prepare(site, tmp_path) and len(site.requested) == 1


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "starts over"])
def test_an_interrupted_download_is_resumed(site: Site, tmp_path: Path, ranges: bool) -> None:
    site.closes_after, site.ranges = 100, ranges
    with pytest.raises(InputError, match=r"closed after 100 of|cannot be reached"):
        prepare(site, tmp_path)
    site.closes_after = None
    assert prepare(site, tmp_path)
    assert (tmp_path / "archives" / "data.zip").read_bytes() == CONTENT
    assert site.requested == [None, "bytes=100-"]


def test_a_complete_part_file_is_renamed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "data.zip.part").write_bytes(CONTENT)
    assert prepare(site, tmp_path)
    assert (tmp_path / "archives" / "data.zip").read_bytes() == CONTENT


def test_a_wrong_checksum(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[:-1] + b"x"
    with pytest.raises(InputError, match="its checksum is"):
        prepare(site, tmp_path)
    assert not list((tmp_path / "archives").iterdir())


def test_a_file_that_is_no_zip_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    site.content = b"<html>please log in</html>"
    with pytest.raises(InputError, match="not a complete zip file"):
        prepare(site, tmp_path, md5=None)
    site.content = CONTENT
    assert prepare(site, tmp_path, md5=None)


def test_a_moved_file_and_an_unreachable_site(site: Site, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"returned 404 .*put the file into"):
        prepare(site, tmp_path, url=f"{site.address}/moved")
    with pytest.raises(InputError, match="cannot be reached"):
        prepare(site, tmp_path, url="http://127.0.0.1:9/data.zip")


def test_a_damaged_stream_inside_a_zip_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    at = CONTENT.index(b"train2014/a") + len(b"train2014/a")
    site.content = CONTENT[:at] + b"\xff" * 8 + CONTENT[at + 8 :]
    with pytest.raises(InputError, match="not a complete zip file"):
        prepare(site, tmp_path, md5=None)
    site.content = CONTENT
    assert prepare(site, tmp_path, md5=None)
