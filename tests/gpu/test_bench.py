"""magi bench on GPUs: every peer there is for a toy case, and the figures that only GPUs give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_train.core.hardware import peak_flops
from magi_train.integrations.peers import DEFAULT

ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices"))])  # fmt: skip # noqa: E501
def test_each_peer_is_measured_or_says_why(tmp_path, ranks):
    command = [sys.executable, "-m", "magi_train.cli", "bench", "--case=toy", "--json"]
    command += ["--nproc", str(ranks), "--steps=5", "--cold-only", "--seconds=200"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    found = json.loads(done.stdout)
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == list(DEFAULT)
    eager = rows["eager"]
    for name, row in rows.items():
        if "failed" in row:
            # the toy has no linear that torchao would convert
            expected = ("needs the package", "ranks or more", "none is large enough")
            assert any(words in row["failed"] for words in expected), (name, row)
            continue
        assert row["peak_gib"] <= row["reserved_gib"]
        assert ("mfu" in row) == (peak_flops(torch.cuda.get_device_name()) is not None)
        assert ("exposed_comm_ms" in row) == (ranks > 1)
        if ranks > 1:
            assert 0 <= row["exposed_comm_ms"] <= row["comm_ms"]
        # bf16 rounding of another order of operations, a step's worth each
        assert row["loss"] == pytest.approx(eager["loss"], rel=torch.finfo(torch.bfloat16).eps)
    assert {"eager", "compile", "block-compile", "magi"} <= {
        name for name, row in rows.items() if "failed" not in row
    }
