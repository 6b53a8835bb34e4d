"""The largest batch that trains within a GPU's memory at nearly the speed of torch.compile.

    python -m benchmarks.largest_batch --cases bert gpt2 --output benchmarks/results/NAME.json

PyTorch may take `--gib` of a GPU, so that an H200 stands for a smaller one. How many rows
torch.compile trains is found from its peaks with two batches, and tried; 10 % more must fail. Ours
then trains 1.5, 2, 3, ... times as many under a memory budget of SHARE of that memory, until it
fails or is slower than LEAST_SPEED of torch.compile's samples a second with its own largest batch.
Every try is a row; `rows` is the batch, `times_rows` its ratio to torch.compile's largest, `speed`
that of samples a second.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

from benchmarks import records
from magi_train.integrations import bench
from magi_train.integrations.bench_rank import Spec

FIRST = {"llama-1b": (1, 2), "gpt2": (8, 16), "bert": (16, 32), "vit-l": (32, 64),
         "resnet50": (64, 128)}  # fmt: skip
"""Cases, each with two batches that fit."""
PEERS = ("compile", "block-compile")
LEAST_SPEED = 0.85
TIMES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
STEP, GAP = 1.05, 1.1
"""How far from the estimate the next try is, and which more than the result must fail."""
OUT_OF_MEMORY = "out of memory"
SHARE = 0.97
"""Of the memory, for the budget: what is allocated lies in segments that are not full."""
FASTEST = "samples_per_second_per_gpu"

Row = dict[str, Any]
Measure = Callable[[str, int], Row]
"""Trains a variant with so many rows; the row has `failed` where that does not work."""


def largest(variant: str, first: tuple[int, int], gib: float, measure: Measure) -> Row:
    """Return the row of the largest batch that a peer trains, or of a try that failed otherwise.

    Args:
        variant: The peer.
        first: Two batches that fit, to see how the peak grows.
        gib: Memory.
        measure: See Measure.
    """
    tries = [measure(variant, rows) for rows in first]
    for row in tries:
        if "failed" in row:
            return row
    (few, small), (many, large) = ((row["rows"], row["peak_gib"]) for row in tries)
    best, too_many, step = tries[-1], 0, STEP - 1
    rows = max(int(many + (gib - large) * (many - few) / max(large - small, 1e-6)), many + 1)
    while not too_many or too_many > max(best["rows"] * GAP, best["rows"] + 1):
        row = measure(variant, rows)
        if OUT_OF_MEMORY in row.get("failed", ""):
            too_many = rows
        elif "failed" in row:
            return row
        else:
            best = row
        if too_many and best is not tries[-1]:
            rows = (best["rows"] + too_many) // 2
        elif too_many:
            rows = max(int(too_many / (1 + step)), best["rows"] + 1)
        else:
            rows = int(best["rows"] * (1 + step)) + 1
        step *= 2
    return best


def ours(least_rows: int, least_speed: float, budget: float, measure: Measure) -> Row | None:
    """Return the row of the largest batch that ours trains fast enough; None if there is none.

    Args:
        least_rows: What TIMES multiply.
        least_speed: Samples a second.
        budget: GiB.
        measure: See Measure.
    """
    best = None
    for times in TIMES:
        rows = math.ceil(times * least_rows)
        row = measure(f"magi:memory_budget_gib={budget:.6g}", rows)
        if "failed" in row or row[FASTEST] < least_speed:
            break
        best = row
    return best


def search(case: str, gib: float, measure: Measure) -> Row:
    """Return what was found for a case; see the head of this module."""
    peers = {peer: largest(peer, FIRST[case], gib, measure) for peer in PEERS}
    found: Row = {"case": case, "gib": gib}
    for peer, row in peers.items():
        found[f"{peer} rows"] = 0 if "failed" in row else row["rows"]
    base = peers[PEERS[0]]
    if "failed" in base:
        return found | {"failed": f"{PEERS[0]} with {base['rows']} rows: {base['failed']}"}
    best = ours(base["rows"], LEAST_SPEED * base[FASTEST], SHARE * gib, measure)
    if best is None:
        return found | {"rows": 0}
    times, speed = best["rows"] / base["rows"], best[FASTEST] / base[FASTEST]
    return found | {"rows": best["rows"], "times_rows": times, "speed": speed}


def main() -> None:
    """Search for every case, and write all rows."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(FIRST), choices=list(FIRST))
    parser.add_argument("--gib", type=float, default=40.0, help="memory (%(default)s)")
    parser.add_argument("--seconds", type=int, default=150, help="limit for one run")
    options = parser.parse_args()
    results: list[Row] = []
    rows: list[Row] = []
    for case in options.cases:

        def measure(variant: str, count: int, case: str = case) -> Row:
            rows.append(run(case, variant, count, options))
            print(json.dumps(rows[-1]), flush=True)
            records.save("largest_batch", options, results=results, rows=rows)  # if it is cut
            return rows[-1]

        results.append(search(case, options.gib, measure))
        print(json.dumps(results[-1]), flush=True)
    records.save("largest_batch", options, results=results, rows=rows)


def run(case: str, variant: str, count: int, options: argparse.Namespace) -> Row:
    """Train a variant with a batch of `count` rows in a process of its own."""
    what = f"{case}@{count}"
    spec = Spec(what, True, steps=6, warm_up=8, autocast="bfloat16", memory_gib=options.gib)
    row = bench.row(variant, spec, {}, options.seconds, warm_start=False)
    row.pop("report", None)
    return {"case": what, "rows": count} | row


if __name__ == "__main__":
    main()
