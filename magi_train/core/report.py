"""Report: what was captured, what each pass planned, and what was measured; text and JSON."""

import json
import os
import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from magi_train.core.errors import MagiError
from magi_train.core.record import Steps

FILE_NAME = "magi_report.json"
"""Of the report in the folder of a run."""


@dataclass
class PassRow:
    """One pass over one graph.

    Attributes:
        name: The pass.
        stage: Where it works: pre_grad, joint, backward or run_time.
        plan: What it decided, as JSON values; empty where it found nothing to do.
        seconds: How long planning and applying took.
        cached: The compiled code came from PyTorch's cache, so the plan is the remembered one.
        graphs: How many graphs got this same plan.
    """

    name: str
    stage: str
    plan: dict[str, Any]
    seconds: float
    cached: bool = False
    graphs: int = 1

    def summary(self) -> str:
        """Return the plan on one line, long lists as their length."""
        if not self.plan:
            return "nothing to do"
        parts = []
        for key, value in self.plan.items():
            if isinstance(value, list | dict) and len(str(value)) > 60:
                value = f"{len(value)} entries"
            parts.append(f"{key}={value}")
        return ", ".join(parts)


@dataclass
class Report:
    """What was done to one training step.

    Attributes:
        tier: "graph", "region" or "eager"; "" before the first step.
        reason: Why not a higher tier, with the user's line; "" at the highest.
        world_size: Ranks that train together.
        rows: One entry per pass and distinct plan.
        measured: Numbers by name; the unit is in the name.
        notes: Sentences on what happened later, for example steps that ran uncompiled.
        settings: The Config.
        sources: {key of a setting: where it came from}, for those that are not the default.
        steps: How the steps went.
    """

    tier: str = ""
    reason: str = ""
    world_size: int = 1
    rows: list[PassRow] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    versions: dict[str, str] = field(
        default_factory=lambda: {"torch": torch.__version__, "python": platform.python_version()}
    )

    def add(self, row: PassRow) -> None:
        """Add a row, or count it with an equal one."""
        for old in self.rows:
            if (old.name, old.stage, old.plan) == (row.name, row.stage, row.plan):
                old.graphs += 1
                old.seconds += row.seconds
                return
        self.rows.append(row)

    def note(self, sentence: str) -> None:
        """Add a sentence once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def __str__(self) -> str:
        lines = [f"tier {(self.tier or 'undecided').upper()} on {self.world_size} rank(s)"]
        if self.reason:
            lines.append(f"  because {self.reason}")
        for row in self.rows:
            graphs = f" x{row.graphs}" if row.graphs > 1 else ""
            cached = " (from the compile cache)" if row.cached else ""
            lines.append(f"  {row.stage:9} {row.name:24} {row.summary()}{graphs}{cached}")
        lines += [f"  measured  {name:24} {value:.6g}" for name, value in self.measured.items()]
        lines += [f"  note      {sentence}" for sentence in self.notes]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; an existing file is replaced in one step.

        On one line: json's fast encoder knows no indents, and a run writes while it trains.
        """
        fields = {**vars(self), "rows": [vars(row) for row in self.rows], "steps": vars(self.steps)}
        write_atomically(Path(path), json.dumps(fields) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Report":
        """Read what `save` wrote; of a folder, the report in it.

        Raises:
            MagiError: The file is missing or is not a report.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        try:
            data = json.loads(path.read_text())
            rows = [PassRow(**row) for row in data.pop("rows")]
            return Report(rows=rows, steps=Steps(**data.pop("steps", {})), **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MagiError(
                f"{path} is not a report of magi-train: {error}; Config(run_folder=...) and "
                "`magi_train.report(module).save(path)` write one"
            ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a neighbour of `path`, then rename it: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:  # no space: what was there before stays, and nothing of ours beside it
        os.unlink(name)
        raise
