"""`magi run`: the script's own world, failure drills on two ranks, the DDP drop-in.

Drills in processes of their own are slow; what they share is tested in parts in test_failures.py,
test_watchdog.py and test_preflight.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_train.cli import main

ROOT = Path(__file__).parents[2]
SHOWS = """
import os, sys, torch.distributed as dist
dist.init_process_group("gloo")
folder = os.path.basename(sys.path[0])
mine = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MAGI_SETTINGS")]
sys.stdout.write(f"rank {dist.get_rank()} {sys.argv[1:]} {__name__} {folder} {mine}\\n")
dist.barrier(); dist.destroy_process_group()
"""
FAILS = """
import sys, torch, torch.distributed as dist, magi_train
dist.init_process_group("gloo")
model = magi_train.prepare(torch.nn.Linear(4, 4), config=magi_train.Config(tier="eager"))
for step in range(4):
    if dist.get_rank() == int(sys.argv[1]) and step == 2:
        raise ValueError("boom on rank " + sys.argv[1])
    model(torch.ones(2, 4)).sum().backward()
"""
KILLED = """
import os, signal, torch, torch.distributed as dist
dist.init_process_group("gloo")
for step in range(1, 100):
    if step == 5 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(3))
"""
HANGS = """
import os, sys, time, torch, torch.distributed as dist
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    sys.exit(0)
dist.init_process_group("gloo")
for step in range(3):
    dist.all_reduce(torch.ones(4))
def waits_for_nothing():
    time.sleep(1000)
if dist.get_rank() == 1:
    waits_for_nothing()
dist.all_reduce(torch.ones(7))
"""
RESTARTS = """
import os, signal, sys, time, torch, torch.distributed as dist
again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
if again and os.environ["RANK"] == "0":
    time.sleep(3)  # rank 1 looks for rank 0's address before there is a new one
dist.init_process_group("gloo")
if not again and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
total = torch.ones(1)
dist.all_reduce(total)
sys.stdout.write(f"sum {total.item()}\\n")
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


def magi(tmp_path, script, *options, args=(), ok=True, threads=True):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "magi_train.cli", "run", *options, str(path), *args],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)}
        | ({"OMP_NUM_THREADS": "1"} if threads else {}),
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def test_the_script_is_main_with_its_own_arguments(tmp_path):
    options = ("--nproc", "2", "--magi.fusion.loss=false", "--hang-timeout", "0")
    done = magi(tmp_path, SHOWS, *options, args=("--lr", "3"), threads=False)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    mine = [str(threads), "fusion.loss=false"]
    for rank in (0, 1):
        assert f"rank {rank} ['--lr', '3'] __main__ {tmp_path.name} {mine}" in done.stdout
    assert f"magi run: OMP_NUM_THREADS={threads}" in done.stderr, "what is set is said"
    found = re.search(r"pre-flight ok in ([0-9.]+) s: 2 ranks, gloo all-reduce", done.stderr)
    assert found, done.stderr
    assert float(found[1]) < 5


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.full)])
def test_the_first_failing_rank_comes_first(tmp_path, rank):
    """Rank 0 hosts what the others learn of its failure from, so they end before it does."""
    options = ("--nproc-per-node", "2", "--no-preflight")
    err = magi(tmp_path, FAILS, *options, args=(str(rank),), ok=False).stderr
    assert "pre-flight" not in err
    summary = err[err.index("magi run: rank") :]
    assert summary.startswith(f"magi run: rank {rank} failed first (")
    assert f"ValueError: boom on rank {rank}" in summary
    assert "script.py" in summary[: summary.index("boom")]
    assert err.count("Traceback") == 1, "once, and the others are folded: " + err
    assert "bootstrap.py" not in err
    assert "runpy" not in err


def test_a_rank_that_is_killed_is_the_root_cause(tmp_path):
    err = magi(tmp_path, KILLED, "--nproc", "2", ok=False).stderr
    summary = err[err.index("magi run: rank") :]
    assert summary.startswith("magi run: rank 1 failed first (ended by SIGKILL):")
    assert "out-of-memory" in summary
    assert "Traceback" not in err, "the connection that broke on rank 0 is a symptom"


@pytest.mark.full
def test_a_rank_that_hangs_is_shown_and_the_job_restarted(tmp_path):
    options = ("--nproc", "2", "--hang-timeout", "3", "--no-preflight")
    err = magi(tmp_path, HANGS, *options, ok=False).stderr
    assert "every rank has stood still for 3 s; the job is ended" in err
    zero, one = err[err.index("rank 0 (still") :].split("rank 1 (still")
    assert "gloo:all_reduce of [7], number 4 in 0 default_pg" in zero
    assert "not ended" in zero
    assert "in waits_for_nothing" in one
    assert "gloo:all_reduce of [4], number 3" in one
    assert "because it hung" in err
    magi(tmp_path, HANGS, *options, "--max-restarts", "1")


@pytest.mark.full
def test_restarted_ranks_meet_each_other_and_not_those_that_ended(tmp_path):
    done = magi(tmp_path, RESTARTS, "--nproc", "2", "--max-restarts", "1")
    assert done.stdout.count("sum 2.0") == 2
    assert done.stderr.count("pre-flight ok") == 1, "before the first start, in a file"


@pytest.mark.full
def test_logs_of_each_rank_are_kept(tmp_path):
    logs = tmp_path / "logs"
    options = ("--nproc", "2", "--log-dir", str(logs), "--no-preflight")
    err = magi(tmp_path, KILLED, *options, ok=False).stderr
    assert "rank 1 failed first (ended by SIGKILL)" in err
    zero = next(iter(logs.glob("*/attempt_0/0/stderr.log"))).read_text()
    assert "Traceback" in zero, "a log holds the whole traceback"


def in_process(*arguments, status=2):
    """Run a command that ends before it starts a process."""
    assert main(["run", *arguments]) == status


def test_wrong_options_are_named_before_anything_starts(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("")
    for arguments, words in [
        (
            ["--nproc-per-nod", "2", script],
            "no option '--nproc-per-nod'; did you mean '--nproc-per",
        ),
        (["--bogus", "2", script], "no option '--bogus'; `magi run --help` lists them"),
        (["--magi.fusion.los=false", script], "did you mean 'fusion.loss'?"),
        (["--magi.tier", script], "'tier' must be key=value"),
        (["--magi.tier=eager", "--magi.precision=fp8", script], "settings from command line"),
        (["--nproc", "many", script], "--nproc-per-node many: Unsupported"),
        ([tmp_path / "none.py"], "there is no script"),
    ]:
        in_process(*map(str, arguments))
        assert words in capsys.readouterr().err


def test_a_dry_run_says_what_would_start(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it was started')")
    options = ["--dry-run", "--nproc=4", "--magi.tier=eager", "--max-restarts", "2"]
    in_process(*options, str(script), "--magi.tier=x", "--nproc", "9", status=0)
    out, err = capsys.readouterr()
    assert out == (
        f"torchrun --nproc-per-node=4 --standalone --max-restarts=2 {script} --magi.tier=x "
        "--nproc 9\n"
    )
    assert "OMP_NUM_THREADS=3" in err
    assert "MAGI_SETTINGS=tier=eager" in err
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    in_process("--dry-run", "--log-dir", "logs", str(script), status=0)
    out, err = capsys.readouterr()
    assert "OMP_NUM_THREADS" not in err, "what the user has set stays"
    assert "--nproc-per-node=3" in out, "torchrun's own variable"
    assert "--tee=3" in out
    monkeypatch.delenv("PET_NPROC_PER_NODE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    in_process("--dry-run", "--nproc", "auto", str(script), "--nproc-per-node", "9", status=0)
    assert "--nproc-per-node=8" in capsys.readouterr().out
    in_process("--dry-run", "--nproc-per-node", "5", str(script), status=0)
    assert "--nproc-per-node=5" in capsys.readouterr().out
    in_process("--dry-run", str(script), "--nproc-per-node", "9", status=0)
    assert "--nproc-per-node=8" in capsys.readouterr().out, "what stands behind is the script's"


def test_replace_ddp_trains_an_unmodified_script_the_same(tmp_path):
    plain = magi(tmp_path, TUTORIAL, "--nproc-per-node", "2").stdout.split()
    ours = magi(tmp_path, TUTORIAL, "--replace-ddp", "--nproc-per-node", "2").stdout.split()
    assert plain[0].startswith("torch.nn.parallel")
    assert ours[0] == "magi_train.api"
    assert [float(x) for x in ours[1:]] == pytest.approx([float(x) for x in plain[1:]], rel=1e-5)
