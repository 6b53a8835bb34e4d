"""Thousands of steps with faults, beside the same training in eager DDP without them.

    python -m benchmarks.soak --steps 5000 --output benchmarks/results/NAME.json

Two gloo ranks train a small Llama from transformers on a chain of tokens that can be learned; the
batch of a step is a function of its number, and some are short and some have another length. The
disturbed run, through magi, meets besides, at steps drawn from `--seed`:

* gradients that are not finite, on one rank: the step is skipped, as loops do, and taken anew;
* every `--every` steps a checkpoint, and model and optimizer made anew and loaded from it;
* `--kills` times rank 1 ends itself by SIGKILL: `magi run --max-restarts` starts both again, which
  go on from the last checkpoint.

So both runs take the same steps. What must hold: the smoothed losses (means of WINDOW steps) differ
by less than TOLERANCE, all kills were survived, and no process grows by training: its resident
memory before a checkpoint is at most FLAT times that half-way from the checkpoint before. What each
new model and its compilation add for good is `mib_per_resume`.
MAGI_SETTINGS holds for the disturbed run, as everywhere: `lowering=aot_eager` compiles faster.
"""

import argparse
import gc
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import records

WINDOW, TOLERANCE, FLAT = 100, 0.02, 1.03
RANKS, ROWS, LENGTH, VOCABULARY = 2, 4, 16, 32
SHORT, OTHER_LENGTH, NOT_FINITE = 0.03, 0.03, 0.01
"""How often a batch has fewer rows, another length, or gives gradients that are not finite."""
MEMORY_EVERY = 25


def batch_of(step: int, rank: int) -> Tensor:
    """Return tokens `[rows, length]` of a step: the next is three times the last plus 0 to 3."""
    shape = random.Random(step)  # of the step alone: ranks have shapes in common
    rows = ROWS // 2 if shape.random() < SHORT else ROWS
    length = LENGTH + 8 if shape.random() < OTHER_LENGTH else LENGTH
    g = torch.Generator().manual_seed(step * RANKS + rank)
    tokens = [torch.randint(0, VOCABULARY, (rows,), generator=g)]
    for _ in range(length - 1):
        tokens.append((3 * tokens[-1] + torch.randint(0, 4, (rows,), generator=g)) % VOCABULARY)
    return torch.stack(tokens, 1)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer, the same on all ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCABULARY,
                    use_cache=False)
    )  # fmt: skip
    return model, torch.optim.AdamW(model.parameters(), lr=2e-3)


class Training:
    """Model, optimizer and the function from a batch to its loss, made and made anew."""

    def __init__(self, disturbed: bool, folder: Path) -> None:
        self.disturbed, self.path = disturbed, folder / f"checkpoint_{int(disturbed)}.pt"
        self.step = 0
        self.make()

    def make(self) -> None:
        """Build, load the checkpoint if there is one, and prepare."""
        self.prepared = self.loss_of = self.optimizer = None  # type: ignore[assignment]
        gc.collect()
        model, self.optimizer = build()
        if self.path.exists():
            state = torch.load(self.path)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        self.model = model
        if self.disturbed:
            import magi_train

            prepared, _ = magi_train.prepare(model, self.optimizer)
            self.prepared: nn.Module = prepared
            self.loss_of = magi_train.prepare_step(
                lambda x: prepared(input_ids=x, labels=x).loss, prepared
            )
        else:
            ddp = nn.parallel.DistributedDataParallel(model)
            self.loss_of = lambda x: ddp(input_ids=x, labels=x).loss

    def save(self) -> None:
        """Write a checkpoint in one step; all ranks wait for it."""
        if dist.get_rank() == 0:
            whole = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                     "step": self.step}  # fmt: skip
            torch.save(whole, self.path.with_suffix(".new"))
            self.path.with_suffix(".new").replace(self.path)
        dist.barrier()

    def tell(self, folder: Path) -> None:
        """Let rank 0 write the report of a model that is being trained through us."""
        if self.disturbed and dist.get_rank() == 0:
            import magi_train

            (folder / "report.txt").write_text(str(magi_train.report(self.prepared)))

    def take_step(self, poison: bool) -> float | None:
        """Take one step; return its loss, None where it was skipped."""
        loss = self.loss_of(batch_of(self.step, dist.get_rank()))
        (loss * float("nan") if poison and dist.get_rank() == 1 else loss).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad()
        return loss.item() if finite else None


def faults(options: argparse.Namespace) -> tuple[set[int], list[int]]:
    """Return the steps whose gradients are spoilt first, and those before which rank 1 ends."""
    draw = random.Random(options.seed)
    spoilt = {step for step in range(options.steps) if draw.random() < NOT_FINITE}
    kills = options.kills
    return spoilt, [options.steps * (i + 1) // (kills + 1) + options.every // 3
                    for i in range(kills)]  # fmt: skip


def worker(options: argparse.Namespace) -> None:
    """Train on this rank; rank 0 writes a line a step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), options.folder
    training = Training(options.disturbed, folder)
    spoilt, kills = faults(options) if options.disturbed else (set(), [])
    with (folder / f"log_{int(options.disturbed)}_{rank}.jsonl").open("a") as log:
        tried: set[int] = set()
        while training.step < options.steps:
            step = training.step
            mark = folder / f"killed_at_{step}"
            if step in kills and rank == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            poison = step in spoilt and step not in tried
            tried.add(step)
            loss = training.take_step(poison)
            line: dict[str, Any] = {"step": step, "loss": loss, "pid": os.getpid()}
            if step % MEMORY_EVERY == 0:
                line["mib"] = resident_mib()
            log.write(json.dumps(line) + "\n")
            log.flush()
            if loss is not None and training.step % options.every == 0:
                training.save()
                if options.disturbed:
                    training.tell(folder)
                    training.make()
        if training.step % options.every:
            training.tell(folder)
    dist.barrier()
    del training
    dist.destroy_process_group()


def resident_mib() -> float:
    """Return this process's resident memory; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def run(options: argparse.Namespace, folder: Path, disturbed: bool) -> float:
    """Run one training under the launcher; return its seconds."""
    command = [sys.executable, "-m", "magi_train.cli", "run", "--nproc", str(RANKS)]
    command += ["--no-preflight", "--max-restarts", str(options.kills), "-m", "benchmarks.soak"]
    command += ["--steps", str(options.steps), "--every", str(options.every)]
    command += ["--seed", str(options.seed), "--kills", str(options.kills)]
    command += ["--folder", str(folder), *(["--disturbed"] if disturbed else [])]
    began = time.monotonic()
    with (folder / f"output_{int(disturbed)}").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    if done.returncode:
        text = (folder / f"output_{int(disturbed)}").read_text()
        raise RuntimeError(f"the {'disturbed' if disturbed else 'plain'} run ended with "
                           f"{done.returncode}: {text[-3000:]}")  # fmt: skip
    return time.monotonic() - began


def lines_of(folder: Path, disturbed: bool, rank: int) -> list[dict[str, Any]]:
    """Return what a rank wrote, in order; a killed process may have left half a line."""
    found = []
    for text in (folder / f"log_{int(disturbed)}_{rank}.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def smooth(lines: list[dict[str, Any]]) -> list[float]:
    """Return means of WINDOW steps; of a step taken again, the last counts."""
    last = {line["step"]: line["loss"] for line in lines if line["loss"] is not None}
    losses = [last[step] for step in sorted(last)]
    return [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]


def growth(lines: list[dict[str, Any]], every: int) -> list[dict[str, float]]:
    """Return, for each stretch between checkpoints: memory half-way, at its end, and the ratio."""
    stretches: dict[tuple[int, int], list[float]] = {}
    for line in lines:
        if "mib" in line:
            stretches.setdefault((line["pid"], line["step"] // every), []).append(line["mib"])
    return [
        {"pid": pid, "half_mib": mib[len(mib) // 2], "end_mib": mib[-1],
         "ratio": round(mib[-1] / mib[len(mib) // 2], 4)}
        for (pid, _), mib in stretches.items() if len(mib) >= 4
    ]  # fmt: skip


def per_resume(stretches: list[dict[str, float]]) -> float | None:
    """Return the median growth from the end of a stretch to the end of the next, in MiB."""
    pairs = itertools.pairwise(stretches)
    steps = [b["end_mib"] - a["end_mib"] for a, b in pairs if a["pid"] == b["pid"]]
    return round(statistics.median(steps), 1) if steps else None


def judge(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare what the two runs wrote."""
    plain, disturbed = (smooth(lines_of(folder, each, 0)) for each in (False, True))
    pairs = list(zip(plain, disturbed, strict=False))
    apart = [abs(a - b) / a for a, b in pairs]
    mine = lines_of(folder, True, 0)
    memory = {
        str(rank): growth(lines_of(folder, True, rank), options.every) for rank in range(RANKS)
    }
    ratios = [each["ratio"] for rank in memory.values() for each in rank]
    figures: dict[str, Any] = {
        "steps": options.steps,
        "steps_written": len({line["step"] for line in mine if line["loss"] is not None}),
        "skipped": sum(line["loss"] is None for line in mine),
        "killed": len(list(folder.glob("killed_at_*"))),
        "processes_of_rank_0": len({line["pid"] for line in mine}),
        "loss_plain": plain,
        "loss_disturbed": disturbed,
        "worst_difference": max(apart),
        "tolerance": TOLERANCE,
        "memory": memory,
        "worst_growth": max(ratios, default=None),
        "mib_per_resume": per_resume(memory["0"]),
        "report": (folder / "report.txt").read_text().splitlines(),
    }
    figures["holds"] = {
        "losses": len(plain) == len(disturbed) and max(apart) < TOLERANCE,
        "all steps": figures["steps_written"] == options.steps,
        "all kills survived": figures["killed"] == options.kills,
        "memory flat": bool(ratios) and max(ratios) <= FLAT,
    }
    return figures


def main() -> int:
    """Run both, compare, write JSON; return 1 if something does not hold."""
    parser = records.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps what the runs write")
    parser.add_argument("--disturbed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        worker(options)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        seconds = {name: run(options, folder, disturbed=name == "disturbed")
                   for name in ("plain", "disturbed")}  # fmt: skip
        figures = judge(options, folder)
    records.save("soak", options, seconds=seconds, **figures)
    shown = {k: v for k, v in figures.items() if not k.startswith(("loss_", "report"))}
    print(json.dumps(shown | {"seconds": seconds}, indent=1))
    return 0 if all(figures["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
