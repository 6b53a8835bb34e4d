"""`magi bench --case` on several numbers of GPUs in one record, with the variants people ask for.

    python -m benchmarks.train_step --gpus 1 2 --commit HASH --output benchmarks/results/NAME.json

Variants are peers of `magi bench` (its --help lists their parts), with its figures: the same data,
loss, AdamW (fused), bf16 autocast over float32 weights and batch on each GPU. Those that need fewer
GPUs than there are run side by side, each on GPUs of its own. On several GPUs the gradients of one
step of ours are compared with DDP's, too. A variant that fails is a row that says why.
"""

import argparse
import json
import os
import queue
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import records
from magi_train.integrations import bench
from magi_train.integrations.bench_rank import Spec, Task, load
from magi_train.integrations.cases import case_of
from magi_train.integrations.ranks import run_ranks

VARIANTS = {
    1: ("eager", "compile", "fold-masks+compile", "block-compile", "liger+block-compile", "magi"),
    2: (
        "eager", "compile", "block-compile", "fsdp2+block-compile", "fsdp2-reshard+block-compile",
        "zero1", "zero2", "zero3", "magi", "magi:comm.compression=bfloat16",
    ),
}  # fmt: skip


def parity(case: str) -> dict[str, float]:
    """Compare the gradients of one step with DDP's, eager, on this rank's data."""
    import magi_train
    from magi_train import to_device

    rank, device = int(os.environ["RANK"]), torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    one, two = (load(Spec(case, True, dist.get_world_size()), device, rank) for _ in range(2))
    theirs = nn.parallel.DistributedDataParallel(one.module, device_ids=[device.index])
    ours = magi_train.prepare(two.module)
    step = magi_train.prepare_step(lambda batch: two.loss(ours, batch), ours)
    losses = []
    for function in (lambda batch: one.loss(theirs, batch), step):
        with torch.autocast("cuda", torch.bfloat16):
            loss = function(to_device(one.batches[0], device))
        loss.backward()
        losses.append(float(loss))
    worst, name = worst_gradient(one, two)
    print(f"rank {rank}: worst gradient {name}", file=sys.stderr, flush=True)
    assert magi_train.report(ours).tier == "graph", magi_train.report(ours)
    dist.destroy_process_group()
    # rounding of bf16 activations through 16 layers, in another order: both runs are this far from
    # a float32 one; eps / 2 per rounding, about 10 roundings a layer that add up like their root
    limit = torch.finfo(torch.bfloat16).eps / 2 * (10 * 16) ** 0.5
    return {
        "worst_gradient_difference": worst,
        "limit": limit,
        "loss_difference": losses[1] - losses[0],
    }


def worst_gradient(one: Task, two: Task) -> tuple[float, str]:
    """Return the largest relative distance of two modules' gradients, and whose it is."""
    pairs = zip(one.module.named_parameters(), two.module.parameters(), strict=True)
    return max((float((p.grad - q.grad).norm() / p.grad.norm()), name) for (name, p), q in pairs)


def measure_all(
    case: str,
    gpus: int,
    variants: tuple[str, ...],
    options: argparse.Namespace,
    caches: Path | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Return the rows of all variants on `gpus` GPUs each.

    Args:
        case: What is trained.
        gpus: For each variant.
        variants: Peers by name.
        options: `kernels`, `seconds` and `cold_only` of them.
        caches: Folder of compile caches, one for each variant; None for empty ones in each row.
        keep: Gets each row as it comes.
    """
    spec = Spec(case, True, gpus, autocast="bfloat16", kernels=options.kernels)
    counted = bench.count(spec)
    visible = records.gpus()
    free: queue.Queue[int] = queue.Queue()  # first GPU of each place
    for first in range(0, torch.cuda.device_count() - gpus + 1, gpus):
        free.put(first)
    if free.empty():
        sys.exit(f"--gpus {gpus}: there are {torch.cuda.device_count()}")

    def one(variant: str) -> dict[str, Any]:
        first = free.get()
        mine = {"CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + gpus])}
        if caches is not None:
            folder = caches / re.sub(r"\W+", "_", variant)
            mine |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}", "TRITON_CACHE_DIR": f"{folder}/triton"}
        row = bench.row(variant, spec, counted, options.seconds, not options.cold_only, mine)
        free.put(first)
        row["gpus"] = row.pop("ranks")
        print(json.dumps(row), flush=True)
        keep(row)
        return row

    with ThreadPoolExecutor(free.qsize()) as pool:
        return list(pool.map(one, variants))


def check_parity(case: str, seconds: float) -> dict[str, Any]:
    """Return what `parity` says on two GPUs, or why it does not."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parity.json"
        command = ["-m", "benchmarks.train_step", "--case", case, "--parity", str(out)]
        why = run_ranks(command, 2, Path(folder), seconds)
        return {"failed": why} if why else json.loads(out.read_text())


def main() -> None:
    """Measure all variants, print the table, write JSON."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--case", default="llama-1b", help="as `magi bench --case`")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--seconds", type=int, default=150, help="limit for one run")
    parser.add_argument("--kernels", action="store_true", help="list the longest kernels")
    parser.add_argument("--cold-only", action="store_true", help="leave the second runs out")
    parser.add_argument("--parity", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    case_of(options.case)
    if options.parity:
        found = parity(options.case)
        if os.environ["RANK"] == "0":
            options.parity.write_text(json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    so_far: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:  # a call that is cut keeps what it has
        so_far.append(row)
        records.save("train_step", options, case=options.case, rows=so_far)

    for gpus in options.gpus:
        variants = tuple(options.variants or VARIANTS[min(gpus, 2)])
        rows += measure_all(options.case, gpus, variants, options, keep=keep)
    checks = {}
    if max(options.gpus) > 1 and not options.variants:
        checks["parity"] = check_parity(options.case, options.seconds)
    records.save("train_step", options, case=options.case, rows=rows, checks=checks)
    print(json.dumps(checks, indent=1))
    for gpus in options.gpus:
        print(f"{gpus} GPU(s)\n" + bench.table([r for r in rows if r["gpus"] == gpus], 0.02))


if __name__ == "__main__":
    main()
