"""Trainer(strategy="magi") without an import, from both Lightnings, against strategy="ddp"."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.close import tolerance

SCRIPT = Path(__file__).with_name("lightning_script.py")
ROOT = Path(__file__).parents[2]
DDP = "ddp_find_unused_parameters_true"  # the script has an unused layer


def run(folder, namespace, strategy, mode="plain", devices=2, launcher=(), env=None):
    """Run the script in its own processes; return what rank 0 wrote."""
    import os

    out = folder / f"{strategy}_{mode.rpartition(',')[2]}.json"
    command = [sys.executable, *launcher, str(SCRIPT), namespace, strategy, mode, str(devices)]
    done = subprocess.run(
        [*command, str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
    )
    # plain DDP over gloo was seen to abort when it had written all and Python ended
    ended = done.returncode == 0 or (strategy == DDP and out.exists())
    assert ended, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def plain_ddp(tmp_path_factory):
    """What DDP makes of the script, under either Lightning and any launcher."""
    return run(tmp_path_factory.mktemp("ddp"), "lightning.pytorch", DDP)


def assert_same(ours, theirs, logs=True):
    limit = tolerance(torch.float32, 64)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, values in theirs["weights"].items():
        assert ours["weights"][name] == pytest.approx(values, rel=limit, abs=limit), name
    if logs:
        assert [name for name, _ in ours["logged"]] == [name for name, _ in theirs["logged"]]
        for (name, a), (_, b) in zip(ours["logged"], theirs["logged"], strict=True):
            assert a == pytest.approx(b, rel=limit, abs=limit), name


@pytest.mark.parametrize(
    "namespace",
    ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.full)],
)
def test_the_name_alone_trains_as_ddp(tmp_path, namespace, plain_ddp):
    ours = run(tmp_path, namespace, "magi")
    assert_same(ours, plain_ddp)
    assert ours["strategy"].startswith("MagiStrategy")
    assert ours["report"]["tier"] == "graph", ours["report"]["reason"]
    assert (tmp_path / "magi_report.json").exists()
    rows = json.loads((tmp_path / "magi_report.json").read_text())["rows"]
    row = next(r for r in rows if r["name"] == "fused_optimizer")
    assert row["plan"]["taken"] == 0, "a CPU's optimizer is torch's"
    assert row["plan"]["left_alone"] == ["6 parameters: it lies on cpu; the kernel runs on cuda"]


@pytest.mark.full  # the default run has these features in test_lightning_features.py
@pytest.mark.parametrize("mode", ["accumulate", "manual", "breaks"])
def test_modes(tmp_path, mode):
    ours = run(tmp_path, "lightning.pytorch", "magi", mode)
    assert_same(ours, run(tmp_path, "lightning.pytorch", DDP, mode))
    tiers = {"accumulate": "graph", "manual": "region", "breaks": "region"}
    assert ours["report"]["tier"] == tiers[mode]
    if mode == "breaks":
        assert "lightning_script.py" in ours["report"]["reason"]


@pytest.mark.full
def test_spawned_processes(tmp_path, plain_ddp):
    assert_same(run(tmp_path, "lightning.pytorch", "magi_spawn"), plain_ddp, logs=False)


def test_under_torchrun(tmp_path, plain_ddp):
    launcher = ("-m", "magi_train.cli", "run", "--nproc-per-node", "2")
    ours = run(tmp_path, "lightning.pytorch", "magi", launcher=launcher)
    assert_same(ours, plain_ddp)


def test_resuming_and_plain_checkpoints(tmp_path):
    """A checkpoint loads into the plain module and back; resuming equals not stopping."""
    whole, halves = run(tmp_path, "lightning.pytorch", "magi", "four_epochs,resume", devices=1)
    assert_same(halves, whole, logs=False)
    assert halves["losses"] == pytest.approx(whole["losses"][len(whole["losses"]) // 2 :], rel=1e-6)
    assert halves["strict_load"] is True
    assert halves["extra"] == [], "nothing of ours is in a checkpoint without need"


@pytest.mark.full
def test_resuming_with_compressed_gradients(tmp_path):
    """Residuals go into the checkpoint, beside the state, and out of it again, once."""
    halves = run(tmp_path, "lightning.pytorch", "int8", "resume")
    assert halves["extra"] == ["magi_compression"]
    assert halves["carried"] == [["a.weight", "b.weight"]]
    assert halves["strict_load"] is True


@pytest.mark.full
@pytest.mark.parametrize("halves", [f"sharded+{DDP}", f"{DDP}+sharded"])
def test_checkpoints_of_sharded_optimizers_are_those_of_ddp(tmp_path, halves):
    """On two ranks; trainer.save_checkpoint is called after fit, when the strategy is torn down."""
    whole = run(tmp_path, "lightning.pytorch", DDP, "four_epochs")
    ours = run(tmp_path, "lightning.pytorch", halves, "resume")
    assert_same(ours, whole, logs=False)
    saved = torch.load(tmp_path / f"{halves}_resume.ckpt", weights_only=False)
    (state,) = saved["optimizer_states"]
    held = {k: tuple(v["momentum_buffer"].shape) for k, v in state["state"].items()}
    assert held == {0: (16, 8), 1: (16,), 2: (4, 16), 3: (4,)}


def test_both_lightnings_in_one_process():
    code = (
        "import lightning.pytorch as a, pytorch_lightning as b\n"
        "x = a.Trainer(strategy='magi', accelerator='cpu', devices=1, logger=False)\n"
        "y = b.Trainer(strategy='magi', accelerator='cpu', devices=1, logger=False)\n"
        "assert isinstance(x.strategy, a.strategies.DDPStrategy)\n"
        "assert isinstance(y.strategy, b.strategies.DDPStrategy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_with_autoload_off_an_import_registers():
    import os

    code = (
        "{}import lightning.pytorch as a\n"
        "a.Trainer(strategy='magi', accelerator='cpu', devices=1, logger=False)\n"
    )
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": str(ROOT)}
    line = "import magi_train.integrations.lightning\n"
    without, done = (
        subprocess.Popen(
            [sys.executable, "-c", code.format(first)], stderr=subprocess.PIPE, env=env
        )
        for first in ("", line)
    )  # both import Lightning for seconds, side by side
    assert b"invalid strategy name" in without.communicate(timeout=120)[1]
    said = done.communicate(timeout=120)[1]
    assert done.returncode == 0, said


def test_the_autoload_cannot_break_an_import(monkeypatch):
    from magi_train.integrations import _autoload

    class Broken(list):
        def insert(self, *_):
            raise OSError("no room")

    monkeypatch.setattr(sys, "meta_path", Broken())
    with pytest.warns(UserWarning, match="could not set up its autoload"):
        _autoload.register()


def test_options_that_only_ddp_has_are_refused():
    from magi_train import Config
    from magi_train.integrations.lightning import MagiStrategy

    assert (
        MagiStrategy(find_unused_parameters=True, bucket_cap_mb=7).magi_config.comm.bucket_mib == 7
    )
    with pytest.raises(ValueError, match=r"does not take \['mixed_precision'\]"):
        MagiStrategy(mixed_precision=True)
    with pytest.raises(ValueError, match="does not take ddp_comm_hook"):
        MagiStrategy(ddp_comm_hook=print)
    with pytest.raises(ValueError, match="either config or"):
        MagiStrategy(config=Config(), bucket_cap_mb=7)
    with pytest.raises(RuntimeError, match="once trainer"):
        MagiStrategy().report  # noqa: B018
