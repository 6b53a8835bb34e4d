"""What `magi bench --mine` starts on each rank: the user's script, with its steps looked at.

Usage: python -m magi_train.integrations.probe SPEC.json SCRIPT [ARGS ...]

A step ends where the first optimizer that steps has stepped (PyTorch's hook for all optimizers);
its loss is what backward was called on since the step before. Nothing is synchronised while steps
run: on CUDA an event marks each end. After enough steps this process ends, and skips the script's
own end.
"""

import itertools
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from magi_train.core.errors import MagiError
from magi_train.core.report import Report
from magi_train.integrations.bootstrap import run_script

if TYPE_CHECKING:  # a run without us shall not pay for our imports
    from magi_train.integrations.auto import Attachment
    from magi_train.integrations.script_peer import ScriptPeer
    from magi_train.runtime import Runtime

GIB = 2**30
LEAST_STEPS = 3


CHILD_SECONDS = 5.0
"""How long a process of the script may take to end."""


@dataclass(frozen=True)
class Spec:
    """What is to be measured.

    Attributes:
        folder: Where `rank_N.json` goes.
        peer: What the script is to train through: "" (as it is), "magi", or a peer of its module.
        warm_up: Steps before those that are timed.
        steps: Steps that are timed.
        began: time.time() when the launcher was started.
        ranks: How many were started.
    """

    folder: str
    peer: str
    warm_up: int
    steps: int
    began: float
    ranks: int


@dataclass
class Seen:
    """What one rank saw.

    Attributes:
        seconds: Of each timed step.
        losses: Of each step, warm-up included; None where backward met no single number.
        peak_gib: Of device memory during timed steps, or of the process on the CPU.
        start_up_seconds: From the launcher's start to the end of warm-up, less the warm-up's steps
            at their later speed.
        device: "cuda" or "cpu".
        way: What the script trains with, a key of auto.WAYS.
        how: The line that does for good what is tried here.
        tier: Of the report; "" without us.
        reason: Why not a higher tier.
        error: What is wrong with the script for this purpose.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    peak_gib: float = 0.0
    start_up_seconds: float = 0.0
    device: str = ""
    way: str = ""
    how: str = ""
    tier: str = ""
    reason: str = ""
    error: str = ""


class Probe:
    """Looks at a script's steps and ends it after enough of them."""

    def __init__(
        self, spec: Spec, attachment: "Attachment | None", edited: "ScriptPeer | None"
    ) -> None:
        self.spec, self.attachment, self.edited, self.seen = spec, attachment, edited, Seen()
        self._owner: int | None = None
        self._marks: list[Any] = []  # an end of a step each, the first is that of warm-up
        self._losses: list[Tensor | None] = []
        self._since: list[Tensor | None] = []
        self._warm_at = 0.0
        self._report: Report | None = None  # kept: the script's end takes its runtime away
        self._real_backward: Callable[..., None] = torch.autograd.backward
        torch.autograd.backward = self._backward  # type: ignore[assignment]  # Tensor.backward too
        register_optimizer_step_post_hook(self._stepped)

    def _backward(self, tensors: Any, *args: Any, **options: Any) -> None:
        one = isinstance(tensors, Tensor) and tensors.numel() == 1
        self._since.append(tensors.detach().clone() if one else None)
        self._real_backward(tensors, *args, **options)

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if self._owner is None:
            self._begin(optimizer)
        if id(optimizer) != self._owner:
            return
        if self.attachment is not None and self._report is None:
            self._report = next((each.report for each in reversed(_runtimes())), None)
        losses, self._since = self._since, []
        known = [each for each in losses if each is not None]
        whole = known and len(known) == len(losses)
        self._losses.append(torch.stack([t.reshape(()) for t in known]).mean() if whole else None)
        count = len(self._losses)
        if count == self.spec.warm_up:
            self._warmed_up()
        if count >= self.spec.warm_up:
            self._marks.append(self._mark())
        if count == self.spec.warm_up + self.spec.steps:
            self.finish()
            _end(0)

    def _begin(self, optimizer: Optimizer) -> None:
        self._owner = id(optimizer)
        first = next((p for g in optimizer.param_groups for p in g["params"]), None)
        self.seen.device = "cpu" if first is None else first.device.type
        dist = torch.distributed
        joined = dist.is_available() and dist.is_initialized()
        ranks = dist.get_world_size() if joined else 1
        if ranks != self.spec.ranks:
            self.fail(
                f"the script trains on {ranks} rank(s) and was started as {self.spec.ranks}; give "
                "--nproc with the number of ranks, and let the script start none itself"
            )
        if self.spec.peer != "magi" and _runtimes():
            self.fail("the script trains through magi_train already; bench one that does not")

    def fail(self, reason: str) -> None:
        """Write why this cannot be measured, and end the process."""
        self.seen.error = reason
        self._write()
        sys.stderr.write(f"magi bench: {reason}\n")
        _end(3)

    def _warmed_up(self) -> None:
        if self.seen.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._warm_at = time.time()

    def _mark(self) -> Any:
        if self.seen.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        """Write what was seen; all ranks come here after the same step."""
        seen, marks = self.seen, self._marks
        pairs = list(itertools.pairwise(marks))
        if seen.device == "cuda":
            torch.cuda.synchronize()
            seen.seconds = [a.elapsed_time(b) / 1e3 for a, b in pairs]
            seen.peak_gib = torch.cuda.max_memory_allocated() / GIB
        else:
            seen.seconds = [b - a for a, b in pairs]
            unit = 1 if sys.platform == "darwin" else 1024
            seen.peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
        seen.losses = [None if each is None else float(each) for each in self._losses]
        if len(seen.seconds) < LEAST_STEPS:
            self._explain_too_few()
        else:
            middle = sorted(seen.seconds)[len(seen.seconds) // 2]
            seen.start_up_seconds = self._warm_at - self.spec.began - self.spec.warm_up * middle
        self._tell_how()
        self._write()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # or a rank ends while others still read from it

    def _explain_too_few(self) -> None:
        count = len(self._losses)
        if not count:
            self.seen.error = (
                "there is no step to measure: the script ended and no torch optimizer had stepped"
            )
        else:
            self.seen.error = (
                f"the script took {count} step(s); --warm-up {self.spec.warm_up} and at least "
                f"{LEAST_STEPS} more are needed: train longer, or lower --warm-up"
            )

    def _tell_how(self) -> None:
        if self.edited is not None and not self.edited.applied:
            self.seen.error = self.seen.error or (
                "there is no module to edit: the script calls none that holds all weights of its "
                "optimizer"
            )
        if self.attachment is None or self.seen.error:
            return
        report = self._report
        if report is None or not report.tier:
            self.seen.error = (
                "nothing was captured: the script calls no module that holds all weights of its "
                "optimizer, and uses no DistributedDataParallel, Lightning or transformers Trainer"
            )
            return
        self.seen.way, self.seen.how = self.attachment.way, self.attachment.how
        self.seen.tier, self.seen.reason = report.tier, report.reason

    def _write(self) -> None:
        rank = os.environ.get("RANK", "0")
        path = Path(self.spec.folder) / f"rank_{rank}.json"
        path.write_text(json.dumps(asdict(self.seen)))


def _end(status: int) -> NoReturn:
    """End the process, and those that the script has started, at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(CHILD_SECONDS)
        if child.is_alive():
            child.kill()
    os._exit(status)


def _runtimes() -> "list[Runtime]":
    loaded = sys.modules.get("magi_train.runtime")
    return loaded.live_runtimes() if loaded else []


def main() -> None:
    """Seed, look, and run the script."""
    path, script, *arguments = sys.argv[1:]
    spec = Spec(**json.loads(Path(path).read_text()))
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    attachment = edited = None
    if spec.peer == "magi":
        from magi_train.integrations.auto import Attachment

        attachment = Attachment()
    elif spec.peer:
        from magi_train.integrations.script_peer import ScriptPeer

        edited = ScriptPeer(spec.peer)
    probe = Probe(spec, attachment, edited)
    try:
        run_script(script, arguments)
    except MagiError as error:
        probe.fail(str(error))
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
    probe.finish()


if __name__ == "__main__":
    main()
