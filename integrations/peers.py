"""`magi bench package.module:build`: a training step of the user's own module, beside its peers.

    build() returns (module, batch), (module, batch, loss) or (module, batch, loss, optimizer)

as for `magi explain --fits`. Each peer is a function in PEERS and runs in processes of its own,
from the same seed, on the same batch, with the same loss and optimizer; a peer that fails is a row
that says why. `measure` is what times a step, here and in benchmarks/train_step.py: steps that are
waited for give the median and spread, then as many run back to back, which is how people train.

| peer | what runs |
|---|---|
| eager | the module as it is (under DistributedDataParallel on several ranks) |
| compile | torch.compile of the loss function |
| block-compile | every repeated block compiled, found by structure; the rest eager |
| magi | magi_train.prepare and prepare_step, with Config() |
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from magi_train.comm.shard_blocks import blocks_to_shard
from magi_train.core.errors import MagiError
from magi_train.core.world import join_from_environment
from magi_train.fits import FORM, built
from magi_train.fits_command import load_build

GIB = 2**30
LossOf = Callable[[Any], Tensor]
Peer = Callable[[nn.Module, Callable[[Any, Any], Tensor], Optimizer], LossOf]
"""From a module, `loss(module, batch)` and the optimizer to a function from a batch to its loss."""


def eager(module: nn.Module, loss: Callable[[Any, Any], Tensor], _: Optimizer) -> LossOf:
    """Return the step as people write it."""
    model = _replicated(module)
    return lambda batch: loss(model, batch)


def compiled(module: nn.Module, loss: Callable[[Any, Any], Tensor], _: Optimizer) -> LossOf:
    """Return the step compiled whole."""
    model = _replicated(module)
    return torch.compile(lambda batch: loss(model, batch))


def block_compiled(module: nn.Module, loss: Callable[[Any, Any], Tensor], _: Optimizer) -> LossOf:
    """Return the step with its repeated blocks compiled."""
    blocks = blocks_to_shard(module)
    if not blocks:
        raise MagiError("the module has no repeated blocks")
    for block in blocks:
        block.compile()
    return eager(module, loss, _)


def magi(module: nn.Module, loss: Callable[[Any, Any], Tensor], optimizer: Optimizer) -> LossOf:
    """Return the step through us."""
    from magi_train import prepare, prepare_step

    prepared, _ = prepare(module, optimizer)
    return prepare_step(lambda batch: loss(prepared, batch), prepared)


PEERS: dict[str, Peer] = {
    "eager": eager,
    "compile": compiled,
    "block-compile": block_compiled,
    "magi": magi,
}


def _replicated(module: nn.Module) -> nn.Module:
    many = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if not many:
        return module
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def wait(device: torch.device) -> None:
    """Wait for the device and for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if torch.distributed.is_initialized():
        ids = [device.index] if device.type == "cuda" else None
        torch.distributed.barrier(device_ids=ids)


def measure(
    step: Callable[[int], Tensor], device: torch.device, warm_up: int, steps: int, began: float
) -> dict[str, Any]:
    """Time steps.

    Args:
        step: Takes the step of a number; returns its loss, detached.
        device: Where.
        warm_up: Steps before the timed ones.
        steps: Timed ones that are waited for, and again as many back to back.
        began: time.perf_counter() when the set-up began.

    Returns:
        Milliseconds, GiB and seconds by name; and the first and the last loss.
    """
    on_gpu = device.type == "cuda"
    first_loss = float(step(0))
    wait(device)
    first = time.perf_counter() - began
    for i in range(1, warm_up):
        step(i)
    wait(device)
    warm = time.perf_counter() - began
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for i in range(steps):
        wait(device)
        begin = time.perf_counter()
        loss = step(warm_up + i)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    wait(device)
    begin = time.perf_counter()
    for i in range(steps):
        loss = step(warm_up + steps + i)
    if on_gpu:
        torch.cuda.synchronize(device)
    back_to_back = (time.perf_counter() - begin) / steps
    tenths = statistics.quantiles(seconds, n=10)
    return {
        "step_ms": statistics.median(seconds) * 1e3,
        "step_ms_p10": tenths[0] * 1e3,
        "step_ms_p90": tenths[-1] * 1e3,
        "back_to_back_ms": back_to_back * 1e3,
        **_memory(device),
        "first_step_s": first,
        "warm_up_s": warm,
        "first_loss": first_loss,
        "loss": float(loss),
    }


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        most, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
        return {"peak_gib": most / GIB, "reserved_gib": held / GIB}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


# -- one peer, on one rank ---------------------------------------------------------------------


def work(name: str, place: str, options: Any) -> dict[str, Any]:
    """Measure one peer on this rank."""
    from magi_train import to_device

    world = join_from_environment()
    on_gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    module, batch, loss, optimizer = built(load_build(place))
    module.to(device)
    batch = to_device(batch, device)
    began = time.perf_counter()
    loss_of = PEERS[name](module, loss, optimizer)
    dtype = getattr(torch, options.autocast) if options.autocast != "none" else None

    def step(_: int) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            value = loss_of(batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    found = measure(step, device, options.warm_up, options.steps, began)
    leaf = next(t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
    rows = leaf.shape[0] if leaf.dim() else 1
    found["rows_per_second"] = rows * world.size / found["back_to_back_ms"] * 1e3
    if name == "magi":
        from magi_train.runtime import live_runtimes

        found["report"] = str(live_runtimes()[-1].report).splitlines()
    return found


# -- all of them -------------------------------------------------------------------------------


def command(arguments: Sequence[str]) -> int:
    """Run `magi bench package.module:build`; return 0 if ours was measured and its loss agrees.

    Raises:
        MagiError: An option or the module is of no use.
    """
    options = _parser().parse_args(arguments)
    if options.worker:
        found = work(options.worker, options.build, options)
        if os.environ.get("RANK", "0") == "0":
            options.out.write_text(json.dumps(found))
        wait(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available()
             else torch.device("cpu"))  # fmt: skip
        return 0
    load_build(options.build)  # a wrong name is an error, not four rows
    wrong = sorted(set(options.peers) - set(PEERS))
    if wrong or options.steps < 2 or options.warm_up < 1:
        raise MagiError(
            f"--peers takes {', '.join(PEERS)}, --steps 2 or more and --warm-up 1 or more; got "
            f"{', '.join(options.peers)}, {options.steps} and {options.warm_up}"
        )
    rows = {}
    for name in options.peers:
        sys.stderr.write(f"magi bench: {name}\n")
        rows[name] = _launch(name, options)
    record = {"build": options.build, "ranks": options.nproc, "autocast": options.autocast,
              "torch": torch.__version__, "rows": rows}  # fmt: skip
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    text = json.dumps(record, indent=2) if options.json else table(rows, options.tolerance)
    sys.stdout.write(text + "\n")
    return 0 if agrees(rows, options.tolerance) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="magi bench", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="magi bench --mine train.py compares a whole script with and without magi; "
        "magi bench --inference model.pt2 measures an exported file. Both have a --help.",
    )  # fmt: skip
    add = parser.add_argument
    add("build", help=f"script.py:function or package.module:function; {FORM}")
    add("--peers", nargs="+", default=[*PEERS], help="of " + ", ".join(PEERS))
    add("--nproc", type=int, default=1, help="ranks (default: %(default)s)")
    add("--steps", type=int, default=20, help="timed steps, twice (default: %(default)s)")
    add("--warm-up", type=int, default=20, help="steps before (default: %(default)s)")
    add("--autocast", choices=("none", "bfloat16", "float16"), default="none")
    add("--tolerance", type=float, default=0.02, help="relative difference of the last losses")
    add("--seconds", type=float, default=900, help="limit for one peer (default: %(default)s)")
    add("--output", type=Path, help="JSON file to write")
    add("--json", action="store_true", help="print JSON")
    add("--worker", help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    return parser


def _launch(name: str, options: Any) -> dict[str, Any]:
    """Measure a peer in processes of its own; return its row."""
    with tempfile.TemporaryDirectory(prefix="magi_bench_") as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log"
        start = [sys.executable, "-m", "magi_train.cli"]
        if options.nproc > 1:
            start += ["run", "--nproc", str(options.nproc), "--no-preflight", "-m", start[2]]
        mine = ["bench", options.build, "--worker", name, "--out", str(out)]
        mine += ["--steps", str(options.steps), "--warm-up", str(options.warm_up)]
        mine += ["--autocast", options.autocast]
        with log.open("w") as file:
            try:
                subprocess.run([*start, *mine], stdout=file, stderr=file, check=False,
                               timeout=options.seconds)  # fmt: skip
            except subprocess.TimeoutExpired:
                return {"failed": f"did not finish in {options.seconds:g} s"}
        if not out.is_file():
            return {"failed": log.read_text().strip()[-600:] or "no result"}
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def agrees(rows: dict[str, dict[str, Any]], tolerance: float) -> bool:
    """Return whether ours was measured, and its last loss is that of the first peer measured."""
    mine = rows.get("magi", {})
    theirs = next((r for n, r in rows.items() if n != "magi" and "loss" in r), None)
    if "loss" not in mine:
        return False
    if theirs is None:
        return True
    a, b = mine["loss"], theirs["loss"]
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def table(rows: dict[str, dict[str, Any]], tolerance: float) -> str:
    """Return the rows as text, and what they say."""
    columns = ("step_ms", "step_ms_p10", "step_ms_p90", "back_to_back_ms", "peak_gib",
               "first_step_s", "rows_per_second", "loss")  # fmt: skip
    lines = [f"{'':14}" + " ".join(f"{c:>15}" for c in columns)]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"{name:14}failed: {row['failed'].splitlines()[-1][-200:]}")
        else:
            lines.append(f"{name:14}" + " ".join(f"{row[c]:15.4g}" for c in columns))
    timed = {n: r["back_to_back_ms"] for n, r in rows.items() if "failed" not in r}
    peers = {n: ms for n, ms in timed.items() if n != "magi"}
    if "magi" in timed and peers:
        best = min(peers, key=lambda n: peers[n])
        lines.append(f"magi is {peers[best] / timed['magi']:.3f} times as fast as {best}, the best "
                     "peer, back to back")  # fmt: skip
        same = "agrees with" if agrees(rows, tolerance) else "DIFFERS from"
        lines.append(f"its last loss {same} that of {next(iter(peers))} (tolerance {tolerance:g})")
    return "\n".join(lines)
