"""Every example runs, alone and where it can on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "magi_train.cli", "run", "--nproc-per-node", "2", "-m"]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_demo_at_toy_size(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "examples.demo", "--size", "tiny", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("holds ") == 2
    assert "tier" in done.stdout
    assert "GRAPH" in done.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-m", "examples.loop"], ("loss 0.", "tier GRAPH on 1 rank")),
        ([*RUN, "examples.loop"], ("loss 0.", "tier GRAPH on 2 rank", "place_collectives")),
        ([sys.executable, "-m", "examples.export_inference"], ("largest difference",)),
        ([sys.executable, "-m", "examples.lightning_trainer"], ("tier GRAPH on 2 rank",)),
    ],
    ids=["loop", "loop on two ranks", "export", "lightning"],
)
def test_example(command, words, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for word in words:
        assert word in done.stdout, done.stdout[-2000:]
