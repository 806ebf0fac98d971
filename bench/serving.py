"""HTTP throughput and latency: micro-batching against one request at a time, over loopback.

    python -m bench.serving --checkpoint runs/demo --clients 1 4 16

    one at a time      launch/serve.py with limits.max_batch=1
    micro-batched      launch/serve.py with limits.max_batch=16, the default

Both servers run at the same time and are measured in turns. Each client uses one connection and sends its next request,
a different image and one question, when the previous one is answered. Times include sending, decoding, queueing and
answering. The equal answers of both servers are counted.

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
    """Measurements of one round.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: seconds of each request.
        answers: answer to each request.
    """

    seconds: float
    latencies: Sequence[float]
    answers: Sequence[str]


@contextmanager
def server(checkpoint: str, max_batch: int, folder: Path) -> Iterator[int]:
    """Start a server in another process and yield its port."""
    overrides = [f"checkpoint={checkpoint}", "port=0", f"limits.max_batch={max_batch}", f"run.dir={folder}"]
    process = subprocess.Popen([sys.executable, str(SERVE), *overrides], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if not url:
            raise SystemExit(f"launch/serve.py did not start: {line}")
        yield int(url[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def request_bodies(count: int, side: int, seed: int) -> list[bytes]:
    """Return forms with a noise image (PNG, `side` x `side` pixels) and a question."""
    rng = np.random.default_rng(seed)
    bodies = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
        parts = {'"question"': QUESTIONS[number % len(QUESTIONS)].encode(), '"image"; filename="x"': buffer.getvalue()}
        body = b"".join(
            f"--x\r\nContent-Disposition: form-data; name={name}\r\n\r\n".encode() + content + b"\r\n"
            for name, content in parts.items()
        )
        bodies.append(body + b"--x--\r\n")
    return bodies


def measure(port: int, bodies: Sequence[bytes], clients: int) -> Round:
    """Send all requests from concurrent clients, an equal share each."""

    def send(share: Sequence[bytes]) -> list[tuple[float, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        responses = []
        for body in share:
            started = time.perf_counter()
            connection.request("POST", "/answer", body, {"Content-Type": "multipart/form-data; boundary=x"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise SystemExit(f"a request failed ({response.status}): {content.decode()}")
            responses.append((time.perf_counter() - started, json.loads(content)["answers"][0]["text"]))
        connection.close()
        return responses

    size = len(bodies) // clients
    shares = [bodies[start : start + size] for start in range(0, len(bodies), size)]
    with ThreadPoolExecutor(clients) as threads:
        started = time.perf_counter()
        responses = [response for share in threads.map(send, shares) for response in share]
        seconds = time.perf_counter() - started
    return Round(seconds, *zip(*responses, strict=True))


def compare(ports: dict[str, int], bodies: Sequence[bytes], clients: Sequence[int], repeats: int) -> list[tables.Row]:
    """Return a row for each number of clients and server: the fastest of the repeats."""
    rows: list[tables.Row] = []
    for number in clients:
        rounds: dict[str, list[Round]] = {name: [] for name in ports}
        for _ in range(repeats):  # alternately, so that other load on the machine affects both servers
            for name, port in ports.items():
                rounds[name].append(measure(port, bodies, number))
                rate = len(bodies) / rounds[name][-1].seconds
                print(f"  {number} clients, {name}: {rate:.3g} requests/s", flush=True)
        fastest = {name: min(measured, key=lambda one: one.seconds) for name, measured in rounds.items()}
        base = fastest["one at a time"]
        for name, best in fastest.items():
            quantile = quantiles(best.latencies, n=20, method="inclusive")
            rows.append(
                {
                    "clients": number,
                    "name": name,
                    "requests_per_second": len(bodies) / best.seconds,
                    "p50_seconds": quantile[9],
                    "p95_seconds": quantile[18],
                    "to_one_at_a_time": base.seconds / best.seconds,
                    "equal_answers": sum(map(str.__eq__, best.answers, base.answers)),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[tables.Row]:
    """Run the benchmark, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="runs/demo", help="default: %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=192, help="requests per round (default: %(default)s)")
    parser.add_argument("--side", type=int, default=48, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest is printed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/serving.json"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    if any(args.requests % clients for clients in args.clients):
        parser.error(f"--requests {args.requests} is not a multiple of each of {args.clients} clients")

    machine = tables.machine("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    machine |= {package: version(package) for package in ("fastapi", "uvicorn")}
    print(tables.describe(machine))
    bodies = request_bodies(args.requests, args.side, args.seed)
    first, second = SERVERS
    folder = args.out.parent / "serving"
    with (
        server(args.checkpoint, SERVERS[first], folder / "1") as one,
        server(args.checkpoint, SERVERS[second], folder / "16") as other,
    ):
        ports = {first: one, second: other}
        for port in ports.values():
            measure(port, bodies[: max(args.clients)], max(args.clients))  # warm-up
        rows = compare(ports, bodies, args.clients, args.repeats)
    cells = [
        (
            f"{row['clients']} client{'s' * (row['clients'] > 1)}, {row['name']}",
            f"{row['requests_per_second']:.3g}",
            f"{1000 * row['p50_seconds']:.0f}",
            f"{1000 * row['p95_seconds']:.0f}",
            tables.times(row["to_one_at_a_time"]),
            f"{row['equal_answers']} of {len(bodies)}",
        )
        for row in rows
    ]
    headers = ("", "requests/s", "p50 ms", "p95 ms", "to one at a time", "same answers")
    print(tables.table(headers, cells))
    tables.write_json(args, machine, rows)
    return rows


if __name__ == "__main__":
    main()
