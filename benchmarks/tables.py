"""Writes docs/results.md from the records in benchmarks/results; nothing in it is typed by hand.

    python -m benchmarks.tables          # write it
    python -m benchmarks.tables --check  # fail if it is not what the records say

A record becomes a section: when, on what, with which versions and by which command; its notes, as
they were written down beside the measurement; and its rows. Where rows of a case have a step time,
the last column compares each with the best row of that case that is not ours, by the tenth
percentile of synchronised steps where it was recorded: a machine that is shared slows steps down,
and never speeds them up.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
OURS, RATIO = "magi", "to the best peer"
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


def sections() -> list[str]:
    """Return the page's sections, newest record first."""
    files = sorted(RESULTS.glob("*.json"), key=lambda f: (f.name[:10], f.name), reverse=True)
    return [section(json.loads(file.read_text()), file.name) for file in files]


def section(record: dict[str, Any], name: str) -> str:
    """Return one record as Markdown."""
    question = record["question"].split(",")[0]
    command = record.get("command") or COMMANDS.get(question, f"python -m benchmarks.{question}")
    gpu = record["versions"].get("gpu", "CPU")
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if k != "gpu")
    lines = [
        f"## {record['question']} ({name.removesuffix('.json')})",
        "",
        f"{record['date'][:10]}, commit {record['commit']}, {gpu}, {versions}. `{command}`",
        "",
    ]
    notes = [*record.get("notes", []), *filter(None, [record.get("note")])]
    lines += [*(f"- {note}" for note in notes), ""] if notes else []
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
        if _step(row) and not str(row["variant"]).startswith(OURS):
            best[_which(row)] = min(_step(row), best.get(_which(row), float("inf")))
    return [
        row | {RATIO: round(best[_which(row)] / _step(row), 2)}
        if _step(row) and _which(row) in best
        else row
        for row in rows
    ]


def _step(row: Row) -> float:
    return float(row.get("step_ms_p10") or row.get("step_ms") or 0.0) if "variant" in row else 0.0


def _which(row: Row) -> tuple[Any, Any]:
    return row.get("case"), row.get("gpus")


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
    """Return a value for a table, numbers with four digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    return str(value).replace("|", "/").replace("\n", " ")


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    text = "\n".join([HEAD, *sections()])
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE} is not what the records say; run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
