"""Seconds and memory of a training step: ours beside the ways people train the same model today.

    python -m benchmarks.train_step --gpus 1 2 --commit HASH --output benchmarks/results/NAME.json

Every variant runs in processes of its own, on the same data, with the same loss function, AdamW
(fused), bf16 autocast over float32 weights and the same global batch. Reported: median and spread
of synchronised steps, steps back to back, peak memory (of tensors, without what CUDA graphs keep in
their pool; and all that is reserved), start-up, loss after all steps, for ours the report; on
several GPUs also, from a profile of rank 0, how much of the all-reduce time lies under other
kernels.
Variants that need fewer GPUs than there are run side by side, each on GPUs of its own. A variant
that fails is a row that says why.

| variant | what runs |
|---|---|
| eager | the model as it is (DDP on several GPUs) |
| compile | torch.compile of the loss function (of the function over DDP) |
| compile-folded | the same with the attention mask folded by hand (cases.fold_masks_by_hand) |
| compile-nhwc | the same with the model in channels_last |
| block-compile | every block compiled, the rest eager (under DDP) |
| block-compile-loss | block-compile, and the loss function from logits (and the head) compiled |
| fsdp2 | fully_shard of every layer, no resharding, every layer compiled; bf16, fp32 reduction |
| magi | magi_train.prepare and prepare_step, Config() |
| torchao-compile | compile, linears made fp8 by torchao (tensorwise, its filter, not the head) |
| torchao-block-compile | block-compile of the same |
| magi-fp8 | magi with Config(precision="fp8"); also magi-fp8-with-A and so on |
| magi-bf16-wire | the same with bfloat16 all-reduces |
| magi-without-A+B | magi with FusionConfig(A=False, B=False) |
| magi-with-A | magi with FusionConfig(A=True); A may be cuda_graphs too, of Config |
| magi-24gib | magi with Config(memory_budget_gib=24); any number |
| liger, liger-block-compile | eager, or block-compile, with Liger's kernels patched in |
| checkpoint | block-compile with the model's own gradient checkpointing |
| checkpoint-loss | the same, with Liger's linear + cross-entropy in chunks |
"""

import argparse
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import records
from benchmarks.cases import CASES, Batch, Case, fold_masks_by_hand
from magi_train.integrations.peers import measure, wait

WARM_UP, TIMED = 20, 20  # CUDA graphs are chosen in the first 13 steps
LOSS_BATCHES = 4
HEADS = {"lm_head", "decoder", "head"}
"""Last part of the names of linears that make logits."""
VARIANTS = {
    1: ("eager", "compile", "compile-folded", "block-compile", "magi"),
    2: ("eager", "compile", "block-compile", "fsdp2", "magi", "magi-bf16-wire"),
}


def worker(variant: str, case: Case, trace: bool) -> dict[str, Any]:
    """Measure one variant on this rank; torchrun's variables say which."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(0)
    with device:
        model = case.build()
    g = torch.Generator(device).manual_seed(100 + rank)
    batches = [case.batch(g) for _ in range(LOSS_BATCHES)]
    if variant.startswith("magi"):  # a batch comes from the host, where ours looks at it
        from magi_train import to_device

        batches = [to_device({n: t.cpu() for n, t in b.items()}, device) for b in batches]
    start = time.perf_counter()
    model, loss_of, optimizer = setup(variant, case, model, world, device)

    def step(i: int) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(batches[i % LOSS_BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    result = measure(step, device, WARM_UP, TIMED, start)
    result["samples_per_second_per_gpu"] = case.samples / result["back_to_back_ms"] * 1e3
    if trace:
        result |= profile(step) if world > 1 else kernels(step)
    if variant.startswith("magi") and rank == 0:
        import magi_train

        result["report"] = str(magi_train.report(model)).splitlines()
    if world > 1:
        dist.destroy_process_group()
    return result


def setup(
    variant: str, case: Case, model: nn.Module, world: int, device: torch.device
) -> tuple[Any, Any, torch.optim.Optimizer]:
    """Return the trained module, the function from a batch to its loss, and the optimizer."""
    layers = case.repeated(model)
    if variant == "compile-folded":
        fold_masks_by_hand()
    if variant == "compile-nhwc":
        model.to(memory_format=torch.channels_last)
    if variant.startswith("torchao"):
        with_torchao(model)
    if variant.startswith("liger"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if variant == "checkpoint-loss":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        parts = ("rope", "swiglu", "geglu", "rms_norm", "layer_norm", "cross_entropy")
        off = dict.fromkeys(parts, False)
        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True, **off)
    if variant.startswith("checkpoint"):  # transformers' models only
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if "block-compile" in variant or variant.startswith(("fsdp2", "checkpoint")):
        for layer in layers:
            layer.compile()
    if variant == "block-compile-loss":
        compile_head_and_loss(model)
    if variant == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*layers, model):
            fully_shard(part, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if variant.startswith("magi"):
        import magi_train
        from magi_train import CommConfig, Config, FusionConfig

        compression = "bfloat16" if variant == "magi-bf16-wire" else None
        plain = variant.replace("-fp8", "")
        _, word, names = (*plain.split("-", 2), "", "")[:3]
        named = names.split("+") if word in ("with", "without") else ()
        switches = dict.fromkeys(named, word == "with")
        config = Config(
            cuda_graphs=switches.pop("cuda_graphs", "auto"),
            fusion=FusionConfig(**switches),
            comm=CommConfig(compression=compression),
            precision="autocast" if plain == variant else "fp8",
            memory_budget_gib=float(word.removesuffix("gib")) if word.endswith("gib") else None,
        )
        prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
        loss_of = magi_train.prepare_step(lambda batch: case.loss(prepared, batch), prepared)
        return prepared, loss_of, optimizer
    if world > 1 and variant != "fsdp2":
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index], gradient_as_bucket_view=True
        )

    def loss_of(batch: Batch) -> torch.Tensor:
        return case.loss(model, batch)

    whole = variant.startswith(("compile", "torchao-compile"))
    return model, torch.compile(loss_of) if whole else loss_of, optimizer


def with_torchao(model: nn.Module) -> None:
    """Make linears fp8 as torchao recommends for tensorwise scales: by shape, without the head."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or name.split(".")[-1] in HEADS:
            return False
        rows, columns = module.weight.shape
        skinny = columns <= 4096 and rows <= 1024
        return not skinny and rows % 16 == 0 and columns % 16 == 0

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, config=config, module_filter_fn=wanted)


def compile_head_and_loss(model: nn.Module) -> None:
    """Compile what transformers' models compute after their blocks: the head, and the loss."""
    head = getattr(model, "lm_head", None) or getattr(model, "cls", None)
    if head is not None:
        head.compile()
        model.loss_function = torch.compile(model.loss_function)


def profile(step: Any) -> dict[str, float]:
    """Return, for one step, the union of collectives and the part that nothing else covers."""
    wait(torch.device("cuda", torch.cuda.current_device()))
    activity = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activity) as traced:
        for i in range(3):
            step(i)
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in traced.events():
        if (
            event.device_type == torch.autograd.DeviceType.CUDA
            and event.time_range.elapsed_us() > 0
        ):
            spans["nccl" in event.name.lower()].append(
                (event.time_range.start, event.time_range.end)
            )
    comm, compute = union(spans[True]), union(spans[False])
    total, busy, both = length(comm), length(compute), length(union(comm + compute))
    covered = total + busy - both
    return {
        "comm_ms": total / 3e3,
        "exposed_comm_ms": (total - covered) / 3e3,
        "comm_under_compute": covered / total if total else 1.0,
        "gpu_busy_ms": both / 3e3,
    }


def kernels(step: Any, shown: int = 25) -> dict[str, Any]:
    """Return device milliseconds a step by kernel name, the longest first, and their sum."""
    steps = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
        for i in range(steps):
            step(i)
        torch.cuda.synchronize()
    total: dict[str, float] = {}
    for event in traced.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name[:90]
            total[name] = total.get(name, 0.0) + event.time_range.elapsed_us() / 1e3 / steps
    longest = sorted(total.items(), key=lambda item: -item[1])[:shown]
    return {"kernels": {n: round(ms, 3) for n, ms in longest}, "kernels_ms": sum(total.values())}


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the spans merged where they touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: list[tuple[float, float]]) -> float:
    """Return the time that merged spans cover."""
    return sum(end - start for start, end in spans)


def parity(case: Case) -> dict[str, float]:
    """Compare the gradients of one step with DDP's, eager, on this rank's data."""
    import copy

    import magi_train

    rank, device = int(os.environ["RANK"]), torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(0)
    with device:
        model = case.build()
    twin = copy.deepcopy(model)
    batch = case.batch(torch.Generator(device).manual_seed(rank))
    theirs = nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
    ours = magi_train.prepare(twin)
    step = magi_train.prepare_step(lambda batch: case.loss(ours, batch), ours)
    losses = []
    for function in (lambda batch: case.loss(theirs, batch), step):
        with torch.autocast("cuda", torch.bfloat16):
            loss = function(batch)
        loss.backward()
        losses.append(float(loss))
    worst, name = 0.0, ""
    for (n, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        apart = float((p.grad - q.grad).norm() / p.grad.norm())
        if apart > worst:
            worst, name = apart, n
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


def launch(arguments: list[str], gpus: int, first_gpu: int, seconds: int) -> dict[str, Any]:
    """Run one variant in `gpus` processes; return rank 0's figures or why there are none."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        visible = ",".join(str(first_gpu + i) for i in range(gpus))
        processes = []
        for rank in range(gpus):
            env = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(gpus),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "CUDA_VISIBLE_DEVICES": visible,
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.train_step", *arguments, "--out", str(out)]
            log = open(Path(folder) / f"{rank}.log", "w+")  # noqa: SIM115  closed below
            processes.append((subprocess.Popen(command, env=env, stdout=log, stderr=log), log))
        deadline = time.monotonic() + seconds
        failure = ""
        for process, _ in processes:
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                failure = f"did not finish in {seconds} s"
        for process, log in processes:
            process.kill()
            process.wait()
            log.seek(0)
            text = log.read()
            log.close()
            if process.returncode not in (0, -9) and not failure:
                failure = text.strip()[-600:]
        if out.exists():
            return {**json.loads(out.read_text()), "log": text[-1500:] if gpus == 1 else ""}
        return {"failed": failure or "no result"}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, with the ratio to the best peer of the same number of GPUs."""
    columns = ("step_ms", "back_to_back_ms", "peak_gib", "reserved_gib", "first_step_s", "loss",
               "comm_ms", "exposed_comm_ms", "comm_under_compute")  # fmt: skip
    lines = ["variant           gpus " + " ".join(f"{c:>18}" for c in columns)]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['variant']:17} {row['gpus']:4} failed: {row['failed'][-200:]}")
            continue
        cells = [f"{row[c]:18.3f}" if c in row else " " * 18 for c in columns]
        lines.append(f"{row['variant']:17} {row['gpus']:4} " + " ".join(cells))
    for gpus in sorted({row["gpus"] for row in rows}):
        done = [r for r in rows if r["gpus"] == gpus and "step_ms" in r]
        for mine in (r for r in done if r["variant"].startswith("magi")):
            ratios = [
                f"{r['variant']} {r['back_to_back_ms'] / mine['back_to_back_ms']:.3f}"
                for r in done
                if not r["variant"].startswith("magi")
            ]
            lines.append(f"speed of {mine['variant']} on {gpus}: " + ", ".join(ratios))
    return "\n".join(lines)


def main() -> None:
    """Measure all variants, print the table, write JSON."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--case", choices=CASES, default="llama-1b")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--seconds", type=int, default=150, help="limit for one variant")
    parser.add_argument("--kernels", action="store_true", help="list the longest kernels")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = CASES[options.case]
    if options.worker:
        done = (
            parity(case)
            if options.worker == "parity"
            else worker(options.worker, case, options.trace)
        )
        if os.environ["RANK"] == "0":
            options.out.write_text(json.dumps(done))
        return
    rows = []
    for gpus in options.gpus:
        slots: queue.Queue[int] = queue.Queue()  # first GPU of each place that is free
        for first in range(0, torch.cuda.device_count() - gpus + 1, gpus):
            slots.put(first)

        def one(
            variant: str, gpus: int = gpus, slots: "queue.Queue[int]" = slots
        ) -> dict[str, Any]:
            arguments = ["--case", options.case, "--worker", variant]
            arguments += ["--trace"] if gpus > 1 or options.kernels else []
            first = slots.get()
            done = launch(arguments, gpus, first, options.seconds)
            slots.put(first)
            row = {"variant": variant, "gpus": gpus, **done}
            print(json.dumps(row), flush=True)
            return row

        with ThreadPoolExecutor(slots.qsize()) as pool:
            rows += pool.map(one, options.variants or VARIANTS[min(gpus, 2)])
    checks = {}
    if max(options.gpus) > 1 and not options.variants:
        arguments = ["--case", options.case, "--worker", "parity"]
        checks["parity"] = launch(arguments, 2, 0, options.seconds)
    records.save("train_step", options, case=options.case, rows=rows, checks=checks)
    print(json.dumps(checks, indent=1))
    print(table(rows), flush=True)


if __name__ == "__main__":
    main()
