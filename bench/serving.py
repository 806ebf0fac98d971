"""Answers over HTTP: requests that wait are answered together, against one at a time, on this machine's loopback.

    python -m bench.serving --checkpoint runs/demo --clients 1 4 16

    one at a time      the server of launch/serve.py with limits.max_batch=1
    micro-batched      the same with limits.max_batch=16, which is the default

Both servers run as a user starts them, on ports of their own, and are asked in turns. A client sends its next request
when it has the answer to the last, each with a picture of its own and one question, over one connection. Times are of
whole requests: sending, decoding, waiting, answering. The answers of both that are equal are counted.

Needs the extra `demo`. Server and clients share the machine's cores.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles

import numpy as np
import torch
from PIL import Image

from bench import tables

SERVE = Path(__file__).resolve().parent.parent / "launch" / "serve.py"
SERVERS = {"one at a time": 1, "micro-batched": 16}
QUESTIONS = ("How many shapes are there?", "What color is the circle?", "Is there a red square?")


@dataclass(frozen=True)
class Round:
    """What so many clients met: seconds from the first request to the last answer, and of each, and the answers."""

    seconds: float
    each: Sequence[float]
    answers: Sequence[str]


@contextmanager
def server(checkpoint: str, max_batch: int, folder: Path) -> Iterator[int]:
    """A server in a process of its own; its port."""
    given = [f"checkpoint={checkpoint}", "port=0", f"limits.max_batch={max_batch}", f"run.dir={folder}"]
    process = subprocess.Popen([sys.executable, str(SERVE), *given], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if not found:
            raise SystemExit(f"launch/serve.py did not start: {line}")
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def forms(count: int, side: int, seed: int) -> list[bytes]:
    """The bodies of so many requests: noise of `side` pixels as a PNG, and a question."""
    noise = np.random.default_rng(seed)
    found = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
        parts = {'"question"': QUESTIONS[number % len(QUESTIONS)].encode(), '"image"; filename="x"': buffer.getvalue()}
        body = b"".join(
            f"--x\r\nContent-Disposition: form-data; name={name}\r\n\r\n".encode() + content + b"\r\n"
            for name, content in parts.items()
        )
        found.append(body + b"--x--\r\n")
    return found


def ask(port: int, asked: Sequence[bytes], clients: int) -> Round:
    """All requests by so many clients, an equal share each."""

    def one(share: Sequence[bytes]) -> list[tuple[float, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        told = []
        for body in share:
            started = time.perf_counter()
            connection.request("POST", "/answer", body, {"Content-Type": "multipart/form-data; boundary=x"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise SystemExit(f"a request was refused ({response.status}): {content.decode()}")
            told.append((time.perf_counter() - started, json.loads(content)["answers"][0]["text"]))
        connection.close()
        return told

    shares = [asked[start : start + len(asked) // clients] for start in range(0, len(asked), len(asked) // clients)]
    with ThreadPoolExecutor(clients) as threads:
        started = time.perf_counter()
        told = [each for share in threads.map(one, shares) for each in share]
        seconds = time.perf_counter() - started
    return Round(seconds, *zip(*told, strict=True))


def compare(ports: dict[str, int], asked: Sequence[bytes], clients: Sequence[int], repeats: int) -> list[tables.Row]:
    """A row for each number of clients and server: the fastest of the repeats."""
    rows: list[tables.Row] = []
    for number in clients:
        rounds: dict[str, list[Round]] = {name: [] for name in ports}
        for _ in range(repeats):  # in turns, so that what else the machine does befalls both alike
            for name, port in ports.items():
                rounds[name].append(ask(port, asked, number))
                print(f"  {number} clients, {name}: {len(asked) / rounds[name][-1].seconds:.3g} requests/s", flush=True)
        best = {name: min(found, key=lambda one: one.seconds) for name, found in rounds.items()}
        base = best["one at a time"]
        for name, found in best.items():
            cuts = quantiles(found.each, n=20, method="inclusive")
            rows.append(
                {
                    "clients": number,
                    "name": name,
                    "requests_per_second": len(asked) / found.seconds,
                    "p50_seconds": cuts[9],
                    "p95_seconds": cuts[18],
                    "to_one_at_a_time": base.seconds / found.seconds,
                    "equal_answers": sum(map(str.__eq__, found.answers, base.answers)),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[tables.Row]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/demo", help="default: %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=192, help="a round (default: %(default)s)")
    parser.add_argument("--side", type=int, default=48, help="of a picture, in pixels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest is printed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/serving.json"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    if any(args.requests % clients for clients in args.clients):
        parser.error(f"--requests {args.requests} cannot be shared equally by {args.clients} clients")

    machine = tables.machine("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    machine |= {package: version(package) for package in ("gradio", "fastapi", "uvicorn")}
    print(tables.describe(machine))
    asked = forms(args.requests, args.side, args.seed)
    first, second = SERVERS
    folder = args.out.parent / "serving"
    with (
        server(args.checkpoint, SERVERS[first], folder / "1") as one,
        server(args.checkpoint, SERVERS[second], folder / "16") as other,
    ):
        ports = {first: one, second: other}
        for port in ports.values():
            ask(port, asked[: max(args.clients)], max(args.clients))
        rows = compare(ports, asked, args.clients, args.repeats)
    shown = [
        (
            f"{row['clients']} client{'s' * (row['clients'] > 1)}, {row['name']}",
            f"{row['requests_per_second']:.3g}",
            f"{1000 * row['p50_seconds']:.0f}",
            f"{1000 * row['p95_seconds']:.0f}",
            tables.times(row["to_one_at_a_time"]),
            f"{row['equal_answers']} of {len(asked)}",
        )
        for row in rows
    ]
    headers = ("", "requests/s", "p50 ms", "p95 ms", "to one at a time", "same answers")
    print(tables.table(headers, shown))
    tables.write_json(args, machine, rows)
    return rows


if __name__ == "__main__":
    main()
