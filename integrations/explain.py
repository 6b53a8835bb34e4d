"""`magi explain`: a run's report as text, as JSON, or as one HTML page.

On a terminal, and with rich installed, the text has tables; else it is plain, one fact a line.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from magi_train.core.errors import MagiError
from magi_train.core.report import FILE_NAME, Report, write_atomically
from magi_train.integrations import page
from magi_train.integrations.advice import short_line, size
from magi_train.integrations.story import Story, duration, rates, tell
from magi_train.integrations.trace import find_trace, total

BARS = "▁▂▃▄▅▆▇█"
LINE_POINTS = 48


def explain(where: str, html: str | None, *, as_json: bool) -> int:
    """Show a report; return the exit status.

    Args:
        where: The report, or the folder of a run.
        html: Where to write the page; "" for beside the report, None for no page.
        as_json: Print JSON: the report, and under "explained" what is said about it.

    Raises:
        MagiError: There is no report, or the page cannot be written.
    """
    path = Path(where)
    report = Report.load(path)
    path = path / FILE_NAME if path.is_dir() else path
    story = tell(report, find_trace(path.parent))
    if html is not None:
        target = Path(html) if html else path.with_suffix(".html")
        try:
            write_atomically(target, page.render(story, report))
        except OSError as error:
            raise MagiError(f"the page cannot be written to {target}: {error}") from error
        sys.stdout.write(f"{target}\n")
    if as_json:
        both = {**asdict(report), "explained": asdict(story)}
        sys.stdout.write(json.dumps(both, indent=2) + "\n")
    elif html is None and not (sys.stdout.isatty() and _print_rich(story, report)):
        sys.stdout.write(plain(story, report))
    return 0


def sparkline(values: Sequence[float]) -> str:
    """Return values as a row of bars from 0 to the highest, at most LINE_POINTS of them."""
    values = [value for value in values if math.isfinite(value)]
    step = -(-len(values) // LINE_POINTS) or 1
    means = [
        sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)
    ]
    top, low = max(means, default=0.0), min(0.0, *means) if means else 0.0
    span = (top - low) or 1.0
    return "".join(BARS[min(7, max(0, int((v - low) / span * 7.999)))] for v in means)


def plain(story: Story, report: Report) -> str:
    """Return the whole account as plain text."""
    parts = [" ".join(story.summary), str(report)]
    parts += [f"{name}\n{_indented(rows)}" for name, rows in _sections(story) if rows]
    return "\n\n".join(parts) + "\n"


def _indented(rows: Sequence[Sequence[str]]) -> str:
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"  {row[0]:{width}}  {'  '.join(row[1:])}".rstrip() for row in rows)


def _sections(story: Story) -> list[tuple[str, list[list[str]]]]:
    """Return what stands below the passes: titles, and rows of words."""
    return [
        ("One step", _timeline(story)),
        ("Memory", _memory(story)),
        ("Over time", _over_time(story)),
        ("Settings", [list(row) for row in story.settings if row[2] != "default"]),
        ("What to try next", [[str(i), text] for i, text in enumerate(story.advice, 1)]),
    ]


def _timeline(story: Story) -> list[list[str]]:
    rows = [[label, f"{total(spans):.4g} ms"] for kind, label, spans in story.timeline if kind]
    return [*rows, ["", story.timeline_from]] if rows else []


def _memory(story: Story) -> list[list[str]]:
    memory = story.memory
    if memory is None:
        return []
    rows = [["course", sparkline(memory.course_mib)]]
    rows += [[name, size(mib)] for name, mib in memory.resident_mib.items()]
    rows.append(["planned peak", size(memory.planned_mib)])
    if memory.measured_mib is not None:
        rows.append(["measured peak", size(memory.measured_mib)])
    rows += [["blocks", sentence] for sentence in memory.blocks]
    rows += [[size(t["mib"]), t["node"], short_line(t["line"])] for t in memory.largest]
    return [*rows, ["", memory.advice]]


def _over_time(story: Story) -> list[list[str]]:
    steps, rows = story.steps, []
    if steps.seconds:
        rows.append(["step time", sparkline(steps.seconds), duration(steps.typical_seconds() or 0)])
    if len(steps.loss) > 1:
        values = [value for _, value in steps.loss]
        rows.append(["loss", sparkline(values), f"{values[0]:.4g} to {values[-1]:.4g}"])
    samples, tokens = rates(steps)
    if samples:
        more = f", {tokens:.4g} tokens/s" if tokens else ""
        rows.append(["throughput", f"{samples:.4g} samples/s{more}, a rank"])
    if story.joules_per_1000 is not None:
        rows.append(["energy", f"{story.joules_per_1000:.4g} J for 1,000 samples, this rank's GPU"])
    return rows


def _print_rich(story: Story, report: Report) -> bool:
    """Print with tables; return whether rich is there to do it."""
    try:
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    console = Console(highlight=False)
    console.print(Panel(Text(" ".join(story.summary)), title="magi-train"))
    console.print(Text(story.tier))
    table = Table("stage", "pass", "did", "measured gain", title="Passes", expand=True)
    for each in story.passes:
        did = "\n".join([each.did, *(f"left alone: {text}" for text in each.left)])
        table.add_row(*map(Text, (each.stage, each.name, did, each.gain or "not measured")))
    console.print(table)
    for title, rows in _sections(story):
        if rows:
            grid = Table(title=title, show_header=False, box=None, title_justify="left")
            for row in rows:
                grid.add_row(*map(Text, row))
            console.print(grid)
    for sentence in report.notes:
        console.print(Text(f"note: {sentence}"))
    return True
