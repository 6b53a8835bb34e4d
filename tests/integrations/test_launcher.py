"""`magi run`: the script's own world, the real traceback first, the DDP drop-in; `magi explain`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from magi_train import Report
from magi_train.core.report import PassRow

ROOT = Path(__file__).parents[2]
SHOWS = """
import os, sys, torch.distributed as dist
dist.init_process_group("gloo")
folder = os.path.basename(sys.path[0])
sys.stdout.write(f"rank {dist.get_rank()} {sys.argv[1:]} {__name__} {folder}\\n")
dist.barrier(); dist.destroy_process_group()
"""
FAILS = """
import torch, torch.distributed as dist, magi_train
dist.init_process_group("gloo")
model = magi_train.prepare(torch.nn.Linear(4, 4), config=magi_train.Config(tier="eager"))
for step in range(4):
    if dist.get_rank() == 1 and step == 2:
        raise ValueError("boom on rank 1")
    model(torch.ones(2, 4)).sum().backward()
"""
TUTORIAL = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DDP(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(5):
    g = torch.Generator().manual_seed(10 * step + dist.get_rank())
    x = torch.randn(4, 8, generator=g)
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    print(type(model).__module__, f"{float(loss):.5f}", float(model.module[0].weight.sum()))
dist.barrier()
del model  # or DDP's reducer ends the gloo group while it holds the GIL: pytorch issue 56297
dist.destroy_process_group()
"""


def magi(tmp_path, script, *options, args=(), ok=True):
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "magi_train.cli", "run", *options, str(path), *args],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def test_the_script_is_main_with_its_own_arguments(tmp_path):
    out = magi(tmp_path, SHOWS, "--nproc-per-node", "2", args=("--lr", "3")).stdout
    for rank in (0, 1):
        assert f"rank {rank} ['--lr', '3'] __main__ {tmp_path.name}" in out


def test_the_first_failing_rank_comes_first(tmp_path):
    err = magi(tmp_path, FAILS, "--nproc-per-node", "2", ok=False).stderr
    summary = err[err.index("magi run: rank") :]
    assert summary.startswith("magi run: rank 1 failed first (exit status 1):")
    assert "ValueError: boom on rank 1" in summary
    assert "script.py" in summary[: summary.index("boom")]
    assert summary.count("Traceback") <= 1, "the others are folded"


def test_replace_ddp_trains_an_unmodified_script_the_same(tmp_path):
    plain = magi(tmp_path, TUTORIAL, "--nproc-per-node", "2").stdout.split()
    ours = magi(tmp_path, TUTORIAL, "--replace-ddp", "--nproc-per-node", "2").stdout.split()
    assert plain[0].startswith("torch.nn.parallel")
    assert ours[0] == "magi_train.api"
    assert [float(x) for x in ours[1:]] == pytest.approx([float(x) for x in plain[1:]], rel=1e-5)


def explain(*args):
    return subprocess.run(
        [sys.executable, "-m", "magi_train.cli", "explain", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_explain_shows_a_report(tmp_path):
    path = tmp_path / "report.json"
    report = Report(tier="region", reason="line 7 prints")
    report.add(PassRow("some_pass", "joint", {"saved_mib": 3.0}, 0.1))
    report.save(path)
    assert Report.load(path) == report
    out = explain(path).stdout
    for words in ("tier REGION", "line 7 prints", "some_pass", "saved_mib=3.0"):
        assert words in out
    assert '"tier": "region"' in explain(path, "--json").stdout


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"rows": 3}'])
def test_explain_names_a_file_that_is_no_report(tmp_path, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    done = explain(path)
    assert done.returncode == 2
    assert f"{path} is not a report of magi-train" in done.stderr
    assert "Traceback" not in done.stderr
