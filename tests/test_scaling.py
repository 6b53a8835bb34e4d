"""The scaling benchmark's own arithmetic, and what it says where GPUs are missing."""

import argparse

import pytest

from benchmarks import scaling
from benchmarks.scaling import FASTEST, PEERS, SMALL, add_efficiency, measured


def test_efficiency_is_the_share_of_the_speed_on_one_gpu():
    ours = SMALL[1]
    figures = {(ours, 1): 100.0, (PEERS[0], 1): 80.0, (ours, 2): 95.0, (PEERS[0], 2): 60.0,
               (PEERS[1], 2): 76.0}  # fmt: skip
    rows = [{"variant": v, "gpus": n, "case": "a", FASTEST: s} for (v, n), s in figures.items()]
    rows += [{"variant": ours, "gpus": 2, "case": "b", FASTEST: 7.0}]
    rows += [{"variant": ours, "gpus": 4, "case": "a", "failed": "gone"}]
    add_efficiency(rows)
    found = {(r["variant"], r["gpus"], r["case"]): r for r in rows}
    assert found[ours, 2, "a"]["efficiency"] == pytest.approx(0.95)
    assert found[PEERS[1], 2, "a"]["efficiency"] == pytest.approx(0.95), "beside block-compile"
    assert found[ours, 2, "a"]["to_the_best_peer_back_to_back"] == pytest.approx(95 / 76)
    assert found[ours, 1, "a"]["to_the_best_peer_back_to_back"] == pytest.approx(100 / 80)
    alone = found[ours, 2, "b"], found[ours, 4, "a"], found[PEERS[0], 1, "a"]
    assert not any("efficiency" in r for r in alone)


def test_missing_gpus_are_rows_that_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(scaling, "measure_all", lambda *_: pytest.fail("there are too few"))
    rows = measured("llama-1b", 8, PEERS, argparse.Namespace(), tmp_path)
    assert {r["failed"] for r in rows} == {"needs 8 GPUs, there are 2"}
    assert [r["variant"] for r in rows] == list(PEERS)
