"""A training at a terminal: a bar with the time left, and Ctrl-C, which saves and says how to resume."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import termios
from pathlib import Path

from tests import forks
from tests.end_to_end.scripts import LONGER, command, losses
from vlmvqa.training.checkpoints import complete_checkpoints, step_of

# The keyboard interrupts every process of its terminal: the one that trains, and those that read for it.
GIVEN = (*LONGER, "trainer.num_train_epochs=400", "trainer.eval_strategy=no", "trainer.save_steps=100000")
WORKERS = ("trainer.dataloader_num_workers=1",)


def test_a_bar_at_a_terminal_and_ctrl_c_that_saves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # rows, columns
    given = (f"run.dir={folder}", f"data.root={tmp_path / 'shapes'}", *GIVEN, *WORKERS)
    process = forks.script(command("train", *given)[1:], terminal=theirs)
    os.close(theirs)
    printed, pressed = "", False
    try:
        while piece := read(ours):  # every step turns the bar, so this turns with it
            printed += piece
            if not pressed and max(losses(folder), default=0) >= 3:
                os.write(ours, b"\x03")
                pressed = True
        assert process.wait(timeout=60) == 128 + signal.SIGINT, printed[-3000:]
    finally:
        process.kill()
        os.close(ours)
    assert re.search(r"/800, [\d:]+ left, loss \S+, lr \S+, \S+ questions/s", printed), printed[-3000:]
    assert "Traceback" not in printed
    assert printed.count("Ctrl-C: finishing this step and saving, then stopping; press it again to stop at once") == 1
    assert f"stopped by Ctrl-C, saved in {folder / 'latest'}; resume with resume=auto" in printed
    (checkpoint,) = complete_checkpoints(folder)
    assert step_of(checkpoint) == max(losses(folder)) < 800


def read(terminal: int) -> str:
    """What is printed next; nothing when nobody prints there any more."""
    try:
        return os.read(terminal, 4096).decode(errors="replace")
    except OSError:
        return ""
