"""The search for the largest batch, over made-up peaks and speeds."""

import pytest

from benchmarks import largest_batch
from benchmarks.largest_batch import FASTEST, search

GIB = 40.0


@pytest.fixture
def measured():
    """Make a search a `measure`: {variant: (GiB that are always there, GiB a row, speed)}."""

    def make(known, tried):
        def measure(variant, rows):
            base, a_row, speed = known[variant.partition(":")[0]]
            tried.append((variant, rows))
            peak = base + a_row * rows
            row = {"variant": variant, "rows": rows, "peak_gib": peak, FASTEST: speed}
            return row | {"failed": "out of memory"} if peak > GIB else row

        return measure

    return make


def test_the_largest_batches_are_found(measured):
    tried = []
    known = {"compile": (4.0, 0.5, 100.0), "block-compile": (4.0, 0.25, 90.0),
             "magi": (4.0, 0.1, 95.0)}  # fmt: skip
    found = search("bert", GIB, measured(known, tried))
    assert (found["compile rows"], found["block-compile rows"]) == (72, 144)
    assert ("compile", 76) in tried, "5 % more fails"
    assert (found["rows"], found["times_rows"], found["speed"]) == (288, 4.0, 0.95)
    assert ("magi:memory_budget_gib=38.8", 432) in tried, "the next one fails"


@pytest.mark.parametrize("limit", [33, 60, 68, 71, 72, 75, 90, 300])
def test_a_wrong_estimate_is_mended(limit, measured):
    measure = measured({"compile": (4.0, 0.5, 1.0)}, tried := [])

    def other(variant, rows):
        row = measure(variant, rows)
        row.pop("failed", None)
        return row | ({"failed": "CUDA out of memory"} if rows > limit else {})

    row = largest_batch.largest("compile", (16, 32), GIB, other)
    assert tried[2] == ("compile", 72)
    assert limit / 1.1 <= row["rows"] <= limit
    assert min(rows for _, rows in tried if rows > limit) <= max(1.1 * row["rows"], row["rows"] + 1)
    assert len(tried) <= 14


def test_what_fails_otherwise_is_not_taken_for_too_large(measured):
    measure = measured(dict.fromkeys(("compile", "block-compile"), (4.0, 0.5, 1.0)), [])

    def hangs(variant, rows):
        return measure(variant, rows) | ({"failed": "did not finish in 150 s"} if rows > 32 else {})

    found = search("bert", GIB, hangs)
    assert found["failed"] == "compile with 72 rows: did not finish in 150 s"
    assert found["compile rows"] == 0


@pytest.mark.parametrize(("speed", "rows"), [(84.0, 0), (86.0, 108)])
def test_what_is_too_slow_does_not_count(speed, rows, measured):
    known = {"compile": (4.0, 0.5, 100.0), "block-compile": (99.0, 1.0, 1.0),
             "magi": (4.0, 0.3, speed)}  # fmt: skip
    found = search("bert", GIB, measured(known, []))
    assert found["rows"] == rows
    assert found["block-compile rows"] == 0, "it does not train at all"


def test_a_peer_that_does_not_train_is_said(measured):
    known = dict.fromkeys(("compile", "block-compile"), (41.0, 1.0, 1.0))
    found = search("bert", GIB, measured(known, []))
    assert found["failed"] == "compile with 16 rows: out of memory"
