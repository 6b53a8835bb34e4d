"""The report's page: one HTML file that needs nothing else, no script, no font, no network.

Everything that comes from a run (names, paths, error texts) is escaped. Light and dark follow the
reader's system; at the width of a phone nothing scrolls sideways but wide tables in themselves.
Colours keep a contrast of at least 4.5 to 1 for text, 3 to 1 for lines, in both.
"""

from collections.abc import Iterable, Sequence
from html import escape

from magi_train.core.report import Report
from magi_train.integrations import charts
from magi_train.integrations.advice import short_line, size
from magi_train.integrations.story import Memory, Story, duration, rates

STYLE = """
:root{color-scheme:light dark;--back:#fbfbfa;--card:#fff;--text:#1d2125;--soft:#586069;
--rule:#dcdfe3;--one:#1f5fbf;--two:#b34700;--bad:#c0243c;--fill:#1f5fbf33}
@media(prefers-color-scheme:dark){:root{--back:#15181c;--card:#1d2126;--text:#e8eaed;--soft:#a4adb8;
--rule:#39414a;--one:#79b0ff;--two:#ffab6b;--bad:#ff8494;--fill:#79b0ff33}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);overflow-wrap:anywhere;
font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px}h2{font-size:1.15rem;margin:40px 0 10px}
h3{font-size:1rem;margin:0 0 6px}p{margin:0 0 10px;max-width:75ch}
.soft,figcaption,th{color:var(--soft)}.lead{font-size:1.1rem}
.grid{display:grid;gap:16px;grid-template-columns:minmax(0,1fr)}
@media(min-width:800px){.grid{grid-template-columns:repeat(2,minmax(0,1fr))}}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px;
margin:0;min-width:0}
.facts{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));
margin:20px 0 0}
.facts div{border-top:2px solid var(--one);padding-top:6px}dl,dt,dd{margin:0}dt{color:var(--soft);
font-size:.85rem}dd{font-size:1.25rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto;margin:10px 0}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:7px 12px 7px 0;border-bottom:1px solid var(--rule);
overflow-wrap:anywhere}th{font-weight:600}td:first-child,td:nth-child(2){white-space:nowrap}
td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,.code{font:0.88em/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
ol,ul{padding-left:1.3em;margin:0}li{margin:0 0 8px;overflow-wrap:anywhere}
.left{color:var(--soft);font-size:.9em;margin-top:4px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.rule{stroke:var(--rule)}.line{fill:none;stroke:var(--one);stroke-width:2}
.other{fill:none;stroke:var(--two);stroke-width:2}
.limit{fill:none;stroke:var(--bad);stroke-width:2;stroke-dasharray:6 4}
.area{fill:var(--fill);stroke:var(--one);stroke-width:1.5}.dot{fill:var(--one)}
.compute{fill:var(--one)}.communication{fill:var(--two)}.exposed{fill:var(--bad)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:6px 0 0;
font-size:.88rem}.legend li{margin:0}.key{display:inline-block;width:20px;height:12px;
vertical-align:middle;margin-right:6px}
details{margin-top:10px}summary{cursor:pointer}
@media(max-width:640px){table.stack,table.stack tbody,table.stack tr,table.stack td{display:block}
table.stack thead{position:absolute;left:-9999px}table.stack td{border:0;padding:1px 0}
table.stack tr{border-bottom:1px solid var(--rule);padding:9px 0}
table.stack td.number{text-align:left}
table.stack td[data-h]:not(:empty)::before{content:attr(data-h)": ";color:var(--soft)}
td:nth-child(n){white-space:normal}td:first-child{font-weight:600}
svg text{font-size:14px}}
@media(min-width:800px){#timeline figure{max-width:640px}}
"""


def render(story: Story, report: Report) -> str:
    """Return the page."""
    sections = [
        ("tier", "Tier", f"<p>{escape(story.tier)}</p>"),
        ("passes", "Passes", _passes(story)),
        ("timeline", "The step's timeline", _timeline(story)),
        ("memory", "Memory over the step", _memory(story.memory)),
        ("over-time", "Over time", _over_time(story)),
        ("energy", "Energy", _energy(story)),
        ("next", "What to try next", _next(story)),
        ("settings", "Plan and settings", _settings(story, report)),
    ]
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>{inside}</section>'
        for name, title, inside in sections
    )
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>magi-train: report of a run</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>Report of a run</h1><p class="soft">magi-train; {escape(versions)}</p>'
        "</header>"
        f'<section id="summary"><p class="lead">{escape(" ".join(story.summary))}</p>'
        f"{_facts(story)}</section>{body}</main></body></html>\n"
    )


def _facts(story: Story) -> str:
    typical, facts = story.steps.typical_seconds(), []
    if typical:
        facts.append(("a typical step", duration(typical)))
    samples, tokens = rates(story.steps)
    if samples:
        facts.append(("samples a second, a rank", f"{samples:,.4g}"))
    if tokens:
        facts.append(("tokens a second, a rank", f"{tokens:,.0f}"))
    if story.exposed_ms is not None:
        facts.append(("exposed communication", f"{story.exposed_ms:.4g} ms"))
    if story.memory is not None:
        peak = story.memory.measured_mib or story.memory.planned_mib
        kind = "measured" if story.memory.measured_mib else "planned"
        facts.append((f"{kind} peak of memory", size(peak)))
    if story.joules_per_1000 is not None:
        facts.append(("energy, 1,000 samples", f"{story.joules_per_1000 / 1e3:.4g} kJ"))
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table of cells that are HTML already; on a phone a row is a block."""
    lines = []
    for row in rows:
        cells = "".join(
            f"<td{' class=number' if i in numbers else ''}"
            f"{f' data-h={chr(34)}{escape(heads[i])}{chr(34)}' if i else ''}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    return (
        f'<div class="wide"><table class="stack"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _passes(story: Story) -> str:
    if not story.passes:
        return "<p>No pass has run.</p>"
    rows = []
    for each in story.passes:
        left = "".join(f'<div class="left">left alone: {escape(text)}</div>' for text in each.left)
        gain = escape(each.gain) or '<span class="soft">not measured</span>'
        rows.append((escape(each.name), escape(each.stage), f"{escape(each.did)}{left}", gain))
    hint = _coded("Gains are measured where a pass or `Config(tune=True)` does so.")
    hint = f'<p class="soft">{hint}</p>'
    return _table(("pass", "stage", "what it did", "measured gain"), rows) + hint


def _figure(picture: str, caption: str) -> str:
    return (
        f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>" if picture else ""
    )


def _timeline(story: Story) -> str:
    picture = charts.lanes("What runs when in one step", story.timeline, unit="ms")
    if not picture:
        return "<p>No graph was captured, and there is no profiler's trace in the run folder.</p>"
    caption = story.timeline_from
    if story.exposed_ms is not None:
        caption += f"; {story.exposed_ms:.4g} ms of communication are exposed"
    return _figure(picture, caption[0].upper() + caption[1:] + ".")


def _memory(memory: Memory | None) -> str:
    if memory is None:
        return "<p>No graph was captured, so there is no plan of the step's memory.</p>"
    resident = sum(memory.resident_mib.values())
    last = max(1, len(memory.course_mib) - 1)
    unit, scale = ("GiB", 1 / 1024) if memory.planned_mib >= 1024 else ("MiB", 1.0)
    course = enumerate(memory.course_mib)
    share = [(100 * i / last, scale * (resident + mib)) for i, mib in course]
    series: list[tuple[str, str, charts.Points]] = [("area", "planned", share)]
    if resident:
        series.append(("other", "resident", [(0, scale * resident), (100, scale * resident)]))
    if memory.measured_mib is not None:
        top = scale * memory.measured_mib
        series.append(("limit", "measured peak", [(0, top), (100, top)]))
    turn = f"the backward begins at {memory.forward_part:.0%}"
    picture = charts.lines("Memory over one step", series, unit=unit, across=f"% of nodes; {turn}")
    held = ", ".join(f"{name} {size(mib)}" for name, mib in memory.resident_mib.items())
    caption = f"Planned peak {size(memory.planned_mib)}"
    caption += f", measured {size(memory.measured_mib)}" if memory.measured_mib else ""
    caption += f". Resident: {held}." if held else ". What is resident besides is not on record."
    caption += "".join(f" {sentence}" for sentence in memory.blocks)
    rows = [
        (size(float(each["mib"])), escape(str(each["node"])), _line(str(each["line"])))
        for each in memory.largest
    ]
    table = _table(("size", "node", "made by"), rows)
    return (
        f'<div class="grid">{_figure(picture, caption)}<div class="card"><h3>What to change</h3>'
        f"<p>{_coded(memory.advice)}</p></div></div><h3 style='margin-top:18px'>Largest tensors at "
        f"the peak</h3>{table}"
    )


def _line(line: str) -> str:
    short = escape(short_line(line)) or '<span class="soft">the compiler</span>'
    return f'<span class="code" title="{escape(line)}">{short}</span>'


def _over_time(story: Story) -> str:
    steps, figures = story.steps, []
    loss = [(step, value) for step, value in steps.loss]
    if loss:
        picture = charts.lines("Loss", [("line", "loss", loss)], unit="loss", across="step")
        figures.append(_figure(picture, "Rank 0's own loss."))
    typical = steps.typical_seconds()
    if typical:
        along = [1 + (i + 0.5) * steps.stride for i in range(len(steps.seconds))]
        unit, scale = ("ms", 1e3) if typical < 1 else ("s", 1.0)
        points = [(round(x), scale * each) for x, each in zip(along, steps.seconds, strict=True)]
        top = scale * min(max(steps.seconds), 3 * typical)
        series = [("line", "step time", points)]
        picture = charts.lines("Time of a step", series, unit=unit, across="step", limit=top)
        over = sum(each > 3 * typical for each in steps.seconds)
        caption = f"Typical {duration(typical)}, longest {duration(max(steps.longest))}"
        cut = f"; the axis ends below {over} point{'s' * (over > 1)}" if over else ""
        figures.append(_figure(picture, f"{caption}{cut}. The first step is left out."))
        samples, tokens = rates(steps)
        if samples:
            each = (tokens or samples) * typical
            fast = [(x, each / (y / scale)) for x, y in points if y]
            name = "tokens" if tokens else "samples"
            picture = charts.lines(
                "Throughput", [("line", f"{name} a second", fast)], unit=f"{name}/s", across="step"
            )
            figures.append(_figure(picture, "Of rank 0, in its typical batch."))
    if steps.memory_gib:
        course = [(step, gib) for step, gib in steps.memory_gib]
        picture = charts.lines(
            "Peak of memory", [("line", "peak so far", course)], unit="GiB", across="step"
        )
        figures.append(_figure(picture, f"Peak so far, {steps.memory_of}."))
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>' if inside else "<p>No step is on record.</p>"


def _energy(story: Story) -> str:
    if story.joules_per_1000 is None:
        why = "no GPU of this run counts its energy (NVML), or the run was too short"
        return f"<p>Unknown: {why}.</p>"
    return (
        f"<p>{story.joules_per_1000 / 1e3:.4g} kJ for 1,000 samples, on rank 0's own GPU; "
        f"{story.steps.joules_samples} samples took {(story.steps.joules or 0) / 1e3:.4g} kJ.</p>"
    )


def _coded(text: str) -> str:
    """Escape, and show what stands between backticks as code."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # one is left over: it is the user's
        return escape(text)
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _next(story: Story) -> str:
    if not story.advice:
        return "<p>Nothing in the report asks for a change.</p>"
    return f"<ol>{''.join(f'<li>{_coded(each)}</li>' for each in story.advice)}</ol>"


def _settings(story: Story, report: Report) -> str:
    given = [row for row in story.settings if row[2] != "default"]
    others = [row for row in story.settings if row[2] == "default"]
    heads = ("setting", "value", "from")
    parts = [_table(heads, _escaped(given)) if given else "<p>All settings are the defaults.</p>"]
    notes = "".join(f"<li>{escape(each)}</li>" for each in story.notes)
    parts.append(f"<h3>Notes</h3><ul>{notes}</ul>" if notes else "")
    parts.append(f"<details><summary>Defaults</summary>{_table(heads, _escaped(others))}</details>")
    plan = str(report)
    parts.append(
        f'<details><summary>The plan as text</summary><div class="code" '
        f'style="white-space:pre-wrap">{escape(plan)}</div></details>'
    )
    return "".join(parts)


def _escaped(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[escape(cell) for cell in row] for row in rows]
