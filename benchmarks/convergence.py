"""Whether compressed gradients train as well as exact ones: validation loss over several seeds.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.convergence --output FILE.json
    ... --variants ddp,magi-int8 --seeds 0 --seconds 500

Byte-level GPTs of 31.7 M parameters learn Python's standard library (benchmarks.byte_gpt) for 1000
steps of AdamW with warm-up and cosine decay, on as many ranks as the launcher starts: on GPUs under
autocast to bfloat16, without GPUs on the CPU in float32, which is for trying the script at a small
--width. Of one seed, all variants start from the same weights and see the same batches.

A variant is a method of benchmarks.communication (levels take their codec without a trial), or
magi-CODEC+outerN for N local steps before each exchange ("none" for no codec).

What is finished is in FILE.json after every run, and a run is not started if it would not end
within --seconds, by the longest of its kind so far; the same command goes on with what is missing.
A row: the mean validation loss over seeds in nats a byte, their standard deviation, and the mean
and the largest of the gaps to "ddp" with the same seed.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import statistics
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import magi_train
from benchmarks import records
from benchmarks.byte_gpt import Gpt, draw, texts, validate
from benchmarks.communication import wrap
from magi_train import CommConfig, Config

VARIANTS = (
    "ddp,magi,magi-safe,magi-bfloat16,magi-int8,magi-fp8,magi-powersgd,ddp-powersgd4,"
    "magi-none+outer50,magi-int8+outer50"
)
EXACT = "ddp"
WARM_UP_STEPS = 100
Run = dict[str, Any]


def make(variant: str, model: nn.Module, tier: Any) -> Any:
    """Return the model as `variant` trains it."""
    spec, _, outer = variant.partition("+outer")
    if not outer:
        return wrap(model, spec, tier, trial=False)
    codec: Any = spec.partition("-")[2]
    codec = None if codec == "none" else codec
    comm = CommConfig(compression=codec, outer_steps=int(outer))
    return magi_train.prepare(model, config=Config(tier=tier, comm=comm))


def rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: warm-up, then a cosine down to a tenth."""
    warm = min(WARM_UP_STEPS, max(steps // 10, 1))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def train(
    variant: str, seed: int, text: Tensor, held_out: Tensor, options: argparse.Namespace
) -> Run:
    """Train one model; return its losses, the same on all ranks."""
    device, begin = options.device, time.monotonic()
    torch.manual_seed(seed)
    plain = Gpt(options.width, options.layers, options.length).to(device)
    model = make(variant, plain, options.tier)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, options.steps))
    ranks, last = dist.get_world_size(), []
    for step in range(options.steps):
        number = seed * 10**7 + step * ranks + dist.get_rank()
        x, y = (t.to(device) for t in draw(text, number, options.batch, options.length))
        with autocast(device):
            loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 0.9 * options.steps:
            last.append(loss.detach())
    if "+outer" in variant:
        magi_train.exchange_weights(model)
    with autocast(device):
        found = [float(torch.stack(last).mean()), validate(plain, held_out, 16, options.length)]
    means = torch.tensor(found, device=device)
    dist.all_reduce(means)
    train_loss, loss = (means / ranks).tolist()
    return {
        "variant": variant,
        "seed": seed,
        "train_loss": train_loss,
        "validation_loss": loss,
        "seconds": round(time.monotonic() - begin, 1),
        "parameters": sum(p.numel() for p in plain.parameters()),
    }


def autocast(device: torch.device) -> Any:
    """Return the context of a forward."""
    on_gpu = device.type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()


def summary(runs: list[Run]) -> list[dict[str, Any]]:
    """Return a row of each variant."""
    exact = {r["seed"]: r["validation_loss"] for r in runs if r["variant"] == EXACT}
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in runs):
        mine = [r for r in runs if r["variant"] == variant]
        losses = [r["validation_loss"] for r in mine]
        gaps = [r["validation_loss"] - exact[r["seed"]] for r in mine if r["seed"] in exact]
        rows.append(
            {
                "method": variant,
                "seeds": len(losses),
                "validation_loss": round(statistics.mean(losses), 4),
                "deviation_of_seeds": round(statistics.stdev(losses), 4) if losses[1:] else None,
                "mean_gap": round(statistics.mean(gaps), 4) if gaps else None,
                "largest_gap": round(max(gaps, key=abs), 4) if gaps else None,
                "seconds": round(statistics.mean(r["seconds"] for r in mine), 1),
            }
        )
    return rows


def missing(runs: list[Run], options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return what is still to be run, one seed of all variants before the next."""
    done = {(r["variant"], r["seed"]) for r in runs}
    wanted = [(v, s) for s in range(options.seeds) for v in options.variants.split(",")]
    return [each for each in wanted if each not in done]


def earlier(options: argparse.Namespace) -> list[Run]:
    """Return the runs of an earlier call with the same settings.

    Raises:
        ValueError: The file is of other settings.
    """
    if not options.output or not options.output.exists():
        return []
    record = json.loads(options.output.read_text())
    if record["settings"] != options.settings:
        raise ValueError(f"{options.output} has runs of other settings: {record['settings']}")
    return list(record["runs"])


def fits(runs: list[Run], variant: str, deadline: float) -> bool:
    """Return whether a run will end in time, as rank 0 sees it; a collective."""
    alike = [r["seconds"] for r in runs if r["variant"] == variant] or [r["seconds"] for r in runs]
    answer = [time.monotonic() + 1.1 * max(alike, default=0.0) < deadline]
    dist.broadcast_object_list(answer)
    return bool(answer[0])


def start(options: argparse.Namespace) -> torch.device:
    """Join the ranks; return this one's device."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("torch").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def main() -> None:
    """Run what is missing; rank 0 writes the record after each run."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of this call")
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a rank")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--tier", default="eager", help="of ours")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.device = start(options)
    kept = ("steps", "width", "layers", "batch", "length", "lr", "tier")
    ranks = dist.get_world_size()
    options.settings = {k: getattr(options, k) for k in kept} | {"ranks": ranks}
    text, held_out = texts()
    everybody: list[Any] = [earlier(options) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(everybody)
    runs: list[Run] = everybody[0]
    for variant, seed in missing(runs, options):
        if not fits(runs, variant, deadline):
            continue
        runs.append(train(variant, seed, text, held_out, options))
        if dist.get_rank() == 0:
            print(json.dumps(runs[-1]), flush=True)
            figures = {"settings": options.settings, "rows": summary(runs), "runs": runs}
            records.save("convergence", options, **figures)
    if dist.get_rank() == 0:
        print(json.dumps(summary(runs), indent=1))
        print("missing:", missing(runs, options))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
