"""Writes docs/results.md from the records in benchmarks/results; nothing in it is typed by hand.

    python -m benchmarks.tables          # write it, and its pictures in docs/figures
    python -m benchmarks.tables --check  # fail if it is not what the records say

A record becomes a section: when, on what, with which versions and by which command; its notes, as
they were written down beside the measurement; and its rows. Where rows of a case have a step time,
the last column compares each with the best row of that case that is not ours, by the tenth
percentile of synchronised steps where it was recorded: a machine that is shared slows steps down,
and never speeds them up. Records of training steps get a picture: bars of the median, with a line
from the tenth to the ninetieth percentile.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from magi_train.integrations import charts, peers

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
FIGURES = PAGE.with_name("figures")
RATIO = "to the best peer"
HEAD = """# Results

Made by `python -m benchmarks.tables` from the files in `benchmarks/results`;
negative results included. "to the best peer" is the speed beside the fastest row of the same case
and call that is not ours, by the tenth percentile of steps; above 1 is faster. Each section names
its command; figures of different sections come from different calls and do not compare.
"""
COMMANDS = {
    "demo": "python -m examples.demo",
    "gpu_tests": "python -m pytest tests/gpu",
}
"""Those that are not `python -m benchmarks.QUESTION`."""

Row = dict[str, Any]


def records() -> dict[str, Row]:
    """Return all records by the stem of their file, newest first."""
    files = sorted(RESULTS.glob("*.json"), key=lambda f: (f.name[:10], f.name), reverse=True)
    return {file.stem: json.loads(file.read_text()) for file in files}


def sections() -> list[str]:
    """Return the page's sections, newest record first."""
    return [section(record, name) for name, record in records().items()]


def figures() -> dict[str, str]:
    """Return the pictures that the page shows, by the name of their file."""
    drawn = {f"{name}.svg": figure(record) for name, record in records().items()}
    return {name: svg for name, svg in drawn.items() if svg}


def figure(record: Row) -> str:
    """Return a record's picture; "" where it has no two training steps to compare."""
    groups: dict[tuple[Any, Any], list[charts.Bar]] = {}
    for row in (row for rows in _tables(record) for row in rows if "variant" in row):
        if "step_ms" in row and "back_to_back_ms" in row:  # a training step
            middle = float(row["step_ms"])
            value = (middle, row.get("step_ms_p10", middle), row.get("step_ms_p90", middle))
        elif "failed" in row:
            value = None
        else:
            continue
        name = str(row["variant"])
        kind = "ours" if is_ours(name) else "theirs"
        groups.setdefault(_which(row), []).append((kind, name, value))
    if sum(value is not None for each in groups.values() for *_, value in each) < 2:
        return ""
    named = [(_heading(case, ranks), each) for (case, ranks), each in groups.items()]
    return charts.as_file(charts.bars("Milliseconds of a training step", named, unit="ms"))


def _heading(case: Any, ranks: Any) -> str:
    unit = "rank" if ranks == 1 else "ranks"
    return ", ".join([*([str(case)] if case else []), *([f"{ranks} {unit}"] if ranks else [])])


def section(record: dict[str, Any], name: str) -> str:
    """Return one record as Markdown; `name` is the stem of its file."""
    question = record["question"].split(",")[0]
    command = record.get("command") or COMMANDS.get(question, f"python -m benchmarks.{question}")
    gpu = record["versions"].get("gpu", "CPU")
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if k != "gpu")
    lines = [
        f"## {record['question']} ({name})",
        "",
        f"{record['date'][:10]}, commit {record['commit']}, {gpu}, {versions}. `{command}`",
        "",
    ]
    notes = [*record.get("notes", []), *filter(None, [record.get("note")])]
    lines += [*(f"- {note}" for note in notes), ""] if notes else []
    if figure(record):
        lines += [f"![Milliseconds of a training step]({FIGURES.name}/{name}.svg)", ""]
    for rows in _tables(record):
        lines += [*table(compared(rows)), ""]
    lines += _rest(record)
    return "\n".join(lines).rstrip() + "\n"


def _tables(record: dict[str, Any]) -> list[list[Row]]:
    """Return every list of rows in a record; a row without a case takes the record's."""
    case = record.get("case")
    case = case["name"] if isinstance(case, dict) else case
    found = []
    for value in record.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found.append([{"case": case} | row if case else row for row in value])
    return found


def _rest(record: dict[str, Any]) -> list[str]:
    """Return the figures beside the rows as a list."""
    skipped = {"question", "command", "date", "commit", "case", "note"}
    lines = []
    for key, value in record.items():
        if isinstance(value, int | float | str) and key not in skipped:
            lines.append(f"- {key}: {cell(value)}")
        elif isinstance(value, dict) and key not in ("versions", "case"):
            parts = [f"{k} {cell(v)}" for k, v in value.items() if _is_plain(v)]
            lines += [f"- {key}: {', '.join(parts)}"] if parts else []
    return lines


def compared(rows: list[Row]) -> list[Row]:
    """Return the rows with their speed beside the best peer of the same case and number of GPUs."""
    best: dict[Any, float] = {}
    for row in rows:
        if _step(row) and not is_ours(str(row["variant"])):
            best[_which(row)] = min(_step(row), best.get(_which(row), float("inf")))
    return [
        row | {RATIO: round(best[_which(row)] / _step(row), 2)}
        if _step(row) and _which(row) in best
        else row
        for row in rows
    ]


def is_ours(variant: str) -> bool:
    """Return whether a row is ours; older records have names like magi-fp8."""
    return variant.startswith(f"{peers.OURS}-") or peers.is_ours(variant)


def _step(row: Row) -> float:
    return float(row.get("step_ms_p10") or row.get("step_ms") or 0.0) if "variant" in row else 0.0


def _which(row: Row) -> tuple[Any, Any]:
    return row.get("case"), row.get("gpus", row.get("ranks"))


def table(rows: list[Row]) -> list[str]:
    """Return rows as the lines of a Markdown table, of the columns that hold plain values."""
    columns = list(dict.fromkeys(k for row in rows for k in row if k not in ("log", RATIO)))
    columns.append(RATIO)
    columns = [c for c in columns if all(_is_plain(row.get(c)) for row in rows)]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    numbers = [all(not isinstance(row.get(c), str) for row in rows) for c in columns]
    lines = [f"| {' | '.join(columns)} |"]
    lines += ["|" + "|".join("---:" if n else "---" for n in numbers) + "|"]
    return lines + [f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float | str)


def cell(value: Any) -> str:
    """Return a value for a table, numbers with four digits; brackets would be references."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ").replace("[", "\\[")


def wanted() -> dict[Path, str]:
    """Return what must stand in which file."""
    pictures = {FIGURES / name: svg for name, svg in figures().items()}
    return {PAGE: "\n".join([HEAD, *sections()]), **pictures}


def write() -> None:
    """Write the page and its pictures, and remove those that it shows no more."""
    files = wanted()
    FIGURES.mkdir(exist_ok=True)
    for old in set(FIGURES.glob("*.svg")) - files.keys():
        old.unlink()
    for path, text in files.items():
        path.write_text(text)


def stale() -> list[Path]:
    """Return the files that are not what the records say, or that no record asks for."""
    files = wanted()
    wrong = [p for p, text in files.items() if not p.exists() or p.read_text() != text]
    return sorted(wrong + [p for p in FIGURES.glob("*.svg") if p not in files])


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        write()
    elif wrong := stale():
        names = ", ".join(path.name for path in wrong)
        sys.exit(f"not what the records say: {names}; run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
