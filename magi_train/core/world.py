"""World: the ranks of a job, what they agree on, and how a failure on one reaches all others.

Ranks talk through the process group's key-value store, never through a collective: a rank that is
still compiling, or that failed, cannot hang a question. Three kinds of messages:

* an agreement: each rank writes its answer and reads all others (`gather`, `agree`);
* a heartbeat: a thread on each rank counts up once a second, also while the rank compiles, and
  looks after its neighbour, so that a killed process is noticed;
* a failure: the first error of any rank, with its traceback. Whoever waits raises RemoteRankError;
  a rank stuck in a call that cannot be interrupted is ended a few seconds later.
"""

import atexit
import itertools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from magi_train.core import compat
from magi_train.core.errors import MagiError, PlanMismatchError, RemoteRankError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 15.0
"""A rank without a heartbeat for this long is taken for dead."""
GRACE_SECONDS = 8.0
"""How long the main thread may take to notice another rank's failure by itself."""

MEET_SECONDS = 3.0
"""How long the rank that hosts the store waits for others to have read an error."""

PATIENCE_SECONDS = 30.0
"""After which a rank that waits for an answer says for whom: the other may never come to answer."""

STORE_IS_GONE = (dist.DistNetworkError, dist.DistStoreError) if dist.is_available() else ()

_generations = itertools.count()
_current: list[tuple[Any, "World"]] = []
"""The default process group and its World, at most one."""


class World:
    """The ranks that train one model together. Make it with `current()`.

    Attributes:
        rank: This process, 0 to size - 1.
        size: Ranks in the default process group; 1 without one.
        backend: Name of the process group's backend, "" without one.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.backend = 0, 1, ""
        self._failure: RemoteRankError | None = None
        self._noticed = threading.Event()
        self._stop = threading.Event()
        self._own_failure_told = False
        self._questions = self._caught = 0
        self._at_close: list[Callable[[], None]] = []
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.backend = dist.get_backend()
        if self.size > 1:
            # a store may outlive its process group (torchrun's does): no answer may be an old one
            self._prefix = f"magi/{next(_generations)}"
            store = compat.get_default_store()
            self._store, self._watch_store = compat.clone_store(store), compat.clone_store(store)
            self._watcher = threading.Thread(target=self._watch, name="magi-watch", daemon=True)
            self._watcher.start()
            self._chain_excepthook()
            atexit.register(self.close)

    @staticmethod
    def current() -> "World":
        """Return the World of the default process group; the same object while the group lives."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return World()
        group = dist.group.WORLD
        if not _current or _current[0][0] is not group:
            for _, old in _current:  # its process group is gone
                old.close()
            _current[:] = [(group, World())]
        return _current[0][1]

    # -- agreements ----------------------------------------------------------------------------

    def gather(self, question: str, answer: Any, timeout_seconds: float) -> list[Any]:
        """Return the answers of all ranks, in rank order; `answer` is this rank's, as JSON.

        Raises:
            RemoteRankError: A rank failed, or did not answer in time.
            PlanMismatchError: Ranks are at different questions: their programs differ.
        """
        if self.size == 1:
            return [answer]
        self._questions += 1
        base = f"{self._prefix}/ask/{self._questions}"
        mine = json.dumps({"question": question, "answer": answer})
        self._store.set(f"{base}/{self.rank}", mine)
        began, told = time.monotonic(), False
        answers = []
        for rank in range(self.size):
            while not self._is_set(f"{base}/{rank}"):
                self.check()
                waited = time.monotonic() - began
                if waited > PATIENCE_SECONDS and not told:
                    told = True
                    logger.warning(
                        "magi-train: rank %d has waited %.0f s for rank %d at %r, and will for "
                        "%.0f s: that rank compiles, or never comes here. Every rank must call "
                        "magi-train at the same places; what one rank runs alone belongs under "
                        "torch.no_grad()",
                        *(self.rank, waited, rank, question, timeout_seconds),
                    )
                if waited > timeout_seconds:
                    self._give_up(
                        f"rank {rank} did not answer {question!r} within {timeout_seconds:.0f} s; "
                        "every rank must call magi-train at the same places"
                    )
                time.sleep(0.01)
            answers.append(json.loads(self._store.get(f"{base}/{rank}")))
        if any(a != answers[0] for a in answers):
            self._meet(f"{base}/read")  # an error may follow
        others = {r: a["question"] for r, a in enumerate(answers) if a["question"] != question}
        if others:
            raise PlanMismatchError(
                f"rank {self.rank} is at {question!r} but other ranks are at {others}; every rank "
                "must run the same program with the same Config"
            )
        return [a["answer"] for a in answers]

    def gather_after_error(self, answer: Any, timeout_seconds: float) -> list[Any]:
        """Return the answers of all ranks behind a backward that raised and was caught.

        A rank that still waits in that backward is told by `wait`, so that nobody waits for it.

        Raises:
            MagiError: As `gather`: a rank that has caught nothing asks something else, or fails.
        """
        self._caught += 1
        self._store.set(f"{self._prefix}/caught/{self.rank}/{self._caught}", "1")
        return self.gather("a backward whose error was caught", answer, timeout_seconds)

    def agree(self, what: str, value: dict[str, Any], timeout_seconds: float) -> None:
        """Raise PlanMismatchError on every rank unless `value` is the same on all of them."""
        answers = self.gather(what, value, timeout_seconds)
        different = [rank for rank, answer in enumerate(answers) if answer != answers[0]]
        if different:
            detail = "; ".join(
                f"rank {rank}: {_difference(answers[0], answers[rank])}" for rank in different[:4]
            )
            raise PlanMismatchError(
                f"ranks do not agree on the {what}: against rank 0, {detail}. Every rank must "
                "build the same model with the same Config"
            )

    # -- failures ------------------------------------------------------------------------------

    def _meet(self, key: str) -> None:
        """Wait until every rank was here, for a few seconds at most.

        The rank that hosts the store must not end before the others have read why.
        """
        try:
            self._store.set(f"{key}/{self.rank}", "1")
            deadline = time.monotonic() + MEET_SECONDS
            while time.monotonic() < deadline:
                if all(self._store.check([f"{key}/{rank}"]) for rank in range(self.size)):
                    return
                time.sleep(0.02)
        except RuntimeError:  # somebody ended first
            logger.debug("rank %d met nobody at %s", self.rank, key)

    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one failed; only the first call does anything."""
        if self.size == 1 or self._own_failure_told or isinstance(error, RemoteRankError):
            return
        if self._stop.is_set():  # this group is gone; a newer World tells
            return
        self._own_failure_told = True
        cause = f"{type(error).__name__}: {error}"
        text = "".join(traceback.format_exception(error))[-8000:]
        self._post(self._store, self.rank, cause, text)
        if self.rank == 0:
            self._meet(f"{self._prefix}/seen")

    def check(self) -> None:
        """Raise RemoteRankError if another rank has failed."""
        if self._failure is not None:
            self._noticed.set()
            raise self._failure

    def uses_nccl(self, device: torch.device) -> bool:
        """Return whether collectives on `device` go through NCCL."""
        return device.type == "cuda" and self.backend != "gloo"

    def wait(self, work: "dist.Work", device: torch.device, what: str) -> None:
        """Wait for a collective; raise RemoteRankError instead of waiting for a rank that failed.

        Under NCCL this makes the current stream wait, as usual, and returns at once.
        """
        if self.uses_nccl(device):
            work.wait()
            return
        caught: float | None = None  # since when a rank has told of an error that was caught
        while True:
            self._check_open(what)
            try:
                work.wait(timedelta(seconds=1))
                return
            except RuntimeError as error:
                self._check_waiting(what)
                if work.is_completed():
                    self._explain_broken(what, error)
                self._check_finished(what)
                alone = self._ranks_that_caught()
                if not alone:
                    continue
                if caught is None:
                    caught = time.monotonic()  # this rank may be about to, when that has come
                elif time.monotonic() - caught > GRACE_SECONDS:
                    self._give_up(
                        f"the backward of ranks {alone} ended with an error that their program "
                        f"caught, while rank {self.rank} still waits for {what}; catch it on every "
                        "rank, or let it end the program"
                    )

    def close(self) -> None:
        """Stop watching, and tell the others that this rank ended by itself."""
        if self.size == 1 or self._stop.is_set():
            return
        self._stop.set()
        try:
            self._store.set(f"{self._prefix}/done/{self.rank}", "1")
        except RuntimeError:  # the store went first: nobody is left to tell
            logger.debug("the store was gone when rank %d ended", self.rank)
        if threading.current_thread() is not self._watcher:
            self._watcher.join(timeout=2 * HEARTBEAT_SECONDS)
        for end in self._at_close:
            end()

    def at_close(self, end: Callable[[], None]) -> None:
        """Let `end` be called when the World is closed: threads that wait by it have to stop."""
        self._at_close.append(end)

    def _explain_broken(self, what: str, error: BaseException) -> None:
        """Give the rank that broke the connection a moment to say why, then raise."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            self._check_waiting(what)
            self._check_finished(what)
            time.sleep(0.1)
        self._give_up(f"the connection broke while waiting for {what}: {error}")

    def _check_finished(self, what: str) -> None:
        ended = [
            r
            for r in range(self.size)
            if r != self.rank and self._is_set(f"{self._prefix}/done/{r}")
        ]
        if ended:
            time.sleep(HEARTBEAT_SECONDS)  # a failure may be on its way
            self._await_failure(what)
            self._give_up(
                f"ranks {ended} ended their program while rank {self.rank} still waits for {what}; "
                "every rank must take the same number of steps (uneven data?)"
            )

    def _give_up(self, message: str) -> None:
        error = RemoteRankError(message)
        self._own_failure_told = True
        self._post(self._store, self.rank, str(error), "")
        self._noticed.set()
        if self.rank == 0:
            self._meet(f"{self._prefix}/seen")
        raise error

    def _is_set(self, key: str) -> bool:
        """Return whether a rank has set a key; raise RemoteRankError if nobody can any more."""
        try:
            return bool(self._store.check([key]))
        except STORE_IS_GONE as error:
            self.check()
            raise _store_is_gone(error) from error

    def _post(self, store: Any, rank: int, cause: str, text: str) -> None:
        try:
            number = store.add(f"{self._prefix}/failures", 1)
            record = json.dumps({"rank": rank, "cause": cause, "traceback": text})
            store.set(f"{self._prefix}/failure/{number}", record)
        except RuntimeError:  # the store is gone: its host failed first and everybody notices
            logger.warning("rank %d failed (%s) and could not tell the others", rank, cause)

    def _check_waiting(self, what: str) -> None:
        """Raise if another rank has failed, or this one has come to its end meanwhile."""
        self.check()
        self._check_open(what)

    def _check_open(self, what: str) -> None:
        if self._stop.is_set():
            raise MagiError(f"rank {self.rank} ended while a thread of it waited for {what}")

    def _await_failure(self, what: str) -> None:
        """Raise RemoteRankError if a rank has told of a failure; the watching thread reads it."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            self._check_waiting(what)
            try:
                if self._own_failure_told or not self._store.add(f"{self._prefix}/failures", 0):
                    return
            except STORE_IS_GONE:  # its host has ended, and is named for that
                return
            time.sleep(0.1)

    def _ranks_that_caught(self) -> list[int]:
        """Return the other ranks that have left a backward which this one has not."""
        others = [r for r in range(self.size) if r != self.rank]
        return [r for r in others if self._is_set(f"{self._prefix}/caught/{r}/{self._caught + 1}")]

    # -- the watching thread -------------------------------------------------------------------

    def _watch(self) -> None:
        beats, neighbour = 0, (self.rank + 1) % self.size
        seen, since = -1, time.monotonic()
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                beats += 1
                self._watch_store.set(f"{self._prefix}/beat/{self.rank}", str(beats))
                if self._watch_store.add(f"{self._prefix}/failures", 0) > 0:
                    self._react()
                    return
                beat = self._beat_of(neighbour)
                if beat != seen:
                    seen, since = beat, time.monotonic()
                elif time.monotonic() - since > SILENCE_SECONDS and seen >= 0:
                    if self._watch_store.check([f"{self._prefix}/done/{neighbour}"]):
                        seen = -1
                        continue
                    cause = f"sent no sign of life for {SILENCE_SECONDS:.0f} s (killed, or frozen)"
                    self._post(self._watch_store, neighbour, cause, "")
            except RuntimeError as error:
                if not self._stop.is_set():
                    self._failure = _store_is_gone(error)
                return

    def _beat_of(self, rank: int) -> int:
        key = f"{self._prefix}/beat/{rank}"
        return int(self._watch_store.get(key)) if self._watch_store.check([key]) else -1

    def _react(self) -> None:
        """Keep the first failure for the main thread; end the process if it cannot notice."""
        record = json.loads(self._watch_store.get(f"{self._prefix}/failure/1"))
        self._watch_store.set(f"{self._prefix}/seen/{self.rank}", "1")
        if record["rank"] == self.rank:
            return
        text = f"rank {record['rank']} failed: {record['cause']}"
        if record["traceback"]:
            text += f"\n--- traceback of rank {record['rank']} ---\n{record['traceback']}"
        self._failure = RemoteRankError(text)
        if self._noticed.wait(GRACE_SECONDS) or self._own_failure_told or self._stop.is_set():
            return
        sys.stderr.write(f"magi-train: rank {self.rank} is ended because it is stuck and {text}\n")
        sys.stderr.flush()
        os._exit(1)

    def _chain_excepthook(self) -> None:
        previous: Callable[..., Any] = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            self.fail(error)
            previous(kind, error, trace)

        sys.excepthook = hook


def _store_is_gone(error: BaseException) -> RemoteRankError:
    return RemoteRankError(
        "the store of the process group is gone, so the rank or launcher that hosts it has ended "
        f"(rank 0, if no launcher; if without an error, it took fewer steps): {error}"
    )


def _difference(mine: Any, theirs: Any, path: str = "") -> str:
    """Return the first place where two JSON values differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            if mine.get(key) != theirs.get(key):
                return _difference(mine.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    if isinstance(mine, list) and isinstance(theirs, list):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            if a != b:
                return _difference(a, b, f"{path}[{i}]")
        return f"{path} has {len(theirs)} entries, not {len(mine)}"
    return f"{path or 'it'} is {theirs!r}, not {mine!r}"


def join_from_environment() -> World:
    """Return the World, joining the process group that torchrun's variables describe if need be.

    Raises:
        MagiError: The variables describe more than one rank, but a device or rank is missing.
    """
    if dist.is_available() and not dist.is_initialized() and "WORLD_SIZE" in os.environ:
        if int(os.environ["WORLD_SIZE"]) > 1:
            if "RANK" not in os.environ:
                raise MagiError(
                    "WORLD_SIZE is set but RANK is not; start with `magi run` or torchrun"
                )
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank)
                dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
            else:
                dist.init_process_group("gloo")
    return World.current()
