"""Inference in bfloat16: files of ours beside eager, torch.compile, AOTInductor, ONNX Runtime.

    python -m benchmarks.inference --output benchmarks/results/NAME.json
    python -m benchmarks.inference --cases resnet50 --variants eager magi-program
    python -m benchmarks.inference --toy

ResNet-50 and ViT-L/16 (timm), BERT-base with 128 tokens (transformers), at batch 1 and at a large
one, and a Llama of 1.2 billion weights that generates greedily. Every variant is a process of its
own with a time limit: one that fails or hangs is a row that says why, and what does not fit into
`--budget` is not started and says so. Ours are files of magi_train.export: "program" runs op by op,
"compiled" and "max-autotune" are the same file compiled when it is loaded, "pt2" is machine code;
all run as CUDA graphs where that gains. Random weights, the same for all; nothing is downloaded.

p50_ms, p99_ms: latency of a call (of a whole generation). to_eager, to_best_peer: p50 of that row
over p50 of this one; above 1 is faster. peak_mib: memory of a call above the weights. The error is
the largest difference from float32 eager, relative to the largest value; of a generation, how many
of its first tokens are those of float32.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, tables
from benchmarks.inference_runners import CASES, TOYS, Task, variants
from magi_train.integrations.ranks import run_ranks

ALL = {**CASES, **TOYS}
LEAST_SECONDS = 15.0
"""What a process needs at least; with less left it is not started."""

Row = dict[str, Any]


def run(task: Task, seconds: float) -> list[Row]:
    """Run a task in a process of its own; return a row for each batch size."""
    batches = ALL[task.case].batches
    head = {"case": task.case, "variant": task.variant}
    if seconds < LEAST_SECONDS:
        return [head | {"batch": b, "failed": "not started: --budget is used up"} for b in batches]
    with tempfile.TemporaryDirectory(prefix="inference_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(asdict(task)))
        why = run_ranks(["-m", "benchmarks.inference_runners", name], 1, folder, seconds)
        file = folder / "rows.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        found = {row["batch"]: row for row in map(json.loads, lines)}
        why = reason(why, (folder / "0.log").read_text(errors="replace"))
    return [head | found.get(b, {"batch": b, "failed": why}) for b in batches]


def reason(why: str, log: str) -> str:
    """Return why a process ended early: its fatal error if it had one, else its last line."""
    fatal = [line for line in log.splitlines() if line.startswith("Fatal Python error")]
    last = why.strip().splitlines()[-1:] or ["it ended well and left no row"]
    return (fatal or last)[0][-300:]


def compared(rows: list[Row]) -> list[Row]:
    """Return the rows with their speed and memory beside eager's, and beside the best peer's."""
    found = []
    for row in rows:
        same = [r for r in rows if (r["case"], r["batch"]) == (row["case"], row["batch"])]
        timed = [r for r in same if "p50_ms" in r]
        peers = [r["p50_ms"] for r in timed if not r["variant"].startswith("magi-")]
        eager = next((r for r in timed if r["variant"] == "eager"), {})
        more = {}
        if "p50_ms" in row:
            more |= {"to_eager": eager["p50_ms"] / row["p50_ms"]} if eager else {}
            more |= {"to_best_peer": min(peers) / row["p50_ms"]} if peers else {}
        if row.get("peak_mib") and eager.get("peak_mib"):
            more["peak_to_eager"] = row["peak_mib"] / eager["peak_mib"]
        found.append(row | more)
    return found


def main() -> None:
    """Measure the cases, print each row as it comes, then the table, and save the record."""
    parser = records.parser_of(__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=ALL, help=f"default: {' '.join(CASES)}")
    add("--toy", action="store_true", help=f"{' '.join(TOYS)} instead, of a few seconds")
    add("--variants", nargs="+", help="default: all of a case; eager is what ratios are to")
    add("--seconds", type=float, default=2.0, help="of timing each row, about (%(default)s)")
    add("--timeout", type=float, default=240.0, help="seconds for one process (%(default)s)")
    add("--budget", type=float, default=300.0, help="seconds for all of them (%(default)s)")
    add("--prompt", type=int, help="tokens of a prompt (512, for toys 8)")
    add("--tokens", type=int, help="tokens that follow it (64, for toys 8)")
    add("--cache", type=int, help="tokens that the cache holds (prompt and answer)")
    options = parser.parse_args()
    cases = options.cases or [*(TOYS if options.toy else CASES)]
    known = {name for case in cases for name in variants(ALL[case])}
    if unknown := set(options.variants or ()) - known:
        parser.error(f"--variants: {', '.join(unknown)}; the cases have {', '.join(sorted(known))}")
    rows: list[Row] = []
    end = time.monotonic() + options.budget
    for task in tasks(options, cases):
        new = run(task, min(options.timeout, end - time.monotonic()))
        rows = compared([*rows, *new])
        for row in rows[-len(new) :]:
            print(json.dumps(row), flush=True)
        records.save("inference", options, rows=rows)  # a call that is cut keeps what it has
    print("\n".join(tables.table(rows)), flush=True)
    if all("failed" in row for row in rows):
        sys.exit("no row could be measured")


def tasks(options: argparse.Namespace, cases: list[str]) -> list[Task]:
    """Return what is to be run, in order."""
    found = []
    for name in cases:
        prompt = options.prompt or (8 if name in TOYS else 512)
        tokens = options.tokens or (8 if name in TOYS else 64)
        cache = options.cache or prompt + tokens
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for variant in variants(ALL[name]):
            if variant in (options.variants or variants(ALL[name])):
                task = Task(name, variant, device, options.seconds, prompt, tokens, cache)
                found.append(task)
    return found


if __name__ == "__main__":
    main()
