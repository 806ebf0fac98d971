"""Which code ran: the commit it was at, and whether it had been changed since."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATIENCE = 20  # seconds: a folder on a network may be slow, but must not hold a run up


@dataclass(frozen=True)
class CodeState:
    """The git state of a source tree.

    Attributes:
        commit: its full hash; None where there is none.
        changed: whether tracked files differ from it.
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
    """The state of the tree that `package` is a tracked part of, when it is first asked: what runs was loaded then.

    An installed copy may lie inside somebody else's repository (a `.venv` in it): that one's commit says nothing.
    """
    try:
        tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
        if tracked.returncode:
            return CodeState(None, reason=f"{package.name} is not run from a git tree")
        head = _git(package, "rev-parse", "HEAD")
        if head.returncode:
            return CodeState(None, reason="its git tree has no commit")
        status = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired) as error:
        return CodeState(None, reason=f"git does not answer ({type(error).__name__})")
    return CodeState(head.stdout.strip(), bool(status.stdout.strip()))


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without its optional locks, which a run that only looks must not take from someone at work in the tree.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env=environment,
    )
