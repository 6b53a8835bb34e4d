"""The tables of docs/results.md, in one command: those that need GPUs, or a part of them on a CPU.

    python -m benchmarks.all --list
    python -m benchmarks.all --minutes 60
    python -m benchmarks.all inference_bert memory_27 --minutes 9 --folder /tmp/records
    python -m benchmarks.all --cpu

A task is one command, which can be run by itself; `--list` prints them. Tasks start in the order of
the list as soon as the GPUs that they need are free, each on GPUs of its own, so two GPUs run two
tasks of one. A task that is not expected to end in time is not started, and says so; one that is
cut keeps the rows that it had. With --cpu toys run, one after the other, on a host that should have
nothing else to do; only their ratios count. They measure no memory, which tests/memory traces.

Records go to the folder as DATE_TASK_NGPU.json or DATE_TASK_cpu.json, those of all tests as
DATE_gpu_tests_NGPU.json, and what tasks print to DATE_TASK.log beside them. The status is 1 if a
task failed or was cut.
"""

import argparse
import datetime
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from magi_train.integrations.ranks import stop

TESTS = "pytest -q -p no:cacheprovider"


@dataclass(frozen=True)
class Task:
    """A command.

    Attributes:
        name: Of its record.
        command: What follows `python -m`.
        gpus: How many it needs; 0 for the CPU alone.
        seconds: How long it takes on H200s, about; on a CPU, on two cores.
    """

    name: str
    command: str
    gpus: int
    seconds: int

    @property
    def is_tests(self) -> bool:
        """Whether pytest runs it, which writes no record of ours."""
        return self.command.startswith(TESTS)

    @property
    def places(self) -> int:
        """How many of a pool's places it takes: GPUs, or the one that a CPU is."""
        return self.gpus or 1

    @property
    def needs(self) -> str:
        """What it takes, for people."""
        return f"{self.gpus} GPU(s)" if self.gpus else "the CPU"

    @property
    def where(self) -> str:
        """End of its record's name."""
        return f"{self.gpus}gpu" if self.gpus else "cpu"


def _train(case: str, variants: str, seconds: int, more: str = "") -> str:
    command = f"benchmarks.train_step --case {case} --cold-only --seconds {seconds} {more}"
    return f"{command} --variants {variants}"


TASKS = (
    Task("scaling", "benchmarks.scaling --gpus 2 1 --no-large --seconds 150", 2, 265),
    Task("convergence", "torch.distributed.run --standalone --nproc-per-node 2 -m "
         "benchmarks.convergence", 2, 900),
    *(
        Task(f"train_step_{case}", _train(case, variants, 150, "--kernels"), 1, seconds)
        for case, variants, seconds in (
            ("llama-1b", "magi fold-masks+compile block-compile liger+block-compile", 250),
            ("gpt2", "magi fold-masks+compile block-compile", 180),
            ("bert", "magi fold-masks+compile block-compile", 180),
            ("vit-l", "magi block-compile compile", 190),
            ("resnet50", "magi channels-last+compile compile", 180),
        )
    ),
    Task("train_step_fp8", _train(
        "llama-1b", "magi:precision=fp8 torchao+block-compile torchao+compile", 150), 1, 200),
    *(
        Task(f"memory_{budget}", f"benchmarks.memory --cold-only --variants "
             f"magi:memory_budget_gib={settings} fold-masks+compile", 1, 270)
        for budget, settings in (
            ("35", "35"), ("27", "27"), ("27_offload", "27,offload_activations=true"),
        )
    ),
    *(
        Task(f"inference_{case}", f"benchmarks.inference --cases {case} --timeout 170 --budget "
             f"{budget} {more}", 1, budget + 5)
        for case, budget, more in (
            ("bert", 500, ""), ("vit-l", 500, ""), ("resnet50", 500, ""),
            ("llama-1b", 400, "--prompt 128 --tokens 256 --cache 2048"),
        )
    ),
    *(
        Task(f"largest_batch_{case}", f"benchmarks.largest_batch --cases {case}", 1, 480)
        for case in ("bert", "vit-l", "gpt2", "resnet50", "llama-1b")
    ),
    Task("zoo_timm", "benchmarks.zoo timm --device cuda --timeout 100", 1, 900),
    Task("fp8_training", "benchmarks.fp8_training", 1, 300),
    Task("cross_entropy", "benchmarks.cross_entropy", 1, 60),
    Task("generated_code", "benchmarks.generated_code", 1, 60),
    Task("optimizer_step", "benchmarks.optimizer_step", 1, 60),
    Task("fp8_cast", "benchmarks.fp8_cast", 1, 60),
    Task("varlen_attention", "benchmarks.varlen_attention", 1, 60),
    *(
        Task(f"gpu_tests_{name}", f"{TESTS} tests/gpu/test_{name}.py", gpus, seconds)
        for name, gpus, seconds in (
            ("loss", 1, 250), ("offload", 1, 120), ("memory_budget", 1, 250), ("fits", 1, 115),
            ("export", 1, 240), ("cuda_graphs", 1, 90), ("bench", 1, 120), ("shadow", 1, 50),
            ("fp8", 1, 40), ("varlen", 1, 60), ("optimizer", 1, 25), ("padding", 1, 70),
            ("record", 1, 10), ("lightning", 2, 60), ("devices", 2, 250), ("copy_engines", 2, 80),
            ("sharded_optimizer", 2, 200), ("fully_shard", 2, 150),
            ("smoke", 2, 300),
        )
    ),
)  # fmt: skip
BENCH = "magi_train.cli bench --case toy --autocast none --cold-only --peers eager compile"
CPU_TASKS = (
    Task("training", f"{BENCH} block-compile magi", 0, 240),
    Task("training_2_ranks", f"{BENCH} fsdp2 magi --nproc 2", 0, 240),
    Task("communication", "benchmarks.communication --loss-steps 300 --steps 21", 0, 700),
    Task("inference", "benchmarks.inference --toy", 0, 300),
    Task("zoo", "benchmarks.zoo causal/llama causal/mixtral causal/mamba masked/bert pair/t5 "
         "image/vit image/resnet sound/wav2vec2", 0, 300),
    Task("soak", "benchmarks.soak --steps 300 --every 100 --kills 1", 0, 300),
)  # fmt: skip


class Pool:
    """The GPUs that are free, and when it is too late to begin.

    Args:
        gpus: Their names in CUDA_VISIBLE_DEVICES; "" for the CPU.
        end: `time.monotonic()` at which all must be over.
    """

    def __init__(self, gpus: Sequence[str], end: float) -> None:
        self._free, self._all, self.end = list(gpus), len(gpus), end
        self._changed = threading.Condition()

    def take(self, task: Task) -> list[str]:
        """Wait for a task's GPUs; return them, none if there are too few or it is too late."""
        with self._changed:
            while task.places <= self._all and self.left() > task.seconds:
                if len(self._free) >= task.places:
                    taken, self._free = self._free[: task.places], self._free[task.places :]
                    return taken
                self._changed.wait(timeout=1)
        return []

    def give(self, gpus: Sequence[str]) -> None:
        """Give GPUs back."""
        with self._changed:
            self._free = sorted([*self._free, *gpus])
            self._changed.notify_all()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()


def run(
    task: Task, gpus: Sequence[str], seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Run a task on some GPUs; return how it ended."""
    log = options.folder / f"{today()}_{task.name}.log"
    words = [sys.executable, "-m", *shlex.split(task.command)]
    if not task.is_tests:
        record = options.folder / f"{today()}_{task.name}_{task.where}.json"
        words += ["--commit", options.commit, "--output", str(record)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            failed = f"status {status}" if status else ""
        except subprocess.TimeoutExpired:
            failed = f"cut after {seconds:.0f} s"
        finally:
            stop(process)
    took = round(time.monotonic() - start, 1)
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    last = lines[-1].strip("= ")
    return {"test": task.command, "seconds": took, "outcome": last, "failed": failed}


def run_all(
    tasks: Sequence[Task], pool: Pool, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Run tasks in their order, side by side where GPUs allow; return how each ended."""
    ended: dict[str, dict[str, Any]] = {}

    def one(task: Task, gpus: list[str]) -> None:
        try:
            row = ended[task.name] = run(task, gpus, min(2.0 * task.seconds, pool.left()), options)
        finally:
            pool.give(gpus)
        print(f"{task.name}: {row['failed'] or 'done'}, {row['seconds']} s", flush=True)

    threads = []
    for task in tasks:
        if gpus := pool.take(task):
            threads.append(threading.Thread(target=one, args=(task, gpus)))
            threads[-1].start()
        else:
            print(f"{task.name}: not started, needs {task.needs} for {task.seconds} s")
    for thread in threads:
        thread.join()
    return ended


def today() -> str:
    """Return the date that names records."""
    return str(datetime.datetime.now(datetime.UTC).date())


def main() -> None:
    """Run what was asked for."""
    parser = records.parser_of(__doc__)
    parser.add_argument("tasks", nargs="*", help="names of tasks; all by default")
    parser.add_argument("--cpu", action="store_true", help="toys, without a GPU")
    parser.add_argument("--minutes", type=float, default=120.0, help="for all (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--list", action="store_true", help="print the tasks, and run none")
    options = parser.parse_args()
    listed = CPU_TASKS if options.cpu else TASKS
    known = {task.name: task for task in listed}
    if unknown := set(options.tasks) - known.keys():
        parser.error(f"no task is called {', '.join(sorted(unknown))}; --list names them")
    tasks = [known[name] for name in options.tasks] or list(listed)
    if options.list:
        for task in tasks:
            print(f"{task.name:28} {task.needs} {task.seconds:4} s  python -m {task.command}")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    gpus = [""] if options.cpu else records.gpus()
    pool = Pool(gpus, time.monotonic() + 60 * options.minutes)
    ended = run_all(tasks, pool, options)
    if tests := [row for name, row in ended.items() if known[name].is_tests]:
        options.output = options.folder / f"{today()}_gpu_tests_{len(gpus)}gpu.json"
        records.save("gpu_tests", options, cases=tests)
    if failed := {name: row["failed"] for name, row in ended.items() if row["failed"]}:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
