"""Gain or go: passes are measured on the user's own steps, and those that do not gain are dropped.

Every form of a captured step, with a pass or without it, is a right way to train it. So measuring
costs no extra step: after the first step, forms take the following ones in turn, each WARM steps
that do not count (compilation) and TIMED that do. A step's time is from one call of the captured
function to the next, with the device idle at both: forward, backward, optimizer and whatever the
loop does, which is the same for all forms. The slowest rank's median counts, and all ranks decide
alike: a pass goes if the step is faster without it by more than NOISE. The choice is kept in a file
beside PyTorch's compile cache, under a key of graph, shapes, device, ranks, versions and our code.

Not measured: `loss`, which trades time for memory, and `optimizer`, which is no part of the graph.
"""

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from magi_train.core import compat
from magi_train.core.config import SWITCHES, Config
from magi_train.core.report import PassRow, Report, write_atomically
from magi_train.core.world import World
from magi_train.lower import SOURCES

WARM, TIMED = 2, 5
NOISE = 0.005
"""Part of a step's time; medians of five steps repeat to about half of that on an idle device."""


def idle_clock() -> float:
    """Return the time in seconds once the device has nothing left to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Tuner:
    """Chooses the fusion passes of one captured function.

    Args:
        config: With all passes on that the user wants.
        world: The ranks that choose together.
        report: Says what the passes did; gets the row "tune".
        clock: Returns seconds.

    Attributes:
        settings: What the next call shall be compiled with.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        report: Report,
        clock: Callable[[], float] = idle_clock,
    ) -> None:
        self.settings = config
        self._config, self._world, self._report, self._clock = config, world, report, clock
        self._forms: list[str] = []  # "" is with all passes, else the switch that is off
        self._seconds: dict[str, list[float]] = {}
        self._calls, self._began = 0, 0.0
        self._file: Path | None = None
        self.done = config.fusion is None or not config.tune

    def recall(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        """Take the choice of an earlier process for this graph, if every rank has the same.

        Args:
            gm: As captured, before any pass.
            inputs: Its example inputs.
        """
        self._file = _file_for(gm, inputs, self._config, self._world.size)
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            found = None
        if self._together("recall", found):
            self._take(found["dropped"], found["milliseconds"], cached=True)

    def next(self) -> Config:
        """Return the settings of the call that begins now, and time the one before."""
        if self.done:
            return self.settings
        now = self._clock()
        if not self._forms:
            self._forms = ["", *self._candidates()]
        form = self._forms[0]
        self._calls += 1
        if self._calls > WARM + 1:
            self._seconds.setdefault(form, []).append(now - self._began)
        if self._calls == WARM + TIMED + 1:
            self._forms.pop(0)
            self._calls = 1
        if not self._forms:
            self._choose()
            return self.settings
        self.settings = without(self._config, filter(None, [self._forms[0]]))
        self._began = self._clock()
        return self.settings

    def _candidates(self) -> list[str]:
        """Return the switches of passes that did something on every rank."""
        mine = [
            switch
            for name, switch in SWITCHES.items()
            if any(row.name == name and _did_something(row) for row in self._report.rows)
        ]
        answers = self._gather("candidates", mine)
        return [switch for switch in mine if all(switch in answer for answer in answers)]

    def _choose(self) -> None:
        medians = {form: statistics.median(times) for form, times in self._seconds.items()}
        answers = self._gather("medians", medians)
        worst = {form: max(answer[form] for answer in answers) for form in medians}
        dropped = [form for form in worst if form and worst[form] < worst[""] * (1 - NOISE)]
        milliseconds = {
            f"without {form}" if form else "all": round(seconds * 1e3, 3)
            for form, seconds in worst.items()
        }
        if self._file is not None:
            found = {"dropped": dropped, "milliseconds": milliseconds}
            write_atomically(self._file, json.dumps(found))
        self._take(dropped, milliseconds, cached=False)

    def _take(self, dropped: list[str], milliseconds: dict[str, float], *, cached: bool) -> None:
        self.done = True
        self.settings = without(self._config, dropped)
        plan = {"dropped": dropped, "milliseconds": milliseconds}
        self._report.add(PassRow("tune", "run_time", plan, 0.0, cached=cached))

    def _gather(self, question: str, answer: Any) -> list[Any]:
        return self._world.gather(f"tune: {question}", answer, self._config.timeout_seconds)

    def _together(self, question: str, answer: Any) -> bool:
        answers = self._gather(question, answer)
        return answer is not None and all(other == answer for other in answers)


def without(config: Config, switches: Iterable[str]) -> Config:
    """Return `config` with fields of its FusionConfig set to False."""
    if config.fusion is None:
        return config
    fusion = dataclasses.replace(config.fusion, **dict.fromkeys(switches, False))
    return dataclasses.replace(config, fusion=fusion)


def _did_something(row: PassRow) -> bool:
    return any(value for key, value in row.plan.items() if key != "left_alone")


def _file_for(gm: GraphModule, inputs: Sequence[Any], config: Config, world_size: int) -> Path:
    shapes = [(str(tuple(x.shape)), str(x.dtype)) for x in inputs if isinstance(x, torch.Tensor)]
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
    versions = (torch.__version__, SOURCES, device, world_size)
    config = dataclasses.replace(config, run_folder=None, progress=True)  # no part of a step
    key = hashlib.sha256(repr((gm.code, shapes, config, versions)).encode()).hexdigest()[:32]
    return Path(compat.cache_dir()) / "magi_train" / f"tune-{key}.json"
