"""The benchmark of inference: rows from processes, ratios, and why a process has left none."""

import json
import sys

import pytest

from benchmarks import inference, inference_runners
from benchmarks.inference_runners import Task


def task(variant, case="toy-bert"):
    return Task(case, variant, "cpu", 0.05, 8, 4, 12)


def test_rows_and_ratios_of_a_whole_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "record.json"
    words = ["--cases", "toy-bert", "--variants", "eager", "magi-program", "--seconds", "0.05"]
    monkeypatch.setattr(sys, "argv", ["inference", *words, "--output", str(file)])
    monkeypatch.setattr(inference.torch.cuda, "is_available", lambda: False)
    inference.main()
    rows = json.loads(file.read_text())["rows"]
    assert [(r["variant"], r["batch"]) for r in rows] == [
        (v, b) for v in ("eager", "magi-program") for b in inference.ALL["toy-bert"].batches
    ]
    for row in rows:
        assert 0 < row["max_relative_error"] < 0.05, "bfloat16 beside float32"
        assert row["p50_ms"] <= row["p99_ms"]
        assert row["rows_per_second"] > 0
        assert (row["to_eager"] == 1) == (row["variant"] == "eager")
    printed = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["p50_ms"] for line in printed[:4]] == [r["p50_ms"] for r in rows]
    assert printed[4].startswith("| case | variant | batch |")


def test_what_fails_is_a_row_that_says_why():
    made = inference_runners.variants(inference.ALL["toy-llama"])
    assert made[0] == "eager"
    (row,) = inference.run(task("compile", "toy-llama"), 120)
    assert "compiles decode steps on accelerators only" in row["failed"]
    rows = inference.run(task("eager"), 1)
    assert [r["batch"] for r in rows] == [1, 4]
    assert all("--budget is used up" in r["failed"] for r in rows)


def test_a_process_that_dies_is_named_by_what_killed_it():
    log = "loading\nFatal Python error: Segmentation fault\n\nThread 0x1:\n  File a\n"
    assert inference.reason("  File a", log) == "Fatal Python error: Segmentation fault"
    assert inference.reason("did not finish in 3 s", "Traceback") == "did not finish in 3 s"


def test_ratios_are_to_the_same_case_and_batch():
    def row(variant, batch, ms, **more):
        return {"case": "a", "variant": variant, "batch": batch, "p50_ms": ms} | more

    rows = [row("eager", 1, 8.0, peak_mib=10.0), row("eager", 9, 1.0), row("peer", 1, 4.0),
            row("magi-program", 1, 2.0, peak_mib=5.0),
            {"case": "a", "variant": "magi-pt2", "batch": 1, "failed": "no"}]  # fmt: skip
    found = inference.compared(rows)
    assert found[3]["to_eager"] == 4
    assert found[3]["to_best_peer"] == 2
    assert found[3]["peak_to_eager"] == 0.5
    assert found[1]["to_best_peer"] == 1
    assert "to_eager" not in found[4]
    (alone,) = inference.compared([row("magi-program", 1, 2.0)])
    assert "to_eager" not in alone
    assert "to_best_peer" not in alone


def test_a_result_that_is_no_number_is_infinitely_far():
    import torch

    nan = torch.tensor([1.0, float("nan")])
    assert inference_runners.off(nan, [torch.ones(2).double()]) == float("inf")
    assert inference_runners.off(torch.tensor([1.0, 3.0]), [torch.tensor([2.0, 4.0])]) == 0.25


@pytest.mark.parametrize("case", sorted(inference.ALL))
def test_every_case_has_eager_and_ours(case):
    assert {"eager", "magi-program", "magi-pt2"} <= {
        *inference_runners.variants(inference.ALL[case])
    }
