"""Weak scaling on one host, 1 to 8 GPUs: ours beside the best form of DDP and of FSDP2.

    python -m benchmarks.scaling --commit HASH --output benchmarks/results/NAME.json

Llama-1B, 2 x 4096 tokens a GPU, on 1, 2, 4 and 8 of them; then, on 8, the shape of Llama-3.1-8B,
1 x 8192 tokens a GPU, sharded. Rows are those of benchmarks/train_step.py; "efficiency" is tokens
per second and GPU over those of the same variant on one GPU (block-compile stands for both peers
there, as one process has nothing to reduce or shard). Numbers of GPUs that are missing are rows
that say so. Compile caches are shared between the rows of a call, so start-ups are not cold ones.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.train_step import measure_all
from magi_train.integrations import bench, peers

COUNTS = (1, 2, 4, 8)
PEERS = ("block-compile", "fsdp2+block-compile")
SMALL = ("llama-1b", "magi")
LARGE = ("llama-8b", "magi:engine=fsdp2,sharding.reshard_after_forward=false,"
         "sharding.gather_dtype=bfloat16")  # fmt: skip
LARGE_COUNT = 8
FASTEST = "samples_per_second_per_gpu"


def measured(
    case: str, gpus: int, variants: tuple[str, ...], options: argparse.Namespace, caches: Path
) -> list[dict[str, Any]]:
    """Return the rows of `variants` on `gpus` GPUs, or rows that say that there are fewer."""
    have = torch.cuda.device_count()
    if have < gpus:
        why = f"needs {gpus} GPUs, there are {have}"
        return [{"variant": v, "gpus": gpus, "case": case, "failed": why} for v in variants]
    rows = measure_all(case, gpus, variants, options, caches)
    return [row | {"case": case} for row in rows]


def add_efficiency(rows: list[dict[str, Any]]) -> None:
    """Give each row of several GPUs its share of the speed on one, and ours its lead."""
    speed = {(r["variant"], r["gpus"], r["case"]): r[FASTEST] for r in rows if FASTEST in r}
    for row in rows:
        if FASTEST not in row:
            continue
        variant, case = row["variant"], row["case"]
        alone = variant if peers.is_ours(variant) else PEERS[0]
        one = speed.get((alone, 1, case))
        if one and row["gpus"] > 1:
            row["efficiency"] = row[FASTEST] / one
        theirs = [v for (name, gpus, what), v in speed.items()
                  if (gpus, what) == (row["gpus"], case) and not peers.is_ours(name)]  # fmt: skip
        if theirs and peers.is_ours(variant):
            row["to_the_best_peer_back_to_back"] = row[FASTEST] / max(theirs)


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the record of the rows so far."""
    add_efficiency(rows)
    records.save("scaling", options, rows=rows)


def main() -> None:
    """Measure what there are GPUs for, print the table, write JSON."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--large-gpus", type=int, default=LARGE_COUNT, help="for the large case")
    parser.add_argument("--large-case", default=LARGE[0], help="as `magi bench --case`")
    parser.add_argument("--small-case", default=SMALL[0], help="as `magi bench --case`")
    parser.add_argument("--no-large", action="store_true", help="leave the large case out")
    parser.add_argument("--seconds", type=int, default=120, help="limit for one run")
    options = parser.parse_args()
    options.kernels, options.cold_only = False, True
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        caches = Path(folder)
        for gpus in options.gpus:
            several = (SMALL[1], *(PEERS if gpus > 1 else PEERS[:1]))
            rows += measured(options.small_case, gpus, several, options, caches)
            save(rows, options)  # a call that is cut keeps what it has
        if not options.no_large:
            large = (LARGE[1], PEERS[1])
            rows += measured(options.large_case, options.large_gpus, large, options, caches)
            save(rows, options)
    for case, gpus in dict.fromkeys((r["case"], r["gpus"]) for r in rows):
        chosen = [r for r in rows if (r["case"], r["gpus"]) == (case, gpus)]
        print(f"\n{case}, {gpus} GPU(s)\n" + bench.table(chosen, 0.05))
        for row in chosen:
            shown = {k: row[k] for k in ("efficiency", "to_the_best_peer_back_to_back") if k in row}
            print(row["variant"], json.dumps(shown))


if __name__ == "__main__":
    main()
