"""Pictures for the report's page: SVG as text, without a library, readable at the width of a phone.

Every picture has a title and a description for those who do not see it. Colours are classes, which
the page's style sheet defines for light and dark. Coordinates are rounded to a tenth of a unit; 400
units are the width of a column, so that 12 units of text are 10 pixels on a phone.
"""

import itertools
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 400.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 8.0, 12.0, 30.0
Points = Sequence[tuple[float, float]]
_numbers = itertools.count()


def lines(
    title: str,
    series: Sequence[tuple[str, str, Points]],
    *,
    unit: str,
    across: str,
    limit: float | None = None,
) -> str:
    """Return a chart of lines over a common axis.

    Args:
        title: What it shows.
        series: (class, label, points), drawn in order; class "area" is filled.
        unit: Of the values.
        across: What the horizontal axis counts.
        limit: Where the vertical axis ends; None: above the highest value.
    """
    points = [p for _, _, each in series for p in each if all(map(math.isfinite, p))]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low = min(0.0, *(y for _, y in points)) if len(points) > 1 else min(0.0, points[0][1])
    ticks = nice_ticks(low, max(y for _, y in points) if limit is None else limit)
    plot = _Plot(left, right, ticks[0], ticks[-1])
    parts = [_grid(plot, ticks, unit)]
    for kind, _, each in series:
        parts.append(plot.path(kind, [p for p in each if all(map(math.isfinite, p))]))
    parts += [
        _text(LEFT, HEIGHT - 14, f"{left:,.10g}", "start"),
        _text(WIDTH - RIGHT, HEIGHT - 14, f"{right:,.10g}", "end"),
        _text((LEFT + WIDTH) / 2, HEIGHT - 14, across, "middle"),
    ]
    told = [_told(label, each, unit) for _, label, each in series if each]
    legend = [(kind, label) for kind, label, _ in series] if len(series) > 1 else []
    return _svg(title, "; ".join(told), "".join(parts), HEIGHT) + _legend(legend)


def lanes(
    title: str, rows: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], *, unit: str
) -> str:
    """Return a chart of what runs when.

    Args:
        title: What it shows.
        rows: (class, label, spans from and to).
        unit: Of the spans.
    """
    spans = [span for _, _, each in rows for span in each]
    if not spans:
        return ""
    end = max(stop for _, stop in spans) or 1.0
    height, left, parts = 40.0 + 34.0 * len(rows), 4.0, []
    scale = (WIDTH - left - RIGHT) / end
    for i, (kind, label, each) in enumerate(rows):
        y = 16 + 34.0 * i
        parts.append(_text(left, y, label, "start"))
        for start, stop in each:
            width = max((stop - start) * scale, 1.0)
            x = left + start * scale
            box = f'x="{x:.1f}" y="{y + 5:.1f}" width="{width:.1f}" height="12"'
            parts.append(f'<rect class="{kind}" {box}/>')
    parts.append(_text(left, height - 6, "0", "start"))
    parts.append(_text(WIDTH - RIGHT, height - 6, f"{end:.4g} {unit}", "end"))
    told = [f"{label}: {sum(b - a for a, b in each):.4g} {unit}" for _, label, each in rows]
    return _svg(title, "; ".join(told), "".join(parts), height)


Bar = tuple[str, str, tuple[float, float, float] | None]
"""Class, label, and value with the ends of its spread; None where there is no value."""


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, unit: str) -> str:
    """Return a chart of bars, from 0, each group on a scale of its own, with thin lines for spread.

    Args:
        title: What it shows.
        groups: (heading, bars), drawn in order; "" is no heading.
        unit: Of the values.
    """
    parts, told, y, left = [], [], 4.0, 4.0
    for heading, each in groups:
        high = max((top for *_, value in each if value for top in value), default=0.0) or 1.0
        scale = (WIDTH - left - RIGHT) / high
        if heading:
            y += 20
            parts.append(_text(left, y, heading, "start", "heading"))
        for kind, label, value in each:
            y += 16
            number = f"{value[0]:,.4g} {unit}" if value else "failed"
            parts.append(_text(left, y, label, "start"))
            parts.append(_text(WIDTH - RIGHT, y, number, "end"))
            told.append(f"{heading} {label}: {number}".strip())
            y += 4
            if value:
                middle, low, top = (left + scale * part for part in value)
                width = max(middle - left, 1.0)
                parts.append(
                    f'<rect class="{kind}" x="{left:g}" y="{y:.1f}" width="{width:.1f}" '
                    'height="10"/>'
                    f'<line class="spread" x1="{low:.1f}" x2="{top:.1f}" y1="{y + 5:.1f}" '
                    f'y2="{y + 5:.1f}"/>'
                )
            y += 12
        y += 6
    return _svg(title, "; ".join(told), "".join(parts), y, "bars") if told else ""


STYLE = (
    "text{font:12px sans-serif;fill:#222}.heading{font-weight:bold}.ours{fill:#2a78d6}"
    ".theirs{fill:#9a9a9a}.spread{stroke:#222;stroke-width:1.5}"
)


def as_file(svg: str) -> str:
    """Return a picture of bars as the text of a file of its own, dark on white wherever it lies."""
    start, _, rest = svg.partition(">")
    start = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="560" ', 1)
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{start}><style>{STYLE}</style>{white}{rest}\n"


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return up to `most` + 1 round numbers from at most `low` to at least `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


class _Plot:
    """From values to places in the picture."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.low, self.high = left, low, high
        self.per_x = (WIDTH - LEFT - RIGHT) / ((right - left) or 1.0)
        self.per_y = (HEIGHT - TOP - BOTTOM) / (high - low)

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) * self.per_x

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (min(value, self.high) - self.low) * self.per_y

    def path(self, kind: str, points: Points) -> str:
        if not points:
            return ""
        if len(points) == 1:
            x, y = points[0]
            return f'<circle class="dot" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3"/>'
        along = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        if kind != "area":
            return f'<polyline class="{kind}" points="{along}"/>'
        base = self.y(max(self.low, 0.0))
        ends = f"{self.x(points[-1][0]):.1f},{base:.1f} {self.x(points[0][0]):.1f},{base:.1f}"
        return f'<polygon class="area" points="{along} {ends}"/>'


def _grid(plot: _Plot, ticks: Sequence[float], unit: str) -> str:
    parts = [_text(2, TOP - 2, unit, "start")]
    for tick in ticks:
        y = plot.y(tick)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        if tick != ticks[-1]:  # there the unit stands
            parts.append(_text(LEFT - 5, y + 4, f"{tick:,.6g}", "end"))
    return "".join(parts)


def _told(label: str, points: Points, unit: str) -> str:
    values = [y for _, y in points]
    return (
        f"{label}: from {values[0]:.4g} to {values[-1]:.4g} {unit}, "
        f"lowest {min(values):.4g}, highest {max(values):.4g}"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text{of} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 20 12" aria-hidden="true">'
        f'<line class="{"line" if kind == "area" else kind}" x1="0" x2="20" y1="6" y2="6"/></svg>'
        f"{escape(label)}</li>"
        for kind, label in entries
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _svg(title: str, described: str, inside: str, height: float, name: str = "") -> str:
    name = name or f"chart{next(_numbers)}"  # one of its own for each picture of a page
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH:g} {height:g}" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(described)}</desc>'
        f"{inside}</svg>"
    )
