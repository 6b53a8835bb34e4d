"""Steps: how long each took, its loss, throughput, memory and energy; costs no device sync.

A step is one synchronising call of the captured function: it lasts from there to the next. Nothing
waits for the device: the host runs ahead of it by a bounded queue, so the host's time between calls
is the device's step time once the queue is full. A loss on a device is copied to pinned memory
behind the work that makes it, and read when its event has passed. Memory is what the allocator
already counts. Energy is the counter of rank 0's own GPU, read with the file's writing.

Bounded: a series that is full is halved, and a point means twice as many steps from then on. The
first step, which compiles, is kept apart. Every rank keeps a record; rank 0 writes it, with the
report, every WRITE_SECONDS and at the end, in one rename: a killed job leaves its last file.
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MOST_POINTS = 512
LOOK_SECONDS, WRITE_SECONDS = 0.5, 10.0
LOSS_SECONDS = 0.05
"""A loss on a device is copied at most so often."""
IN_FLIGHT = 64
"""Losses that may be on their way to the host."""
PATIENCE_SECONDS = 0.5
"""How long the end of a run waits for the last losses."""
GIB = 2**30


@dataclass
class Steps:
    """What is known about the steps of a run, of rank 0 where a report is read from a file.

    Attributes:
        count: Steps that ended, the first one included.
        first_seconds: Of the first step, which compiles.
        stride: Steps that a point of `seconds` stands for.
        seconds: Mean time of a step, one number a point, from the second step on.
        longest: The longest step of each point.
        samples: Leading dimension of the inputs, summed from the second step on; 0 if unknown.
        tokens: Elements of token ids `[batch, length]`, summed likewise; 0 if there are none.
        loss: [step, value]; the step counts from 0.
        memory_gib: [step, GiB]: the peak so far.
        memory_of: What `memory_gib` counts.
        at_forward_gib: Allocated on the device before a forward, and behind it.
        joules: Energy of this rank's GPU since the second step; None where nothing counts it.
        joules_samples: Samples of that time.
        resident_mib: {what is there all the time: MiB}.
    """

    count: int = 0
    first_seconds: float = 0.0
    stride: int = 1
    seconds: list[float] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    loss: list[list[float]] = field(default_factory=list)
    memory_gib: list[list[float]] = field(default_factory=list)
    memory_of: str = ""
    at_forward_gib: list[float] = field(default_factory=list)
    joules: float | None = None
    joules_samples: int = 0
    resident_mib: dict[str, float] = field(default_factory=dict)

    @property
    def timed(self) -> int:
        """Return how many steps `samples` and `tokens` were summed over."""
        return max(0, self.count - 1)

    def typical_seconds(self) -> float | None:
        """Return the median of the points, None before there is one."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2] if ordered else None


class Recorder:
    """Fills a `Steps`.

    Args:
        steps: Of the report.
        device_type: Where the model lies.
        clock: Returns seconds.

    Attributes:
        write: Called with nothing when the file is due; None for no file.
        tell: Called at most twice a second with the steps: progress.
        joules: Returns the energy counter of this rank's GPU; None without one.
        resident: Returns what is there all the time, in MiB.
        last_seconds: Of the step that ended last; None before.
    """

    last_seconds: float | None = None

    def __init__(
        self, steps: Steps, device_type: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.steps, self._cuda, self._clock = steps, device_type == "cuda", clock
        self.write: Callable[[], None] | None = None
        self.tell: Callable[[Steps], None] | None = None
        self.joules: Callable[[], float] | None = None
        self.resident: Callable[[], dict[str, float]] | None = None
        self._owner: int | None = None
        self._began: float | None = None
        self._ends = False  # the call before this one ended a step
        self._samples = self._tokens = 0
        self._sum = self._most = 0.0
        self._in_point = 0
        self._joules_at: tuple[float, int] | None = None
        self._next_look = self._next_loss = 0.0
        self._next_write = clock() + WRITE_SECONDS
        self._loss_stride, self._losses = 1, _Losses()
        self._before: int | None = None  # bytes, of the call that a look came before
        self._closed = False

    def begin(self, owner: int, ends_step: bool, args: Any, kwargs: Any) -> None:
        """A call of a captured function begins.

        Args:
            owner: Which function; the first one that is called counts, others are left out.
            ends_step: Whether its backward synchronises.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        if self._owner is None:
            self._owner = owner
        if owner != self._owner:
            return
        now = self._clock()
        if self._began is None:
            self._began = now
        elif self._ends:
            self._step_ended(now - self._began)
            self._began = now
            if now >= self._next_look:
                self._look(now)
        self._ends = ends_step
        first = first_tensor((args, kwargs))
        if first is not None and first.dim() > 0:
            self._samples += first.shape[0]
            is_tokens = first.dim() == 2 and not first.dtype.is_floating_point
            self._tokens += first.numel() if is_tokens else 0

    def end(self, owner: int, output: Any) -> None:
        """That call returned `output`."""
        if owner != self._owner or self._began is None:
            return
        if self._cuda and torch.cuda.is_current_stream_capturing():  # no event may be asked then
            return
        if self._before is not None:
            allocated = self._before, torch.cuda.memory_allocated()
            self.steps.at_forward_gib = [round(each / GIB, 6) for each in allocated]
            self._before = None
        step, now = self.steps.count, self._clock()
        if step % self._loss_stride or (self._cuda and now < self._next_loss):
            return
        self._next_loss = now + LOSS_SECONDS
        loss = loss_in(output)
        if loss is not None:
            self._losses.put(step, loss)
            self._collect()

    def figures(self) -> dict[str, float]:
        """Return what a logger may show of the step that ended last; {} before."""
        if self.last_seconds is None:
            return {}
        found = {"magi/step_seconds": self.last_seconds}
        if self.steps.memory_gib:
            found["magi/peak_memory_gib"] = self.steps.memory_gib[-1][1]
        return found

    def _step_ended(self, seconds: float) -> None:
        steps = self.steps
        steps.count += 1
        self.last_seconds = seconds
        if steps.count == 1:
            steps.first_seconds = round(seconds, 6)
        else:
            steps.samples += self._samples
            steps.tokens += self._tokens
            self._sum, self._most = self._sum + seconds, max(self._most, seconds)
            self._in_point += 1
            if self._in_point == steps.stride:
                self._add_point()
        self._samples = self._tokens = 0

    def _add_point(self) -> None:
        steps = self.steps
        steps.seconds.append(round(self._sum / steps.stride, 6))
        steps.longest.append(round(self._most, 6))
        self._sum, self._most, self._in_point = 0.0, 0.0, 0
        if len(steps.seconds) >= MOST_POINTS:
            pairs = range(0, MOST_POINTS, 2)
            steps.seconds = [round(sum(steps.seconds[i : i + 2]) / 2, 6) for i in pairs]
            steps.longest = [max(steps.longest[i : i + 2]) for i in pairs]
            steps.stride *= 2

    def _look(self, now: float) -> None:
        """Between two steps: what is cheap, and now and then what is not."""
        self._next_look = now + LOOK_SECONDS
        self._take_memory()
        self._before = torch.cuda.memory_allocated() if self._cuda else None
        if self._joules_at is None:
            joules = self._read_joules()
            self._joules_at = None if joules is None else (joules, self.steps.samples)
        if self.tell is not None:
            self.tell(self.steps)
        if now >= self._next_write:
            self.flush()
            self._next_write = self._clock() + WRITE_SECONDS

    def _read_joules(self) -> float | None:
        try:
            return None if self.joules is None else self.joules()
        except Exception as error:  # noqa: BLE001  a driver's, of several kinds: training goes on
            logger.debug("energy is counted no more: %s", error)
            self.joules = None
            return None

    def _take_memory(self) -> None:
        steps = self.steps
        if self._cuda:
            steps.memory_of = "allocated on the device"
            gib = torch.cuda.max_memory_allocated() / GIB
        elif resource is None:
            return
        else:
            steps.memory_of = "resident in the process, on the host"
            unit = 1 if sys.platform == "darwin" else 1024
            gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
        steps.memory_gib.append([steps.count, round(gib, 6)])
        if len(steps.memory_gib) > MOST_POINTS:
            del steps.memory_gib[1::2]

    def _collect(self, patience: float = 0.0) -> None:
        for step, value in self._losses.take(patience):
            self.steps.loss.append([step, value])
        if len(self.steps.loss) > MOST_POINTS:
            del self.steps.loss[1::2]
            self._loss_stride *= 2

    def flush(self) -> None:
        """Bring the steps up to date, and write them if they are to be written."""
        if self._closed:
            return
        self._collect()
        if self.steps.count:
            self._take_memory()
        now = self._read_joules() if self._joules_at is not None else None
        if self._joules_at is not None and now is not None:
            joules, samples = self._joules_at
            self.steps.joules = round(now - joules, 3)
            self.steps.joules_samples = self.steps.samples - samples
        if self.resident is not None and self.steps.count:
            self.steps.resident_mib |= self.resident()  # what is gone by now was there
        if self.write is not None:
            try:
                self.write()
            except OSError as error:
                self.write = None
                logger.warning("magi-train: the run's record is written no more: %s", error)

    def close(self) -> None:
        """The run ends: the last step, without a successor to end it, is left out."""
        if not self._closed:
            self._collect(PATIENCE_SECONDS)
            self.flush()
        self._closed = True


class _Losses:
    """Losses on their way to the host."""

    def __init__(self) -> None:
        self._ready: list[tuple[int, float]] = []
        self._pinned: Tensor | None = None
        self._flying: list[tuple[int, int, Any]] = []  # step, slot, event
        self._next = 0

    @torch.no_grad()
    def put(self, step: int, loss: Tensor) -> None:
        """Take a loss of one element; one too many in flight is left out."""
        if loss.device.type == "cpu":
            self._ready.append((step, float(loss)))
            return
        if loss.device.type != "cuda" or len(self._flying) >= IN_FLIGHT:
            return
        if self._pinned is None:
            self._pinned = torch.empty(IN_FLIGHT, dtype=torch.float32, pin_memory=True)
        slot, self._next = self._next, (self._next + 1) % IN_FLIGHT
        self._pinned[slot].copy_(loss.detach().reshape(()), non_blocking=True)
        event = torch.cuda.current_stream(loss.device).record_event()
        self._flying.append((step, slot, event))

    def take(self, patience: float = 0.0) -> list[tuple[int, float]]:
        """Return the losses that have arrived, in order, within so many seconds.

        A device that hangs or has failed never delivers: nothing may wait for it for long.
        """
        found, self._ready = self._ready, []
        until = time.perf_counter() + patience
        while self._flying:
            step, slot, event = self._flying[0]
            try:
                arrived = event.query()
            except RuntimeError:  # the device has failed, which others report
                self._flying.clear()
                break
            if arrived:
                assert self._pinned is not None, "something flies"
                found.append((step, float(self._pinned[slot])))
                self._flying.pop(0)
            elif time.perf_counter() >= until:
                break
            else:
                time.sleep(0.001)
        return found


def loss_in(output: Any) -> Tensor | None:
    """Return the loss among what a step returned: a tensor of one element, by place or name."""
    if isinstance(output, dict):
        output = output.get("loss")
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    elif not isinstance(output, Tensor):
        output = getattr(output, "loss", None)
    is_one = type(output) is Tensor and output.numel() == 1 and output.dtype.is_floating_point
    return output if is_one else None


def first_tensor(value: Any, depth: int = 4) -> Tensor | None:
    """Return the first tensor among arguments; looks into tuples, lists and mappings only."""
    if isinstance(value, Tensor):
        return value
    if depth == 0:
        return None
    if isinstance(value, tuple | list):
        inner: Any = value[:8]
    elif hasattr(value, "values") and hasattr(value, "keys"):
        inner = value.values() if not isinstance(value, torch.nn.Module) else ()
    else:
        return None
    for each in inner:
        found = first_tensor(each, depth - 1)
        if found is not None:
            return found
    return None
