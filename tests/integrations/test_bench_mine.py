"""magi bench --mine: a user's script, with and without, and what is said about it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from magi_train.cli import main
from magi_train.core.errors import MagiError
from magi_train.integrations.mine import OURS, Found, as_dict, as_text
from magi_train.integrations.parts import PARTS, Part, Stage
from magi_train.integrations.probe import Seen
from magi_train.integrations.script_peer import ScriptPeer
from magi_train.integrations.verdict import Agreement, Side, compare, judge, side
from tests.processes import MARK, all_ended

ROOT = Path(__file__).parents[2]
PLAIN = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range({steps}):
    x = torch.randn(4, 8)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
DDP = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(dist.get_rank())
while True:
    x = torch.randn(4, 8)
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
LIGHTNING = """
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader, TensorDataset
class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)
    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
x = torch.randn(256, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True)
trainer = pl.Trainer(accelerator="cpu", devices={devices}, strategy="{strategy}", logger=False,
                     enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Line(), loader)
"""
TRAINER = """
import sys
sys.path.insert(0, {root!r})
from tests.integrations.huggingface_script import make
make(sys.argv[1], False, num_train_epochs=9).train()
"""


def bench(tmp_path, script, *options, args=()):
    path = tmp_path / "train.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["MAGI_SETTINGS"] = "lowering=aot_eager"
    command = [sys.executable, "-m", "magi_train.cli", "bench", "--mine", "--rounds=1"]
    command += ["--warm-up=3", "--steps=6", "--json", *options, str(path), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, cwd=tmp_path, env=environment
    )
    return done, json.loads(done.stdout) if done.stdout else None


def check(done, found, way, tier="graph"):
    assert done.returncode == 0, done.stdout + done.stderr
    assert (found["way"], found["tier"]) == (way, tier)
    assert found["losses"]["agree"]
    assert found["losses"]["compared"] == 9
    assert found["losses"]["worst"] < 1e-4
    for kind in ("without", "with"):
        assert found[kind]["step_ms"] > 0
        assert found[kind]["start_up_s"][0] > 0
    assert found["with"]["losses"][0] != found["with"]["losses"][-1], "it trains"


def test_a_plain_loop_is_captured_and_agrees(tmp_path):
    check(*bench(tmp_path, PLAIN.format(steps=20)), "module")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        pytest.param("print('hello')", "there is no step to measure", marks=pytest.mark.full),
        pytest.param(PLAIN.format(steps=4), "took 4 step(s)", marks=pytest.mark.full),
        pytest.param(DDP, "give --nproc", marks=pytest.mark.full),
        pytest.param(
            "import magi_train\n"
            + PLAIN.format(steps=20).replace(
                "for step", "model = magi_train.prepare(model)\nfor step"
            ),
            "through magi_train already",
            marks=pytest.mark.full,
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, script, words):
    done, found = bench(tmp_path, script)
    assert done.returncode == 2
    assert words in done.stderr
    assert found is None


@pytest.mark.full
def test_a_loop_under_ddp_on_two_ranks(tmp_path):
    check(*bench(tmp_path, DDP, "--nproc", "2"), "DistributedDataParallel")


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "nproc"), [(PLAIN.format(steps=20), ()), (DDP, ("--nproc", "2"))]
)
def test_peers_of_a_script(tmp_path, script, nproc):
    done, found = bench(tmp_path, script, "--peers", "compile,checkpoint", *nproc)
    check(done, found, "DistributedDataParallel" if nproc else "module")
    peers = found["peers"]
    assert peers["compile"]["agreement"]["agree"]
    assert peers["compile"]["start_up_s"] > found["without"]["start_up_s"], "it was compiled"
    assert "gradient_checkpointing_enable" in peers["checkpoint"]["failed"]


@pytest.mark.full
def test_a_script_that_hangs_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    script = "import time\nwhile True: time.sleep(1)"
    done, _ = bench(tmp_path, script, "--seconds", "20", "--nproc", "2")
    assert done.returncode == 2
    assert "took more than --seconds 20" in done.stderr
    monkeypatch.delenv(MARK)
    assert all_ended(tmp_path) is True


@pytest.mark.full
def test_lightning(tmp_path):
    check(*bench(tmp_path, LIGHTNING.format(devices=1, strategy="auto")), "Lightning")


@pytest.mark.full
def test_a_strategy_that_is_not_ours_to_replace(tmp_path):
    done, _ = bench(tmp_path, LIGHTNING.format(devices=1, strategy="deepspeed_stage_2"))
    assert done.returncode == 2


@pytest.mark.full
def test_the_trainer_of_transformers(tmp_path):
    script = TRAINER.format(root=str(ROOT))
    check(*bench(tmp_path, script, args=[str(tmp_path / "out")]), "transformers")


@pytest.mark.full
def test_a_module_in_parts_is_not_captured(tmp_path):
    script = PLAIN.format(steps=20).replace("model(x)", "model[2](model[1](model[0](x)))")
    done, _ = bench(tmp_path, script)
    assert done.returncode == 2
    assert "nothing was captured" in done.stderr


@pytest.mark.parametrize(
    ("peer", "words"), [("zero1", "zero1 is no peer for --mine"), ("comple", "no peer 'comple'")]
)
def test_a_peer_that_is_none_for_a_script_is_refused(tmp_path, peer, words, capsys):
    (tmp_path / "train.py").write_text("")
    assert main(["bench", "--mine", "--peers", f"compile,{peer}", str(tmp_path / "train.py")]) == 2
    assert words in capsys.readouterr().err


def test_a_script_s_module_is_edited_before_its_first_call(monkeypatch):
    def doubled(training):
        training.module.weight.data.mul_(2)

    def replaced(training):
        training.optimizer = torch.optim.SGD(training.module.parameters(), lr=1)

    monkeypatch.setitem(PARTS, "doubled", Part("doubled", Stage.EDIT, doubled))
    monkeypatch.setitem(PARTS, "replaced", Part("replaced", Stage.EDIT, replaced))
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", torch.optim.Optimizer.__init__)
    for peer in ("doubled", "replaced"):
        edited = ScriptPeer(peer)
        try:
            other, module = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            nn.init.ones_(module.weight)
            other(torch.ones(2))
            assert not edited.applied, "a module without an optimizer is not the script's model"
            if peer == "replaced":
                with pytest.raises(MagiError, match="replaced replaces the optimizer"):
                    module(torch.ones(2))
            else:
                with torch.no_grad():
                    assert module(torch.ones(2)).item() == 2
                assert module(torch.ones(2)).item() == 4
                assert module(torch.ones(2)).item() == 4, "once"
                assert edited.applied
        finally:
            edited._owner.remove()
        del optimizer


def test_ours_is_compared_with_the_fastest_that_trains_alike():
    def sides(**step_ms):
        return {
            name: Side(ms, [ms, ms], ms, ms, 1.0, [1.0], [9.0 if name == "wrong" else 1.0] * 4)
            for name, ms in step_ms.items()
        }

    found = Found(
        {**sides(without=100.0, compile=70.0, wrong=10.0), OURS: sides(x=60.0)["x"]},
        {"liger": "Traceback\nliger needs a GPU"}, Seen(tier="graph"), 0.02,
    )  # fmt: skip
    assert found.verdict.speed == pytest.approx(70 / 60)
    assert found.verdict.why == "a step is 1.17 times as fast (beside compile)"
    text = as_text(found)
    assert "DIFFER" in next(line for line in text.splitlines() if "[wrong]" in line)
    assert "liger        failed: liger needs a GPU" in text
    told = as_dict(found)
    assert told["peers"]["liger"] == {"failed": "Traceback\nliger needs a GPU"}
    assert told["peers"]["compile"]["agreement"]["agree"]
    assert not told["peers"]["wrong"]["agreement"]["agree"]


def test_losses_agree_or_do_not():
    falling = [1 / (1 + step) for step in range(12)]
    assert compare(falling, [each * 1.001 for each in falling], 0.01).agree
    assert not compare(falling, [each * 1.02 for each in falling], 0.01).agree
    late = [*falling[:9], *(5 * each for each in falling[9:])]
    found = compare(falling, late, 0.01)
    assert found.median == 0
    assert not found.agree, "most steps agree, and the last do not"
    assert not compare(falling, [*falling[:-1], math.nan], 0.01).agree
    nothing = compare([None] * 12, falling, 0.01)
    assert (nothing.agree, nothing.compared) == (False, 0)
    assert compare([0.0], [0.0], 0.01).agree
    beyond = compare([math.nan] * 12, [math.nan] * 12, 0.01)
    assert (beyond.agree, beyond.compared) == (False, 0), "they say nothing"


def of(step_ms, parts=None, peak=1.0, start=10.0):
    return Side(step_ms, parts or [step_ms, step_ms], step_ms, step_ms, peak, [start], [])


def test_the_verdict():
    agree = Agreement(True, 9, 0.0, 0.0, 0.0, 0.0)
    faster = judge(of(100), of(80, start=30), agree)
    assert (faster.use, faster.pays_after) == ("yes", 1000)
    assert faster.speed == pytest.approx(1.25)
    assert judge(of(100), of(98), agree).use == "no"
    assert judge(of(100), of(130), agree).pays_after is None
    assert judge(of(100, [90, 120]), of(80), agree).use == "cannot say"
    assert judge(of(100), of(100, peak=0.8), agree).use == "yes", "less memory"
    assert judge(of(100), of(130, peak=0.8), agree).use == "no", "and slower"
    assert judge(of(100), of(80), Agreement(False, 9, 1.0, 1.0, 1.0, 0.0)).use == "no"
    resumed = judge(of(100), of(80), Agreement(False, 9, 1.0, 1.0, 1.0, 0.7))
    assert resumed.use == "no"
    assert "checkpoint" in resumed.why
    assert judge(of(100), of(80), Agreement(False, 0, 0.0, 0.0, 0.0, 0.0)).use == "cannot say"


def test_the_slowest_rank_and_all_rounds_count():
    def seen(scale, peak):
        return Seen([scale * s for s in (1.0, 1.0, 3.0, 3.0)], peak_gib=peak, start_up_seconds=peak)

    found = side([[seen(1, 5.0), seen(2, 4.0)], [seen(4, 1.0), seen(1, 2.0)]])
    assert found.parts_ms == [2000, 6000, 4000, 12000]
    assert found.peak_gib == 5
    assert found.start_up_s == [5, 2]
