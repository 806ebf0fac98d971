"""Real processes without their imports: children of a process that has imported PyTorch, transformers and DeepSpeed.

Imports take a rank several times as long as its training. `ranks` and `script` start processes as torchrun and
`python` do: each has its own session, environment, working directory, output, signals and exit status, and when one
rank fails, the others are ended. Real launchers are tested in tests/distributed/test_launchers.py.

python -m tests.forks SOCKET    the parent; the first test that needs it starts it, and it ends with the test session
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "VLMVQA_TEST_FORKS"  # in the environment: the folder of the socket, made by conftest.py
STORE = "TORCHELASTIC_USE_AGENT_STORE"  # by which torchrun tells its ranks that it holds the store they meet in
IDLE = 900.0  # seconds after which a parent that nobody asks ends, in case its session was killed
# What the scripts and the workers of tests/distributed import, or what they import on the way.
IMPORTED = (
    *("torch", "transformers", "transformers.models.gemma2.modeling_gemma2", "vlmvqa.training.trainer"),
    *("torch.distributed.fsdp", "torch.utils.tensorboard", "deepspeed", "matplotlib.figure", "hydra"),
    *(
        "vlmvqa.inference.evaluate",
        "vlmvqa.extras.report.run_report",
        "tests.unit.test_predictor",
        "tests.unit.test_trainer",
    ),
)
PATIENCE = 10.0  # seconds for the other ranks to end after SIGTERM


class Ranks:
    """Processes that run together, with the methods of `subprocess.Popen` that the tests use.

    Attributes:
        pids: of each process, by rank.
        returncode: of one process as `subprocess` gives it; of several as torchrun does, 1 where one of them failed.
        statuses: each one's exit status or negative signal, by rank, once all have ended.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environments: Sequence[dict[str, str]],
        cwd: Path = ROOT,
        errors_apart: bool = False,
        terminal: int | None = None,
        patience: float = 0.0,
    ) -> None:
        self.output = _file()
        self.errors = _file() if errors_apart else self.output
        self.returncode: int | None = None
        self.connection = _connect()
        request = {"arguments": list(arguments), "environments": list(environments), "cwd": str(cwd)}
        sent = json.dumps({**request, "terminal": terminal is not None, "patience": patience}).encode()
        files = [self.output.fileno(), self.errors.fileno()] if terminal is None else [terminal, terminal]
        socket.send_fds(self.connection, [len(sent).to_bytes(8, "big")], files)
        self.connection.sendall(sent)
        self.lines = self.connection.makefile("r")
        self.pids: list[int] = json.loads(self.lines.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            self._end(0.0)
        return self.returncode

    def wait(self, timeout: float = 280) -> int:
        if self.returncode is None and not self._end(timeout):
            self.kill()
            raise subprocess.TimeoutExpired("ranks", timeout, self.printed())
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 280) -> tuple[str, str]:
        """What was printed on stdout and stderr; all on stdout unless errors are kept apart."""
        self.wait(timeout)
        return self.printed(), "" if self.errors is self.output else _read(self.errors)

    def printed(self) -> str:
        return _read(self.output)

    def send_signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self, timeout: float) -> bool:
        if not select.select([self.connection], [], [], timeout)[0]:
            return False
        self.statuses: list[int] = json.loads(self.lines.readline())
        self.returncode = self.statuses[0] if len(self.pids) == 1 else int(any(self.statuses))
        self.connection.close()
        return True


def ranks(count: int, arguments: Sequence[str], patience: float = 0.0, **more: str) -> Ranks:
    """What `torchrun --nproc_per_node=count arguments...` starts.

    Args:
        patience: seconds that the others have to end by themselves when one has failed; torchrun gives them none.
        more: added to the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STORE: "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    given = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more for rank in range(count)]
    return Ranks(arguments, given, patience=patience)


def script(arguments: Sequence[str], cwd: Path = ROOT, terminal: int | None = None, **more: str) -> Ranks:
    """What `python arguments...` starts.

    Args:
        terminal: standard input, output and error, and the terminal whose Ctrl-C interrupts it.
    """
    return Ranks(arguments, [os.environ | more], cwd, errors_apart=True, terminal=terminal)


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", newline="")


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _connect() -> socket.socket:
    """A connection to the parent, which the first to ask for it starts."""
    folder = Path(os.environ[FOLDER])
    path = folder / "socket"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with (folder / "log").open("w") as log:
                command = [sys.executable, "-m", "tests.forks", str(path)]
                parent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            while not path.exists():
                assert parent.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def stop() -> None:
    """End the parent, if there is one; for the end of the test session."""
    path = Path(os.environ[FOLDER]) / "socket"
    if path.exists():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            socket.send_fds(connection, [(0).to_bytes(8, "big")], [])


# --- the parent's side


def serve(path: str) -> None:
    _import()
    gc.collect()
    gc.freeze()  # children do not look through what was imported, and share its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who starts ranks waits for them, below
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + ".new")
    server.listen(16)
    server.settimeout(IDLE)
    os.rename(path + ".new", path)
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return
        connection.settimeout(None)
        size, fds, _, _ = socket.recv_fds(connection, 8, 2)
        length = int.from_bytes(size, "big")
        if not length:
            return
        request = json.loads(connection.makefile("rb").read(length))
        if os.fork() == 0:
            server.close()
            _supervise(connection, request, fds)
        for fd in fds:
            os.close(fd)
        connection.close()


def _import() -> None:
    """As the scripts do, with fewer imports."""
    from vlmvqa import startup

    startup.prepare()
    with startup.fewer_imports():
        for name in IMPORTED:
            importlib.import_module(name)


def _supervise(connection: socket.socket, request: dict[str, Any], files: list[int]) -> None:
    """Start the processes, tell their ids, wait for them as torchrun does, tell how they ended."""
    from torch.distributed import TCPStore

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pids = []
    for environment in request["environments"]:
        pid = os.fork()
        if pid == 0:
            connection.close()
            _run(request, environment, files)
        pids.append(pid)
    first_environment = request["environments"][0]
    if STORE in first_environment:  # as torchrun's agent does: it outlives a rank that fails
        port = int(first_environment["MASTER_PORT"])
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        assert store.port == port
    connection.sendall((json.dumps(pids) + "\n").encode())
    ended: dict[int, int] = {}
    signals: list[tuple[float, signal.Signals]] = []  # to send to those that still run, and when
    while len(ended) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if pid:
            ended[pid] = os.waitstatus_to_exitcode(status)
            if ended[pid] and not signals:
                term = now + request["patience"]
                signals = [(term, signal.SIGTERM), (term + PATIENCE, signal.SIGKILL)]
        while signals and signals[0][0] <= now:
            number = signals.pop(0)[1]
            for running in set(pids) - ended.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running, number)
        time.sleep(0.02)
    connection.sendall((json.dumps([ended[pid] for pid in pids]) + "\n").encode())
    os._exit(0)


def _run(request: dict[str, Any], environment: dict[str, str], files: list[int]) -> None:
    """Become `python arguments...`; never returns."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    for finalizer in multiprocessing.util._finalizer_registry.values():  # type: ignore[attr-defined]
        finalizer._pid = os.getpid()  # what was registered at import is run at this process's exit
    os.environ.clear()
    os.environ |= environment
    os.chdir(request["cwd"])
    arguments = request["arguments"]
    if request["terminal"]:
        fcntl.ioctl(files[0], termios.TIOCSCTTY, 0)
    read = files[0] if request["terminal"] else os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((read, *files)):
        os.dup2(file, number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    status = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        status = _status(ended.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    serve(sys.argv[1])
