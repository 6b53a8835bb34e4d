"""Steps over a slow link: our codecs beside DDP and its hooks, in one call.

    python -m benchmarks.communication --loss-steps 300 --output benchmarks/results/NAME.json
    python -m benchmarks.communication --gpus 4

On the CPU two gloo ranks, one thread each, are joined by a link that is limited to a rate
(benchmarks.slow_link); "none" is the host's own. With --gpus ranks are GPUs of this host that talk
through sockets: NCCL without peer access and shared memory.

The model is a byte-level GPT, eager on both sides (--tier for ours), so what differs is
communication. A method is NAME, NAME@MiB, for buckets of that size, or NAME+step, for
CommConfig(early_step=True):

| method | what runs |
|---|---|
| nosync | the step without communication |
| ddp, ddp-bf16, ddp-powersgdR | DistributedDataParallel, and torch's hooks (PowerSGD: one bucket) |
| magi, magi-CODEC, magi-LEVEL | magi_train.prepare, and CommConfig(compression=CODEC or LEVEL) |

Methods take turns of a few steps, so that a busy host slows all alike. A row:

| column | is |
|---|---|
| median_seconds, least_seconds | of a step, on the slowest rank |
| cpu_seconds | of a step, over all threads of rank 0: what it takes from a backward on few cores |
| speedup_over_ddp | by medians |
| sent_megabytes | what a rank sent in a step, by the device's own counter |
| floor_seconds | max(nosync's step, its forward + sent bytes / measured bandwidth): no step that sends as many bytes can be faster |
| times_floor | median_seconds / floor_seconds |
| exposed_share_of_ddp | (step - nosync's) / (ddp's - nosync's) |
| validation_loss, loss_gap | with --loss-steps: after so many steps on the host's own link, the codec of a level without its trial; the gap is to ddp's |

Each rate's row "link" has what the floor is made of. The bandwidth is that of the fastest of some
all-reduces of 16 MiB, before and after the steps, by the same counter.
"""  # noqa: E501

import argparse
import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import magi_train
from benchmarks import records
from benchmarks.byte_gpt import Gpt, draw, texts, validate
from benchmarks.slow_link import bytes_sent, run_ranks
from magi_train import CommConfig, Config

METHODS = (
    "nosync,ddp,ddp@1,ddp-bf16,ddp-bf16@1,ddp-powersgd4,"
    "magi,magi-safe,magi-bfloat16,magi-balanced,magi-aggressive"
)
LEVELS = ("balanced", "aggressive")
LENGTH, BATCH = 64, 4
WARM_UP, LEVEL_WARM_UP, ROUND_STEPS = 7, 22, 3
"""Steps before the first that counts: plans are made anew after 5, levels have chosen after 18."""
ONE_BUCKET_MIB = 4000.0
"""For torch's PowerSGD, which hangs on gloo with more than one."""
BANDWIDTH_BYTES, BANDWIDTH_REPEATS = 16 * 2**20, 3
SECONDS = 1800


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


def wrap(
    model: nn.Module, optimizer: torch.optim.Optimizer, spec: str, tier: Any, trial: bool
) -> Any:
    """Return the model as the method `spec` trains it; the optimizer's class may change."""
    spec, early, _ = spec.partition("+step")
    name, _, size = spec.partition("@")
    kind, _, codec = name.partition("-")
    if kind == "magi":
        cap: Any = float(size) if size else None
        chosen: Any = codec or None
        comm = CommConfig(compression=chosen, bucket_mib=cap, trial=trial, early_step=bool(early))
        return magi_train.prepare(model, optimizer, config=Config(tier=tier, comm=comm))[0]
    cap = float(size) if size else ONE_BUCKET_MIB if "powersgd" in codec else None
    wrapped = DistributedDataParallel(model, bucket_cap_mb=cap, gradient_as_bucket_view=True)
    attach(wrapped, codec)
    return wrapped


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
    forward_seconds: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def step(self, record: bool = True) -> None:
        """Train for one step, from a barrier to the end of the optimizer's."""
        seed = self.steps * dist.get_world_size() + dist.get_rank()
        x, y = (t.to(self.device) for t in draw(self.text, seed, BATCH, LENGTH))
        self.steps += 1
        dist.barrier()
        sent, cpu, start = bytes_sent(), time.process_time(), time.perf_counter()
        quiet = self.model.no_sync() if self.spec == "nosync" else contextlib.nullcontext()
        with quiet:
            loss = self.model(x, y)
            self._idle()
            forward = time.perf_counter() - start
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._idle()
        if record:
            self.seconds.append(time.perf_counter() - start)
            self.forward_seconds.append(forward)
            self.cpu_seconds.append(time.process_time() - cpu)
            self.sent_bytes.append(bytes_sent() - sent)

    def _idle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make(spec: str, text: Tensor, options: argparse.Namespace, device: torch.device) -> Method:
    """Return a method, warmed up unless losses are to be compared."""
    torch.manual_seed(0)
    model = Gpt(options.width, options.layers, LENGTH).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped = wrap(model, optimizer, spec, options.tier, trial=not options.losses)
    method = Method(spec, wrapped, text, device, optimizer)
    warm = LEVEL_WARM_UP if spec.removesuffix("+step").partition("-")[2] in LEVELS else WARM_UP
    for _ in range(0 if options.losses else warm):
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
    text, held_out = texts()
    specs = options.methods.split(",")
    if options.losses:
        rows = [losses(spec, text, held_out, options, device) for spec in specs]
    else:
        rows = timings([make(spec, text, options, device) for spec in specs], options, device)
    if dist.get_rank() == 0:
        options.output.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def losses(
    spec: str, text: Tensor, held_out: Tensor, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Train by one method; return its validation loss."""
    method = make(spec, text, options, device)
    for _ in range(options.loss_steps):
        method.step(record=False)
    loss = validate(method.model, held_out, BATCH, LENGTH)
    return {"method": spec, "validation_loss": round(loss, 4)}


def timings(
    methods: list[Method], options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Let the methods take turns; return a row of each, behind one of the link."""
    bandwidth = measured_bandwidth(device)
    for _ in range(-(-options.steps // ROUND_STEPS)):
        for method in methods:
            for _ in range(ROUND_STEPS):
                method.step()
    bandwidth = max(bandwidth, measured_bandwidth(device))  # the floor shall not be too high
    rows = [row(m, device) for m in methods]
    forwards = slowest([statistics.median(m.forward_seconds) for m in methods], device)
    by_name = {r["method"]: r["median_seconds"] for r in rows}
    alone, ddp = by_name.get("nosync"), by_name.get("ddp")
    if alone is None or ddp is None:
        return rows
    forward = forwards[[m.spec for m in methods].index("nosync")]
    for each in rows:
        took, sent = each["median_seconds"], 1e6 * each["sent_megabytes"]
        each["speedup_over_ddp"] = round(ddp / took, 2)
        each["exposed_share_of_ddp"] = round((took - alone) / max(ddp - alone, 1e-9), 2)
        if bandwidth:
            floor = max(alone, forward + sent / bandwidth)
            each |= {"floor_seconds": round(floor, 4), "times_floor": round(took / floor, 3)}
    link = {"method": "link", "gbit_per_second": round(8e-9 * bandwidth, 3)}
    return [link | {"forward_seconds": round(forward, 4)}, *rows]


def slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Return the largest of all ranks' numbers, one by one; a collective."""
    values = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def measured_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a rank sends at best; 0 where no device counts them."""
    part = torch.zeros(BANDWIDTH_BYTES // 4, device=device)
    best = 0.0
    for _ in range(BANDWIDTH_REPEATS):
        dist.barrier()
        sent, start = bytes_sent(), time.perf_counter()
        dist.all_reduce(part)
        best = max(best, (bytes_sent() - sent) / (time.perf_counter() - start))
    return slowest([best], device)[0]


def row(method: Method, device: torch.device) -> dict[str, Any]:
    """Return what a method took, on the slowest rank; a collective."""
    times = slowest([statistics.median(method.seconds), min(method.seconds)], device)
    result = {
        "method": method.spec,
        "median_seconds": round(times[0], 4),
        "least_seconds": round(times[1], 4),
        "cpu_seconds": round(statistics.median(method.cpu_seconds), 4),
        "sent_megabytes": round(statistics.median(method.sent_bytes) / 1e6, 2),
        "steps": len(method.seconds),
    }
    if method.spec.startswith("magi"):
        result |= chosen(magi_train.report(method.model))
    return result


def chosen(report: Any) -> dict[str, Any]:
    """Return what ours made of its settings: the last plan, and the form that a level chose."""
    plans = [r.plan for r in report.rows if r.name == "communication_plan"]
    trials = [r.plan["chosen"] for r in report.rows if r.name == "codec_trial"]
    found = {"buckets": plans[-1]["buckets"]} if plans else {}
    return found | ({"trial_chose": trials[-1]} if trials else {})


def measure(rate: str, options: argparse.Namespace, *more: str) -> list[dict[str, Any]]:
    """Run the ranks at one rate; return their rows."""
    with tempfile.NamedTemporaryFile() as output:
        command = ["-m", "benchmarks.communication", "--worker", *options.rest, *more]
        command += ["--output", output.name]
        run_ranks(command, rate, options.gpus, SECONDS)
        return list(json.loads(Path(output.name).read_text()))


def main() -> None:
    """Measure at each rate, print the rows, and write them."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "200mbit"])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--loss-steps", type=int, default=0, help="compare losses after so many")
    parser.add_argument("--losses", action="store_true", help=argparse.SUPPRESS)
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
    found: dict[str, float] = {}
    if options.loss_steps:
        rows = measure("none", options, "--losses")
        found = {r["method"]: r["validation_loss"] for r in rows}
    rows = []
    for rate in ["sockets"] if options.gpus else options.rates:
        for each in measure(rate, options):
            if each["method"] in found and each["method"] != "nosync":
                loss = found[each["method"]]
                each |= {"validation_loss": loss, "loss_gap": round(loss - found["ddp"], 4)}
            rows.append({"rate": rate, "ranks": options.gpus or 2, **each})
            print(json.dumps(rows[-1]), flush=True)
    load = round(os.getloadavg()[0], 1)
    records.save("communication", options, load=load, settings=options.rest, rows=rows)


if __name__ == "__main__":
    main()
