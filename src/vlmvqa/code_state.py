"""The code that computes a result: git state of this package, versions of the others."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vlmvqa

PACKAGES = ("torch", "transformers", "timm", "tokenizers", "pillow", "rapidfuzz", "pycocoevalcap")
TIMEOUT = 20  # seconds: network folders can be slow, but must not block a run


@dataclass(frozen=True)
class CodeState:
    """The git state of a source tree.

    Attributes:
        commit: the full hash; None if there is none.
        changed: whether tracked files differ from the commit.
        reason: why there is no commit.
    """

    commit: str | None
    changed: bool = False
    reason: str = ""

    def __str__(self) -> str:
        if self.commit is None:
            return f"unknown: {self.reason}"
        return self.commit + (", with changes that are not committed" if self.changed else "")


@cache
def code_state(package: Path = Path(__file__).parent) -> CodeState:
    """Return the state of the repository that tracks `package`, read once, since code is loaded at the start.

    An installed copy inside another repository (in its `.venv`) is not tracked by it, so its commit is not reported.
    """
    try:
        tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
        if tracked.returncode:
            return CodeState(None, reason=f"{package.name} does not run from a git repository")
        head = _git(package, "rev-parse", "HEAD")
        if head.returncode:
            return CodeState(None, reason="its git repository has no commit")
        status = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired) as error:
        return CodeState(None, reason=f"git failed ({type(error).__name__})")
    return CodeState(head.stdout.strip(), bool(status.stdout.strip()))


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Reading must not take optional locks while a user works in the repository.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        env=environment,
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that answer and score."""
    found = {"vlmvqa": vlmvqa.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
