"""SLURM: how ranks are found, and that two launchers never start each other's ranks."""

import pytest
import torch

from magi_train.cli import main
from magi_train.integrations.slurm import allocation, first_host

JOB = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}
STEP = JOB | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu08", "gpu07"),
        ("gpu[07-08]", "gpu07"),
        ("gpu[3,5-9],login", "gpu3"),
        ("rack1-[01-04]-ib,x", "rack1-01-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.fixture
def dry_run(tmp_path, capsys, monkeypatch):
    """Return what `magi run --dry-run` prints in a SLURM environment."""
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def run(environment, *options):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert main(["run", "--dry-run", *options, str(script), "--lr=3"]) == 0
        done = capsys.readouterr()
        return done.out.replace(str(script), "train.py"), done.err

    return run


def test_srun_with_a_task_for_each_rank_makes_them(dry_run):
    tasks = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    place = allocation(STEP | tasks)
    assert place.environment() == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "21234",
    }
    out, err = dry_run(STEP | tasks, "--replace-ddp", "--magi.tier=eager")
    assert "srun has made 8 ranks, this is rank 5; no launcher is started" in err
    assert out.startswith("MAGI_SETTINGS=tier=eager RANK=5 ")
    assert out.endswith("magi_train.integrations.bootstrap --replace-ddp -- train.py --lr=3\n")


def test_srun_with_a_task_for_each_node_meets_at_the_first(dry_run):
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    out, err = dry_run(STEP | tasks)
    assert "SLURM job 41234: 2 nodes, which meet at gpu07" in err
    for option in ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=gpu07:21234"):
        assert f"{option} " in out
    assert "--nproc-per-node=4 " in out
    assert "standalone" not in out
    out, _ = dry_run(STEP | tasks, "--nnodes=1", "--standalone")
    assert "rdzv" not in out, "options that are given win"
    assert "--nnodes=2" not in out


def test_a_batch_script_without_srun_starts_one_node_and_says_so(dry_run):
    out, err = dry_run(JOB | {"SLURM_PROCID": "0"})
    assert "--standalone" in out
    assert "has 2 nodes, and this starts ranks on one" in err
    assert "srun --ntasks-per-node=1 magi run" in err


def test_one_node_or_no_job_is_nothing_special(dry_run):
    assert allocation({"SLURM_CLUSTERS": "x"}) is None
    one = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    out, err = dry_run(one)
    assert "--standalone" in out
    assert "SLURM" not in err
