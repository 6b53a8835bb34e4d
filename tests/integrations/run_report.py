"""A report as a long run leaves it, and a profiler's trace, made up for tests of the page."""

from magi_train import Report
from magi_train.core.record import Steps
from magi_train.core.report import PassRow

HOSTILE = '<script>alert("1")</script> & `x` \'"'
LINE = 'File "/home/user/model.py", line 7, in forward return self.down(self.up(x))'


def run_report() -> Report:
    """Return a report with everything in it, hostile text in every name."""
    report = Report(tier="region", reason=f"line 3 prints {HOSTILE}", world_size=2)
    report.versions["gpus"] = HOSTILE
    report.settings = {"tier": "auto", "comm": {"compression": None, "bucket_mib": 25.0}}
    report.sources = {"comm.bucket_mib": HOSTILE}
    report.add(PassRow("communication_plan", "run_time", {"buckets": 4, "wire_bytes": 2**22}, 0.0))
    left = [["sdpa", f"its mask is an input {HOSTILE}"]] * 3
    report.add(
        PassRow("canonicalize_attention", "pre_grad", {"causal": ["a"], "left_alone": left}, 0)
    )
    times = {"all": 10.0, "without attention": 12.5}
    report.add(PassRow("tune", "run_time", {"dropped": [], "milliseconds": times}, 0.0))
    largest = [{"mib": 96.0 - i, "node": HOSTILE, "line": LINE if i % 2 else ""} for i in range(10)]
    picture = {
        "peak_mib": 300.0, "at": "mm", "course_mib": [10.0, 200.0, 300.0, 80.0],
        "forward_part": 0.5, "resident_mib": {}, "largest": largest,
        "forward_ms": 3.0, "backward_ms": 6.0, "blocks": 2,
    }  # fmt: skip
    report.add(PassRow("step_memory", "joint", picture, 0.0))
    report.note(f"some steps of {HOSTILE} ran uncompiled: a list")
    report.steps = Steps(
        count=101,
        first_seconds=40.0,
        seconds=[0.1] * 99 + [0.9],
        longest=[0.1] * 99 + [0.9],
        samples=800,
        tokens=102400,
        loss=[[i, 4.0 - i / 50] for i in range(0, 101, 5)],
        memory_gib=[[1, 0.25], [100, 0.5]],
        memory_of="allocated on the device",
        joules=5000.0,
        joules_samples=800,
        resident_mib={"parameters": 100.0, "optimizer state": 200.0},
    )
    return report


def trace_events() -> list[dict[str, object]]:
    """Return two profiled steps of 10 ms: the last has 1.5 ms of exposed communication."""
    events: list[dict[str, object]] = []

    def add(cat: str, name: str, start: float, stop: float) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": start, "dur": stop - start})

    for begin in (0.0, 10_000.0):
        number = int(begin / 10_000)
        add("user_annotation", f"ProfilerStep#{number}", begin, begin + 10_000)
        add("kernel", "gemm", begin + 1000, begin + 5000)
        add("kernel", "fused", begin + 4000, begin + 7000)
        add("kernel", "ncclDevKernel_AllReduce", begin + 3000, begin + 7500 + 1000 * number)
    add("cpu_op", "aten::mm", 0, 5)
    return events
