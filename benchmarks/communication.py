"""Steps over a slow link: our codecs beside DDP and its hooks, in one call.

    python -m benchmarks.communication --rates 1gbit 200mbit --output benchmarks/results/NAME.json
    python -m benchmarks.communication --loss-steps 300 --rates none
    python -m benchmarks.communication --gpus 4

On the CPU two gloo ranks, one thread each, live in network namespaces of their own (needs root and
iproute2), joined by a link that tc limits to a rate in both directions; "none" is the host's own.
With --gpus ranks are GPUs of this host that talk through sockets: NCCL without peer access and
shared memory. Messages below tc's burst (128 kB) pass unlimited.

The model is a byte-level GPT on the text of examples.corpus, eager on both sides (--tier for ours),
so what differs is communication. A method is NAME or NAME@MiB, for buckets of that size:

| method | what runs |
|---|---|
| nosync | the step without communication: the bound |
| ddp, ddp-bf16, ddp-powersgdR | DistributedDataParallel, and torch's hooks (PowerSGD: one bucket) |
| magi, magi-CODEC | magi_train.prepare, and CommConfig(compression=CODEC) |

Methods take turns of a few steps, so that a busy host slows all alike. A row: median and least
seconds of a step (the slowest rank's), speed-up over "ddp", MB a rank sent in a step by the
device's own counter, and with --loss-steps the loss after so many steps, on text of training (mean
of the last tenth) and of validation.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import magi_train
from benchmarks import records
from examples import corpus
from magi_train import CommConfig, Config

METHODS = (
    "nosync,ddp,ddp@1,ddp-bf16,ddp-bf16@1,ddp-powersgd4,"
    "magi@1,magi-bfloat16@1,magi-int8@1,magi-fp8@1,magi-powersgd@1"
)
BURST, MTU = "128kb", "1500"
LENGTH, BATCH = 64, 4
WARM_UP, ROUND_STEPS = 4, 3
ONE_BUCKET_MIB = 4000.0
"""For torch's PowerSGD, which hangs on gloo with more than one."""
VALIDATION_BATCHES = 16
SECONDS = 900


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, `[batch, length, width]` like its input."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """A byte-level GPT."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of predicting `y` from `x`, both `[batch, length]`."""
        hidden = self.tokens(x) + self.places.weight
        logits = self.head(self.norm(self.blocks(hidden)))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def draw(text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return `[BATCH, LENGTH]` bytes from random places of `text`, and those that follow them."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,), generator=g)
    rows = torch.stack([text[i : i + LENGTH + 1] for i in starts.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]


def attach(model: DistributedDataParallel, hook: str) -> None:
    """Register the hook that a method's name ends in."""
    if hook == "bf16":  # in a lambda: refused by its name where there is no NCCL
        compress = default_hooks.bf16_compress_hook
        model.register_comm_hook(None, lambda state, bucket: compress(state, bucket))
    elif hook:
        rank = int(hook.removeprefix("powersgd"))
        state = powerSGD_hook.PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
            orthogonalization_epsilon=1e-8,
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def wrap(model: nn.Module, spec: str, tier: Any) -> Any:
    """Return the model as the method `spec` trains it."""
    name, _, size = spec.partition("@")
    kind, _, codec = name.partition("-")
    if kind == "magi":
        comm = CommConfig(compression=codec or None, bucket_mib=float(size) if size else None)
        return magi_train.prepare(model, config=Config(tier=tier, comm=comm))
    cap = float(size) if size else ONE_BUCKET_MIB if "powersgd" in codec else None
    wrapped = DistributedDataParallel(model, bucket_cap_mb=cap, gradient_as_bucket_view=True)
    attach(wrapped, codec)
    return wrapped


def bytes_sent() -> int:
    """Return the link device's counter; 0 where there is no such device."""
    counter = Path("/sys/class/net", os.environ.get("LINK_DEVICE", "-"), "statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


@dataclass
class Method:
    """A method with a model of its own, and what its steps took."""

    spec: str
    model: Any
    text: Tensor
    device: torch.device
    optimizer: torch.optim.Optimizer
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, record: bool = True) -> None:
        """Train for one step, from a barrier to the end of the optimizer's."""
        seed = self.steps * dist.get_world_size() + dist.get_rank()
        x, y = (t.to(self.device) for t in draw(self.text, seed))
        self.steps += 1
        dist.barrier()
        sent, start = bytes_sent(), time.perf_counter()
        quiet = self.model.no_sync() if self.spec == "nosync" else contextlib.nullcontext()
        with quiet:
            loss = self.model(x, y)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if record:
            self.seconds.append(time.perf_counter() - start)
            self.sent_bytes.append(bytes_sent() - sent)
            self.losses.append(float(loss.detach()))

    def validate(self, text: Tensor) -> float:
        """Return the loss on batches of `text`, the same for every method and rank."""
        with torch.no_grad():
            batches = [draw(text, 10**6 + i) for i in range(VALIDATION_BATCHES)]
            losses = [self.model(x.to(self.device), y.to(self.device)) for x, y in batches]
        return float(torch.stack(losses).mean())


def make(spec: str, text: Tensor, options: argparse.Namespace, device: torch.device) -> Method:
    """Return a method, warmed up unless losses are to be compared."""
    torch.manual_seed(0)
    model = wrap(Gpt(options.width, options.layers).to(device), spec, options.tier)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = Method(spec, model, text, device, optimizer)
    for _ in range(0 if options.loss_steps else WARM_UP):
        method.step(record=False)
    return method


def worker(options: argparse.Namespace) -> None:
    """Measure all methods on this rank; rank 0 writes the rows to the output."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("torch").setLevel(logging.ERROR)
    device = torch.device("cpu")
    if options.gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if options.gpus else "gloo")
    text, validation = (
        torch.frombuffer(bytearray(t.encode()), dtype=torch.uint8) for t in corpus.split_text()
    )
    methods = [make(spec, text, options, device) for spec in options.methods.split(",")]
    rounds = -(-(options.loss_steps or options.steps) // ROUND_STEPS)
    for _ in range(rounds):
        for method in methods:
            for _ in range(ROUND_STEPS):
                method.step()
    rows = [row(m, validation if options.loss_steps else None, device) for m in methods]
    base = next((r["median_seconds"] for r in rows if r["method"] == "ddp"), None)
    for each in rows:
        each["speedup_over_ddp"] = base and round(base / each["median_seconds"], 2)
    if dist.get_rank() == 0:
        options.output.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def row(method: Method, validation: Tensor | None, device: torch.device) -> dict[str, Any]:
    """Return what a method took, on the slowest rank; a collective."""
    times = torch.tensor([statistics.median(method.seconds), min(method.seconds)], device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    result = {
        "method": method.spec,
        "median_seconds": round(times[0].item(), 4),
        "least_seconds": round(times[1].item(), 4),
        "sent_megabytes": round(statistics.median(method.sent_bytes) / 1e6, 2),
        "steps": len(method.seconds),
    }
    if validation is not None:
        last = method.losses[-max(len(method.losses) // 10, 1) :]
        mean = torch.tensor(statistics.mean(last), device=device)
        dist.all_reduce(mean)
        result["train_loss"] = round(mean.item() / dist.get_world_size(), 4)
        result["validation_loss"] = round(method.validate(validation), 4)
    return result


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


def environment(rank: int, ranks: int, options: argparse.Namespace, rate: str) -> dict[str, str]:
    """Return what a rank finds in its environment."""
    shared = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(options.port),
    }
    if options.gpus:
        off = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE")
        sockets = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
        shared |= dict.fromkeys(off, "1") | sockets
    elif rate != "none":
        link = {"MASTER_ADDR": "192.0.2.1", "GLOO_SOCKET_IFNAME": "eth0", "LINK_DEVICE": "eth0"}
        shared |= link
    return {**os.environ, **shared}


def measure(rate: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the ranks at one rate; return their rows.

    Raises:
        RuntimeError: A rank failed or took too long.
    """
    options.port = random.randint(20000, 40000)
    command = [sys.executable, "-m", "benchmarks.communication", "--worker", *options.rest]
    ranks = options.gpus or 2
    with tempfile.NamedTemporaryFile() as output, slow_link(rate) as prefixes:
        prefixes = prefixes if not options.gpus else [[]] * ranks
        running = [
            subprocess.Popen(
                [*prefix, *command, "--output", output.name],
                env=environment(rank, ranks, options, rate),
            )
            for rank, prefix in enumerate(prefixes)
        ]
        deadline = time.monotonic() + SECONDS
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
        rows = json.loads(Path(output.name).read_text())
    return [{"rate": rate, "ranks": ranks, **each} for each in rows]


def main() -> None:
    """Measure at each rate, print the rows, and write them."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "200mbit"])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--loss-steps", type=int, default=0, help="compare losses after so many")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tier", default="eager", help="of ours")
    parser.add_argument("--gpus", type=int, default=0, help="through sockets, instead of the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    kept = ("methods", "steps", "loss_steps", "width", "layers", "tier", "gpus")
    options.rest = [f"--{k.replace('_', '-')}={getattr(options, k)}" for k in kept]
    rows = []
    for rate in ["sockets"] if options.gpus else options.rates:
        for each in measure(rate, options):
            rows.append(each)
            print(json.dumps(each), flush=True)
    load = round(os.getloadavg()[0], 1)
    records.save("communication", options, load=load, settings=options.rest, rows=rows)


if __name__ == "__main__":
    main()
