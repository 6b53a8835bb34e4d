"""Ranks of a benchmark on this host, joined by a link of a given rate.

Two gloo ranks get a network namespace each and a pair of virtual devices between them, whose
sending tc's token bucket limits (needs root and iproute2). No traffic leaves the host. Messages
below the bucket's burst (128 kB) pass unlimited. For GPUs, NCCL is told to use sockets only.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

BURST, MTU = "128kb", "1500"


def bytes_sent() -> int:
    """Return the counter of this rank's end of the link; 0 where there is no such device."""
    counter = Path("/sys/class/net", os.environ.get("LINK_DEVICE", "-"), "statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


@contextlib.contextmanager
def slow_link(rate: str) -> Iterator[list[list[str]]]:
    """Yield the command prefix of each of two ranks that only see each other, at `rate`."""
    if rate == "none":
        yield [[], []]
        return
    tag = f"magi{os.getpid()}"
    names = [f"{tag}-{i}" for i in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        peer = ("peer", "name", "eth0", "netns", names[1])
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", *peer)
        for i, name in enumerate(names):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"192.0.2.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "mtu", MTU, "up")
            limit = ["tbf", "rate", rate, "burst", BURST, "latency", "100ms"]
            subprocess.run(
                ["tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *limit], check=True
            )
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def environment(rank: int, ranks: int, port: int, rate: str, gpus: bool) -> dict[str, str]:
    """Return what a rank finds in its environment."""
    shared = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if gpus:
        off = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE")
        sockets = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
        shared |= dict.fromkeys(off, "1") | sockets
    elif rate != "none":
        link = {"MASTER_ADDR": "192.0.2.1", "GLOO_SOCKET_IFNAME": "eth0", "LINK_DEVICE": "eth0"}
        shared |= link
    return {**os.environ, **shared}


def run_ranks(command: Sequence[str], rate: str, gpus: int, timeout_seconds: float) -> None:
    """Run `python command` as two ranks at `rate`, or as `gpus` ranks; return when all ended well.

    Raises:
        RuntimeError: A rank failed or took too long.
    """
    ranks, port = gpus or 2, random.randint(20000, 32000)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # namespaces are taken away then, too
    with slow_link("none" if gpus else rate) as links:
        prefixes = [[]] * ranks if gpus else links
        running = [
            subprocess.Popen(
                [*prefix, sys.executable, *command],
                env=environment(rank, ranks, port, rate, bool(gpus)),
            )
            for rank, prefix in enumerate(prefixes)
        ]
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(p.poll() is None for p in running):
                if any(p.poll() for p in running) or time.monotonic() > deadline:
                    raise RuntimeError(f"at {rate}, ranks ended with {[p.poll() for p in running]}")
                time.sleep(0.2)
        finally:
            for p in running:
                if p.poll() is None:
                    p.send_signal(signal.SIGTERM)
                p.wait()
    if any(p.returncode for p in running):
        raise RuntimeError(f"at {rate}, ranks ended with {[p.returncode for p in running]}")
