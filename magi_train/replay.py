"""Replay: which calls of a compiled graph run as CUDA graphs. Wrong is never an option, slower is.

A `Replayer` stands where a compiled callable stood. Its first calls run plainly while it watches
what the call writes and which outputs get gradients; then it makes a `Recording` and replays it. A
call runs plainly instead, which is always right, whenever a replay would overwrite what somebody
holds: an earlier forward waits for its backward, or something handed out is still alive (logits in
a variable, gradients that accumulate). The latter is copied out from then on, so that it happens
once: of the gradients of an accumulated step only the first are copied, later ones are added.

All recordings of a model share a `ReplayMemory`: one pool, one watch over what is handed out.
Forms of one step (with padding, without) overwrite each other's activations as plain steps do.

Whether replaying pays is measured ("auto"): the device's time from one call to the next, over TIMED
plain calls and, later, over TIMED replayed ones, so that never both kinds of memory are held for
long. What gains less than GAIN is dropped, and its memory given back.
"""

import itertools
import statistics
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from magi_train.core import compat
from magi_train.core.device_graphs import DeviceGraphs
from magi_train.core.report import PassRow, Report
from magi_train.core.slots import Layout, RefusedError, Slot, refusal
from magi_train.fusion.ahead import wait_for_all
from magi_train.recording import Call, Recording

WARM, TIMED = 2, 4
GAIN = 0.01
"""Part of a step's time that replaying must save to be worth its memory."""
MAX_RECORDINGS = 3
"""Of one graph; parameters that move more often than this are not chased."""
PATIENCE = 40
"""Calls after a recording in which TIMED pairs of replays must have come."""

HELD = "what is handed out is held for long"

REPLAYS = "cuda_graph_replays"
"""Name of the count in the report."""

_capturing = threading.Lock()


class ReplayMemory:
    """What the recordings of one model share.

    Args:
        device: That records.
        report: Gets a note on what has to be copied out.
    """

    def __init__(self, device: DeviceGraphs, report: Report) -> None:
        self.device, self.report = device, report
        self._recordings: list[Recording] = []
        self._pending: Callable[[], Call | None] = lambda: None

    def bytes(self) -> int:
        """Return the memory of all recordings."""
        return sum(recording.bytes for recording in self._recordings)

    def add(self, recording: Recording) -> None:
        """Watch over what `recording` hands out."""
        self._recordings.append(recording)

    def drop(self, recording: Recording) -> None:
        """Give its memory back, once nothing that it handed out is alive.

        While something is, all recordings go: another one's replay could overwrite it, and from
        now on nobody would look.
        """
        if self.pending() or any(slot.alive() for slot in recording.slots()):
            self.clear()
            return
        recording.dropped = True
        self._recordings.remove(recording)
        self.tidy()

    def tidy(self) -> None:
        """Leave a pool in which nothing is recorded; a failed capture may have begun one."""
        if not self._recordings:
            self.device.new_pool()

    def clear(self) -> None:
        """Drop all recordings."""
        for recording in self._recordings:
            recording.dropped = True
        self._recordings = []
        self.tidy()

    def began(self, call: Call) -> None:
        """Note the forward that must have its backward before the next replay."""
        self._pending = weakref.ref(call)

    def pending(self) -> bool:
        """Return whether a replayed forward still waits for its backward."""
        call = self._pending()
        return call is not None and not call.done

    def alive(self) -> bool:
        """Return whether a replay would overwrite what somebody holds; copy it from now on."""
        outputs = [slot for r in self._recordings for slot in r.outputs if _found(slot)]
        gradients = [r.gradients for r in self._recordings if any([_found(g) for g in r.gradients])]
        for slot in (*outputs, *(slot for row in gradients for slot in row)):
            if slot is not None:  # gradients are one set: copied together, added together
                slot.copied = True
        for found, what in ((outputs, "outputs"), (gradients, "gradients")):
            if found:
                self.report.note(
                    f"cuda_graphs: {what} that outlive their step are copied out of the graphs"
                )
        return bool(outputs or gradients)


def _found(slot: Slot | None) -> bool:
    if slot is None or not slot.alive():
        if slot is not None:
            slot.found = 0
        return False
    slot.found += 1
    return True


class Replayer:
    """Runs a compiled callable, replayed where that is right and pays.

    Args:
        compiled: Takes and returns tensors.
        stable: Positions of arguments that lie at one address: parameters, buffers, shadows.
        memory: Of the model.
        measure: Keep replaying only if it pays.
        ready: Whether the callable is the one that will go on being used.
        report: Gets the row "cuda_graphs", and counts replays.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        stable: frozenset[int],
        memory: ReplayMemory,
        *,
        measure: bool,
        ready: Callable[[], bool],
        report: Report,
    ) -> None:
        self.compiled = compiled
        self._stable, self._memory, self._device = stable, memory, memory.device
        self._ready, self._report = ready, report
        self._off, self._measuring, self._plain_ms = "", measure, 0.0
        self._plain_calls, self._since, self._made = 0, 0, 0
        self._marks: list[tuple[str, Any]] = []
        self._written: set[int] = set()
        self._tangents: dict[int, Layout] = {}
        self._retained: list[bool] = []
        self._copied: list[bool] = []  # of each slot of the recording before
        self.recording: Recording | None = None

    def __call__(self, args: Sequence[Any]) -> Any:
        """Run the callable."""
        if (
            self._off
            or not torch.is_grad_enabled()
            or compat.saved_tensors_are_hooked()
            or self._device.busy()
            or not self._ready()
        ):
            return self.compiled(*args)
        if self.recording is None:
            self._off = self._off or self._never(args)
            if self._off:
                return self._give_up(self._off, args)
            if not self._warm():
                return self._watched(args)
        return self._replayed(args)

    # -- before the recording --------------------------------------------------------------------

    def _never(self, args: Sequence[Any]) -> str:
        """Return why such a call is never replayed, "" if it may be."""
        if any(self._retained):
            return "backward(retain_graph=True) keeps what a replay overwrites"
        return refusal(args, self._stable, self._written, self._device.device)

    def _warm(self) -> bool:
        timed = TIMED + 1 if self._measuring and not self._plain_ms else 0
        return self._plain_calls >= WARM + timed and bool(self._tangents)

    def _watched(self, args: Sequence[Tensor]) -> Any:
        """Run plainly; learn what is written, and which outputs get gradients."""
        self._plain_calls += 1
        if self._measuring and self._plain_calls > WARM:
            self._mark("plain")
            del self._marks[: -TIMED - 1]
        before = [a._version for a in args]
        outputs = self.compiled(*args)
        self._written |= {i for i, a in enumerate(args) if a._version != before[i]}
        given = {id(a) for a in args}
        for i, x in enumerate(outputs):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in given:
                x.register_hook(partial(_note, self._tangents, self._retained, i))
        return outputs

    def _record(self, args: Sequence[Tensor]) -> str:
        """Make the recording; return why there is none, "" if there is."""
        if self._measuring and not self._plain_ms:
            self._mark("plain")
            self._plain_ms = statistics.median(self._times("plain"))
        self._marks = []
        self._made += 1
        wait_for_all()  # no other thread may allocate while a graph is captured
        if not _capturing.acquire(blocking=False):
            return "another thread was capturing a graph"
        try:
            self.recording = Recording(
                self.compiled, args, self._stable, sorted(self._written), self._tangents,
                self._device,
            )  # fmt: skip
            self._memory.add(self.recording)
            if self._copied:
                for copied, slot in zip(self._copied, self.recording.slots(), strict=True):
                    slot.copied |= copied
        except RefusedError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  CUDA's, torch's, the lowering's: all cost the gain
            line = (str(error).strip().splitlines() or [""])[0]
            return f"capture failed: {type(error).__name__}: {line}"
        finally:
            _capturing.release()
            self._memory.tidy()
        if not self._measuring and self._made == 1:
            self._note_row(replayed=True)
        return ""

    # -- with a recording ------------------------------------------------------------------------

    def _replayed(self, args: Sequence[Tensor]) -> Any:
        self._since += 1
        stream = self._device.stream() if self.recording is None else self.recording.stream
        if self._memory.pending() or stream != self._device.stream():
            return self._plainly(args)
        alive, why = self._memory.alive(), self._outdated(args)
        if alive and why != HELD:
            return self._plainly(args)
        if why:
            self._forget()
            full = self._made == MAX_RECORDINGS
            failed = f"{why}: recorded {self._made} times" if full else self._record(args)
            if failed:
                return self._give_up(failed, args)
        elif self._measuring:
            self._mark("replay")
            slow = self._verdict()
            if slow:
                return self._give_up(slow, args)
        assert self.recording is not None
        outputs, call = self.recording.run(args)
        self._memory.began(call)
        self._report.measured[REPLAYS] = self._report.measured.get(REPLAYS, 0) + 1
        return outputs

    def _outdated(self, args: Sequence[Tensor]) -> str:
        """Return why there must be a new recording, "" if there is a good one."""
        recording = self.recording
        if recording is None or recording.dropped:
            return "the memory was given back"
        if recording.renewals != self._device.renewals():
            return "another capture failed, which took the random numbers of the graphs before"
        if any(slot.found > 1 for slot in recording.slots()):
            return HELD
        return "parameters or buffers move" if recording.moved(args) else ""

    def _forget(self) -> None:
        """Drop the recording, before there is another one; keep what has to be copied."""
        if self.recording is None:
            return
        self._copied = [slot.copied for slot in self.recording.slots()]
        if not self.recording.dropped:
            self._memory.drop(self.recording)
        self.recording = None

    def _plainly(self, args: Sequence[Tensor]) -> Any:
        if self.recording is not None:
            held = self._memory.bytes()
            if self._device.room(held) < held:
                return self._give_up("no room for a plain call beside the graphs", args)
        if self._measuring:
            if self._since > PATIENCE:
                return self._give_up("hardly any call could be replayed", args)
            self._mark("other")
        return self.compiled(*args)

    def _give_up(self, why: str, args: Sequence[Any]) -> Any:
        """Never replay again."""
        self._off = why
        self._note_row(replayed=False, reason=why)
        self._forget()
        self._marks = []
        return self.compiled(*args)

    def close(self) -> None:
        """Forget the recording; later calls run plainly."""
        self._off, self.recording, self._marks = "closed", None, []

    # -- measuring -------------------------------------------------------------------------------

    def _mark(self, kind: str) -> None:
        self._marks.append((kind, self._device.mark()))

    def _times(self, kind: str) -> list[float]:
        """Return the times between neighbouring calls of one kind."""
        gaps = self._device.milliseconds([mark for _, mark in self._marks])
        kinds = [k for k, _ in self._marks]
        pairs = zip(itertools.pairwise(kinds), gaps, strict=True)
        return [gap for pair, gap in pairs if pair == (kind, kind)]

    def _verdict(self) -> str:
        """Return why replaying ends here; "" to go on, measuring if there is too little yet."""
        kinds = [kind for kind, _ in self._marks]
        if sum(a == b == "replay" for a, b in itertools.pairwise(kinds)) < TIMED:
            return "hardly any call could be replayed" if self._since > PATIENCE else ""
        replay_ms = statistics.median(self._times("replay"))
        self._measuring, self._marks = False, []
        faster = replay_ms <= self._plain_ms * (1 - GAIN)
        times = {"plain_ms": round(self._plain_ms, 3), "replay_ms": round(replay_ms, 3)}
        if faster:
            self._note_row(replayed=True, **times)
            return ""
        return (
            f"it does not pay: {times['replay_ms']} ms a call replayed, {times['plain_ms']} ms "
            f"plainly; at least {GAIN:.0%} must be gained"
        )

    def _note_row(self, **plan: Any) -> None:
        if self.recording is not None:
            plan["pool_mib"] = round(self.recording.bytes / 2**20, 1)
        self._report.add(PassRow("cuda_graphs", "run_time", plan, 0.0))


def _note(
    tangents: dict[int, Layout], retained: list[bool], position: int, gradient: Tensor | None
) -> None:
    if gradient is not None:  # functions that take None for zeros hand it on to hooks
        tangents[position] = Layout.dense(gradient)
    retained.append(compat.graph_is_retained())


def weakly(replayer: Replayer) -> Callable[..., Any]:
    """Return a callable for Dynamo, which keeps it for good: it keeps no memory of the device."""
    reference, compiled = weakref.ref(replayer), replayer.compiled

    def call(*args: Any) -> Any:
        alive = reference()
        return compiled(*args) if alive is None else alive(args)

    return call
