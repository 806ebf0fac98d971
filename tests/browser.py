"""A real browser to look at pages with: Chromium, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or "/usr/bin/chromium"
QUIET = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Playwright's browser, which asks nothing of anywhere by itself."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    if not Path(BROWSER).exists():
        pytest.skip(f"there is no {BROWSER}, a browser to look at the page with")
    arguments = [f"--{one}" for one in ("no-sandbox", "disable-gpu", "disable-quic", *QUIET)]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=arguments)
        yield browser
        browser.close()
