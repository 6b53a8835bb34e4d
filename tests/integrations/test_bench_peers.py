"""magi bench package.module:build: rows of peers, one that fails, and what they say together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_train.cli import main
from magi_train.integrations.peers import agrees, measure, table

ROOT = Path(__file__).parents[2]
BUILD = """
import torch
from torch import nn
def build():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), torch.randn(4, 8), loss
def loss(module, x):
    return (module(x) - x.sum(1, keepdim=True)).square().mean()
"""


@pytest.mark.full
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_peers_of_a_users_module(tmp_path, ranks):
    (tmp_path / "mine.py").write_text(BUILD)
    command = [sys.executable, "-m", "magi_train.cli", "bench", "mine.py:build", "--json"]
    command += ["--steps=3", "--warm-up=2", "--nproc", ranks]
    command += ["--peers", "eager", "block-compile", "magi", "--output", str(tmp_path / "o.json")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "o.json").read_text())
    rows = found["rows"]
    assert "no repeated blocks" in rows["block-compile"]["failed"], "a peer that fails says why"
    assert rows["magi"]["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-4)
    assert rows["magi"]["loss"] < rows["magi"]["first_loss"]
    assert f"on {ranks} rank(s)" in rows["magi"]["report"][0]


def test_a_wrong_name_is_refused_before_anything_runs(tmp_path, capsys):
    path = tmp_path / "named_so.py"
    path.write_text(BUILD)
    assert main(["bench", f"{path}:biuld"]) == 2
    assert "has no function 'biuld', only build, loss" in capsys.readouterr().err
    assert main(["bench", f"{path}:build", "--peers", "eagre"]) == 2
    assert "--peers takes eager, compile, block-compile, magi" in capsys.readouterr().err


def test_what_rows_say_together():
    def row(ms, loss):
        names = ("step_ms", "step_ms_p10", "step_ms_p90", "peak_gib", "first_step_s")
        return {**dict.fromkeys(names, ms), "back_to_back_ms": ms, "rows_per_second": 1.0,
                "loss": loss}  # fmt: skip

    rows = {"eager": row(30.0, 1.0), "compile": row(20.0, 1.0), "magi": row(10.0, 1.01)}
    text = table(rows, 0.02)
    assert "magi is 2.000 times as fast as compile, the best peer" in text
    assert "its last loss agrees with that of eager" in text
    assert "DIFFERS" in table(rows, 0.001)
    assert agrees(rows, 0.02)
    assert not agrees(rows, 0.001)
    failed = {"eager": {"failed": "Traceback\nout of memory"}, "magi": row(10.0, 1.0)}
    assert "eager         failed: out of memory" in table(failed, 0.02)
    assert agrees(failed, 0.02)
    assert not agrees({"eager": row(1.0, 1.0), "magi": {"failed": "x"}}, 0.02)


def test_a_measured_step_is_counted():
    seen = []

    def step(i):
        seen.append(i)
        return torch.tensor(float(i))

    found = measure(step, torch.device("cpu"), warm_up=3, steps=4, began=0.0)
    assert seen == list(range(3 + 2 * 4))
    assert (found["first_loss"], found["loss"]) == (0.0, 10.0)
    assert found["step_ms_p10"] <= found["step_ms"] <= found["step_ms_p90"]
