"""The report's page: well-formed, whole, self-contained, safe; its pictures tell the numbers."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from magi_train import Report
from magi_train.cli import main
from magi_train.core.report import PassRow
from magi_train.integrations import charts, page
from magi_train.integrations.advice import next_steps, short_line
from magi_train.integrations.explain import plain, sparkline
from magi_train.integrations.story import tell
from magi_train.integrations.trace import difference, find_trace, read_step, total, union
from tests.integrations.run_report import HOSTILE, LINE, run_report, trace_events

SECTIONS = [
    "summary",
    "tier",
    "passes",
    "timeline",
    "memory",
    "over-time",
    "energy",
    "next",
    "settings",
]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(html.parser.HTMLParser):
    """Checks that tags match, and collects what the page consists of."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.words, self.links = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        assert len(given) == len(attributes), f"{tag} has an attribute twice"
        self.ids += [given["id"]] if "id" in given else []
        self.links += [v for k, v in attributes if k in ("href", "src", "srcset", "action")]
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.words.append(data)


def rendered(report, trace=None):
    return page.render(tell(report, trace), report)


def test_the_page_is_whole_and_needs_nothing_else():
    text = rendered(run_report(), read_step(trace_events(), "t.json"))
    found = Reader(text)
    assert set(SECTIONS) <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert not found.links
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    pictures = re.findall(r"<svg role=.*?</svg>", text, re.S)
    assert len(pictures) == 6
    for each in pictures:
        assert re.search(r"<title id=\"(\w+)\">.+?</title><desc id=\"\w+\">.+?</desc>", each)
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_text_from_a_run_is_text():
    text = rendered(run_report())
    words = "".join(Reader(text).words)
    assert "<script" not in text
    assert words.count("<script>") >= 8  # reason, note, node, setting's source, version, ...
    for report in (Report(), run_report()):
        report.reason = report.tier = "</style></svg>" + HOSTILE
        Reader(rendered(report))


def test_an_empty_report_has_every_section_and_says_what_is_unknown():
    text = rendered(Report())
    assert set(SECTIONS) <= set(Reader(text).ids)
    for words in ("No step of the run", "No pass has run", "No graph was captured", "Unknown:"):
        assert words in text


def test_the_account_tells_the_numbers():
    report = run_report()
    story = tell(report, read_step(trace_events(), "t.json"))
    assert "101 steps on 2 ranks took 100 ms each, 80 samples a second" in story.summary[0]
    assert "REGION" in story.summary[1]
    assert "6.25 kJ" in story.summary[2]
    assert story.exposed_ms == pytest.approx(1.5)
    gains = {each.name: each.gain for each in story.passes}
    assert gains["canonicalize_attention"] == "+2.5 ms a step without it; kept"
    left = {each.name: each.left for each in story.passes}["canonicalize_attention"]
    assert left == [f"3 x its mask is an input {HOSTILE}"]
    assert story.memory.planned_mib == 600
    assert story.memory.measured_mib == 512
    assert "what the compiler made without a line of yours holds 460 MiB" in story.memory.advice
    assert story.settings[0] == ("comm.bucket_mib", "25.0", HOSTILE)
    planned = tell(report)
    assert planned.exposed_ms is None
    assert planned.timeline[1][2] == [(6.0, 18.0)]  # two blocks
    assert "roofline" in planned.timeline_from


def test_what_to_try_next_comes_from_what_the_report_holds():
    acts = next_steps(run_report(), read_step(trace_events(), "t.json"))
    for words in (
        "keeps the step out of one graph: line 3",
        "15% of the profiled step waits for communication: try `CommConfig(compression='safe')`",
        "`Config(shard_optimizer=True)` takes 100 MiB",
        "Change the line named here",
        "canonicalize_attention left something alone",
        "9 times a typical one",
        "The first step took 40 s",
    ):
        assert any(words in act for act in acts), words
    quiet = Report(tier="graph")
    assert next_steps(quiet, None) == []


def test_spans():
    assert union([(3, 4), (0, 1), (1, 2), (3.5, 5)]) == [(0, 2), (3, 5)]
    assert difference([(0, 10)], [(2, 3), (5, 6), (9, 12)]) == [(0, 2), (3, 5), (6, 9)]
    assert difference([(0, 1), (4, 8)], [(0, 5), (7, 9)]) == [(5, 7)]
    step = read_step(trace_events(), "t")
    assert (total(step.compute), total(step.communication)) == (6.0, 5.5)
    assert step.step_ms == 10.0
    assert read_step([{"ph": "X", "cat": "cpu_op", "name": "x", "ts": 0, "dur": 1}], "t") is None


def test_copies_and_barriers_between_gpus_are_communication():
    events = [
        {"ph": "X", "cat": cat, "name": name, "ts": 1000.0 * i, "dur": 1000.0}
        for i, (cat, name) in enumerate([
            ("kernel", "gemm"),
            ("gpu_memcpy", "Memcpy PtoP (Device -> Device)"),
            ("kernel", "c10d::symmetric_memory::barrier_kernel(unsigned int**, int)"),
            ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)"),
        ])
    ]  # fmt: skip
    step = read_step(events, "t")
    assert step.compute == [(0, 1)]
    assert step.communication == step.exposed == [(1, 3)]


def test_broken_traces_are_passed_over(tmp_path):
    good = tmp_path / "rank0.pt.trace.json"
    good.write_text(json.dumps({"traceEvents": trace_events()}))
    (tmp_path / "magi_report.json").write_text("{}")
    for name, data in (("trace.json", b"{"), ("trace.json.gz", b"no"), ("b.trace.json", b"[]")):
        (tmp_path / name).write_bytes(data)
    assert find_trace(tmp_path).file == good.name


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1e-9), (-3, 7), (0, 3.7e12), (5, 5)])
def test_ticks_hold_the_values(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7
    assert "nan" not in charts.lines(
        "t", [("line", "l", [(1, low), (2, high)])], unit="", across=""
    )


def test_values_that_are_no_numbers_are_left_out():
    course = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    text = charts.lines("t", [("line", "l", course)], unit="", across="step")
    assert text.count(",") >= 2
    points = re.search(r'points="([^"]*)"', text).group(1)
    assert len(points.split()) == 2
    report = run_report()
    report.steps.loss[3][1] = float("nan")
    Reader(rendered(report))


def test_text_forms(tmp_path, capsys):
    assert sparkline([0, 1, 2]) == "▁▄█"
    assert len(sparkline(range(1000))) <= 48
    assert sparkline([0, float("nan"), 2, float("inf")]) == "▁█"
    assert sparkline([]) == ""
    assert short_line(LINE) == "model.py:7: return self.down(self.up(x))"
    assert short_line("something else") == "something else"
    text = plain(tell(run_report()), run_report())
    for words in ("101 steps", "tier REGION", "planned peak", "What to try next", "model.py:7"):
        assert words in text
    run_report().save(tmp_path / "magi_report.json")
    assert main(["explain", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tier"] == "region"
    assert told["explained"]["memory"]["planned_mib"] == 600


def test_the_command_writes_the_page(tmp_path, capsys):
    run_report().save(tmp_path / "magi_report.json")
    assert main(["explain", str(tmp_path), "--html"]) == 0
    written = tmp_path / "magi_report.html"
    assert capsys.readouterr().out == f"{written}\n"
    Reader(written.read_text())
    assert main(["explain", str(tmp_path), "--html", str(written / "no_folder")]) == 2
    assert "the page cannot be written" in capsys.readouterr().err


def contrast(first, second):
    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_light_and_dark():
    blocks = re.findall(r":root\{(.*?)\}", page.STYLE, re.S)
    assert len(blocks) == 2
    for block in blocks:
        colors = dict(re.findall(r"--(\w+):(#\w{3,6})\b", block))
        full = {
            k: "#" + "".join(2 * c for c in v[1:]) if len(v) == 4 else v for k, v in colors.items()
        }
        for text in ("text", "soft", "one", "two", "bad"):
            for ground in ("back", "card"):
                assert contrast(full[text], full[ground]) >= 4.5, (text, ground, block)


@pytest.mark.full
@pytest.mark.parametrize("width", [375, 1280])
def test_in_a_browser_nothing_scrolls_sideways(tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    inside = html.escape(rendered(run_report(), read_step(trace_events(), "t.json")))
    script = "d=f.contentDocument.documentElement;document.body.id='w'+d.scrollWidth"
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<body><iframe id=f width={width} height=2000 style="border:0" srcdoc="{inside}"></iframe>'
        f"<script>onload=()=>{{{script}}}</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    flags += ["--window-size=1400,2000", "--hide-scrollbars", "--dump-dom"]
    out = subprocess.run([browser, *flags, wrapper.as_uri()], capture_output=True, text=True)
    assert re.findall(r'<body id="w(\d+)"', out.stdout) == [str(width)], out.stderr[-2000:]


def test_blocks_that_save_less_than_the_others_are_told():
    report = run_report()
    variants = [
        {"blocks": 3, "recompute_ms": 0.5, "saved_gib": 1 / 1024},
        {"blocks": 5, "recompute_ms": 0.25, "saved_gib": 2.0},
    ]
    told = (
        "Each of the first 3 of 8 blocks saves less and recomputes more (1 MiB and 0.5 ms) than "
        "each of the others (2 GiB and 0.25 ms)."
    )
    plan = {"planned_gib": 1.0, "blocks": 8, "lean_blocks": 0, "variants": variants[1:]}
    report.add(PassRow("fit_budget", "joint", plan, 0.0))
    assert not tell(report).memory.blocks
    report.add(PassRow("fit_budget", "joint", {**plan, "lean_blocks": 3, "variants": variants}, 0))
    assert tell(report).memory.blocks == [told]
    assert told in rendered(report)
    assert told in plain(tell(report), report)
