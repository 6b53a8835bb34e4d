"""A load test of examples/serve.py: python -m examples.load_test --requests 400 --clients 4.

A small text classifier is exported, and served from processes on free ports of this host: eager, as
a program, compiled, as machine code. Clients send batches of 1 to 8 rows and wait for each answer,
until all requests are answered or the time is over. The servers take turns in rounds, so that a
machine that slows down slows all of them. Every answer is compared with the module's, and now and
then a request is wrong on purpose, which must be answered with 422. The servers end with the test.
"""

import argparse
import http.client
import json
import multiprocessing
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import magi_train
from examples.serve import app_of, make_app

HOST, LENGTH, WORDS, ROWS = "127.0.0.1", 32, 1000, 8
BUCKETS = (1, 2, 4, 6, 8)
"""Of the compiled file: on a processor a padded row costs as much as another one."""
START_SECONDS = 180.0
WRONG_EVERY = 20
ROUNDS = 20
RUNNERS = ("eager", "program", "compiled", "pt2")


class Classifier(nn.Module):
    """Logits of 16 classes for rows of words, `[rows, LENGTH]`."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 16)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.layers(self.words(ids)).mean(1))


def model(width: int, layers: int) -> nn.Module:
    """Return the same classifier at each call."""
    torch.manual_seed(0)
    return Classifier(width, layers).eval()


def serve(door: socket.socket, path: str, runner: str, width: int, layers: int) -> None:
    """Answer requests that come in at `door`, until this process is ended."""
    import uvicorn

    torch.set_num_threads(1)  # requests run side by side already
    compiled = runner == "compiled"
    loaded = magi_train.load(path, buckets=BUCKETS if compiled else (), compile=compiled)
    app = app_of(loaded)
    if runner == "eager":
        module, contract = torch.no_grad()(model(width, layers)), loaded.contract
        app = make_app(lambda **given: module(*contract.bind((), given)), contract)
    config = uvicorn.Config(app, log_level="warning")
    uvicorn.Server(config).run(sockets=[door])


class Clients:
    """Clients of one server, and what came of their requests.

    Args:
        port: Of the server.
        pairs: Inputs, and what the module makes of them.
    """

    def __init__(self, port: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._port, self._pairs = port, pairs
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget what came of earlier requests."""
        self._sent, self._left, self._end, self.seconds = 0, 0, 0.0, 0.0
        self.rows, self.refused = 0, 0
        self.milliseconds, self.wrong = list[float](), list[str]()

    def run(self, requests: int, clients: int, seconds: float) -> None:
        """Send requests from so many clients side by side, for at most so many seconds."""
        self._left, self._end = requests, time.monotonic() + seconds
        start = time.perf_counter()
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds += time.perf_counter() - start

    def _client(self) -> None:
        door = http.client.HTTPConnection(HOST, self._port, timeout=30)
        try:
            while (number := self._next()) is not None:
                try:
                    self._request(door, number)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    with self._lock:
                        self.wrong.append(f"request {number}: {error!r}")
                    door.close()  # opened again by the next one
        finally:
            door.close()

    def _next(self) -> int | None:
        with self._lock:
            if not self._left or time.monotonic() > self._end:
                return None
            self._left -= 1
            self._sent += 1
            return self._sent

    def _request(self, door: http.client.HTTPConnection, number: int) -> None:
        bad = number % WRONG_EVERY == 0
        ids, wanted = self._pairs[number % len(self._pairs)]
        rows = ids[:, 1:] if bad else ids
        start = time.perf_counter()
        status, answer = post(door, {"ids": rows.tolist()})
        took = 1e3 * (time.perf_counter() - start)
        if bad:
            right = status == 422 and "ids must be int64" in answer["detail"]
        else:
            got = torch.tensor(answer["output"]) if status == 200 else torch.empty(0)
            right = got.shape == wanted.shape and torch.allclose(got, wanted, 1e-4, 1e-4)
        with self._lock:
            if not right:
                self.wrong.append(f"request {number}: status {status}, {str(answer)[:200]}")
            elif bad:
                self.refused += 1
            else:
                self.milliseconds.append(took)
                self.rows += len(ids)


def post(door: http.client.HTTPConnection, body: Any) -> tuple[int, Any]:
    """Return the status and the answer to a request."""
    door.request("POST", "/predict", json.dumps(body), {"content-type": "application/json"})
    answer = door.getresponse()
    return answer.status, json.loads(answer.read())


def wait_for(port: int, process: Any) -> None:
    """Return once the server answers.

    Raises:
        RuntimeError: It ended, or does not answer in START_SECONDS.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if not process.is_alive():
            raise RuntimeError(f"the server ended with status {process.exitcode}")
        door = http.client.HTTPConnection(HOST, port, timeout=5)
        try:
            door.request("GET", "/")
            if door.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            door.close()
    raise RuntimeError(f"the server did not answer in {START_SECONDS:g} s")


@contextmanager
def server(path: Path, runner: str, sizes: tuple[int, int]) -> Iterator[int]:
    """Context in which a server answers; gives its port."""
    # told its protocol, asyncio sends answers without waiting for more to send (TCP_NODELAY)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as door:
        door.bind((HOST, 0))
        door.listen()
        port = door.getsockname()[1]
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(door, str(path), runner, *sizes), daemon=True
        )
        process.start()
    try:
        wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def summary(runner: str, found: Clients) -> dict[str, Any]:
    """Return latency and throughput of one server, and what it got wrong."""
    times = sorted(found.milliseconds) or [float("nan")]
    return {
        "runner": runner,
        "answered": len(found.milliseconds),
        "refused": found.refused,
        "wrong": found.wrong,
        "p50_ms": times[len(times) // 2],
        "p99_ms": times[min(int(0.99 * len(times)), len(times) - 1)],
        "rows_per_second": found.rows / found.seconds,
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Test the servers, print a line each, and return the lines' values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--requests", type=int, default=400, help="for each server")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for each server")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=RUNNERS)
    options = parser.parse_args(arguments)
    sizes = (options.width, options.layers)
    module, pairs = model(*sizes), []
    for count in range(1, ROWS + 1):
        ids = torch.randint(0, WORDS, (count, LENGTH))
        with torch.no_grad():
            pairs.append((ids, module(ids)))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        clients = {}
        for runner in options.runners:
            path = Path(folder) / f"{runner}.pt2"
            magi_train.export(module, {"ids": pairs[1][0]}, path, dynamic={"batch": (1, ROWS)},
                              target="pt2" if runner == "pt2" else "program")  # fmt: skip
            port = servers.enter_context(server(path, runner, sizes))
            clients[runner] = Clients(port, pairs)
            clients[runner].run(2 * ROWS * options.clients, options.clients, options.seconds)
            clients[runner].clear()  # that was to warm up
        for _ in range(ROUNDS):
            for each in clients.values():
                each.run(options.requests // ROUNDS, options.clients, options.seconds / ROUNDS)
    rows = [summary(runner, each) for runner, each in clients.items()]
    for row in rows:
        print(
            f"{row['runner']:9} {row['answered']} answers, p50 {row['p50_ms']:.2f} ms, p99 "
            f"{row['p99_ms']:.2f} ms, {row['rows_per_second']:.0f} rows/s, {row['refused']} "
            f"refused as they must be, {len(row['wrong'])} wrong {row['wrong'][:1] or ''}"
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(any(row["wrong"] for row in main()))
