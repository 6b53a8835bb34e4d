"""`attach`: transformers' Trainer and Accelerate train as without us, captured."""

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magi_train import CommConfig, Config, MagiError
from magi_train.integrations.huggingface import attach, report
from tests.close import difference, tolerance
from tests.integrations.huggingface_script import losses, make
from tests.ranks import values

pytest.importorskip("accelerate", reason="pip install 'magi-train[huggingface]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers, about itself
ROOT = Path(__file__).parents[2]
FLOAT32 = tolerance(torch.float32, 64)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, id="accumulation"),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.full),
        pytest.param({"label_smoothing_factor": 0.1}, id="smoothing", marks=pytest.mark.full),
    ],
)
def test_the_trainer_trains_and_logs_as_without_us(tmp_path, options):
    plain, ours = make(tmp_path / "a", False, **options), make(tmp_path / "b", True, **options)
    plain.train()
    ours.train()
    limit = tolerance(torch.bfloat16, 64) if "bf16" in options else FLOAT32
    assert losses(ours) == pytest.approx(losses(plain), rel=limit)
    assert difference(ours.model.state_dict(), plain.model.state_dict()) < limit
    keys = [sorted(row) for row in plain.state.log_history]
    assert [sorted(row) for row in ours.state.log_history] == keys
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=limit)
    found = report(ours)
    assert found.tier == "graph", found.reason
    plans = {row.name: row.plan for row in found.rows}
    assert "chunk_linear_cross_entropy" in plans
    assert plans["canonicalize_attention"]["causal"], "the Trainer scales the loss in place"


def test_a_loss_of_the_users_own_is_captured(tmp_path):
    from transformers import Trainer

    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"])
            logits, labels = outputs.logits[:, :-1], inputs["labels"][:, 1:]
            loss = 2 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return (loss, outputs) if return_outputs else loss

    plain, ours = (make(tmp_path / str(o), o, Mine, max_steps=4) for o in (False, True))
    plain.train()
    ours.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=FLOAT32)
    assert report(ours).tier == "graph"
    row = next(r for r in report(ours).rows if r.name == "chunk_linear_cross_entropy")
    assert row.plan["left_alone"], "the loss is not in the graph"


@pytest.mark.full
def test_checkpoints_go_both_ways_and_training_resumes(tmp_path):
    whole = make(tmp_path / "whole", False)
    whole.train()
    saving = {"save_strategy": "epoch"}
    ours = make(tmp_path / "ours", True, **saving)
    ours.train()
    checkpoint = str(tmp_path / "ours" / "checkpoint-8")
    plain = make(tmp_path / "c", False)
    plain.train(resume_from_checkpoint=checkpoint)
    resumed = make(tmp_path / "d", True)
    resumed.train(resume_from_checkpoint=checkpoint)
    for trainer in (plain, resumed):
        assert losses(trainer) == pytest.approx(losses(whole), rel=FLOAT32)
        assert difference(trainer.model.state_dict(), whole.model.state_dict()) < FLOAT32
    ours.save_model(str(tmp_path / "final"))
    again = type(ours.model).from_pretrained(tmp_path / "final")
    assert difference(again.state_dict(), ours.model.state_dict()) == 0


def test_accelerate_alone():
    from accelerate import Accelerator

    found = {}
    for ours in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        if ours:
            accelerator = attach(accelerator, Config(lowering="aot_eager"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(4):
            with accelerator.accumulate(prepared):
                loss = prepared(torch.randn(4, 8)).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        assert accelerator.unwrap_model(prepared) is model
        found[ours] = accelerator.get_state_dict(prepared)
        tier = report(accelerator).tier if ours else "graph"
        assert tier == "graph"
    assert difference(found[True], found[False]) < FLOAT32


def test_what_a_distributed_data_parallel_would_be_told(tmp_path):
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    trainer = make(tmp_path, True, max_steps=1, ddp_broadcast_buffers=False, ddp_bucket_cap_mb=3)
    trainer.train()
    comm = report(trainer).settings["comm"]
    assert (comm["broadcast_buffers"], comm["bucket_mib"]) == (False, 3)
    own = make(tmp_path, False, max_steps=1, ddp_bucket_cap_mb=3)
    attach(own, Config(comm=CommConfig(bucket_mib=2), lowering="aot_eager")).train()
    comm = report(own).settings["comm"]
    assert (comm["broadcast_buffers"], comm["bucket_mib"]) == (True, 2)
    early = make(tmp_path, True, max_steps=1)  # of transformers 4, which tells Accelerate later
    early.accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    early.train()
    assert not report(early).settings["comm"]["broadcast_buffers"]
    late = make(tmp_path, False)
    late.accelerator.ddp_handler = DistributedDataParallelKwargs(
        comm_hook=DDPCommunicationHookType.BF16
    )
    with pytest.raises(ValueError, match="comm_hook is 'bf16'; leave it out"):
        attach(late)


def test_refusals(tmp_path):
    with pytest.raises(TypeError, match="takes a Trainer or an Accelerator, got int"):
        attach(3)
    trainer = make(tmp_path, False)
    with pytest.raises(RuntimeError, match="once attach"):
        report(trainer)
    attach(trainer)
    with pytest.raises(ValueError, match="called for this object already"):
        attach(trainer)
    with pytest.raises(ValueError, match="compiles the model itself"):
        attach(make(tmp_path, False, torch_compile=True))
    late = make(tmp_path, False, max_steps=1)
    late.train()
    with pytest.raises(ValueError, match="prepared already"):
        attach(late)


def joins(rank, _):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "multi_device", True)  # as on GPUs: not on CPUs
        accelerator = attach(accelerate.Accelerator(cpu=True))
        model = accelerator.prepare(torch.nn.Linear(2, 2))
        entered = 0
        for even in (None, True):
            with accelerator.join_uneven_inputs([model], even_batches=even):
                entered += 1
        with pytest.raises(ValueError, match="which a Linear that attach"):
            accelerator.join_uneven_inputs([model], even_batches=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return entered


def test_uneven_inputs_are_joined_where_that_means_nothing(two_ranks):
    """Accelerate asks a joinable for its hook even where all ranks get the same batches."""
    assert values(two_ranks(joins)) == [2, 2]


@pytest.mark.full
def test_two_ranks_under_torchrun(tmp_path):
    found = {}
    for mode in ("plain", "magi"):
        out = tmp_path / f"{mode}.json"
        script = [str(Path(__file__).with_name("huggingface_script.py")), mode, str(out)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*command, "--nproc-per-node", "2", *script],
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = json.loads(out.read_text())
    plain, ours = found["plain"], found["magi"]
    assert plain["ranks"] == ours["ranks"] == 2
    assert plain["wrapped"] == "DistributedDataParallel" != ours["wrapped"]
    assert ours["losses"] == pytest.approx(plain["losses"], rel=FLOAT32)
    assert ours["tier"] == "graph"


def test_a_copy_of_a_captured_model_is_a_plain_one():
    """An average of the weights is one, and so is what torch.save of a whole model gives."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = attach(Accelerator(cpu=True), Config(lowering="aot_eager"))
    model = accelerator.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()))
    batch = torch.ones(2, 4)
    want = model(batch)
    want.sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad(), other.no_sync():
            assert torch.equal(other(batch), want)
            other[0].weight.zero_()
            assert not torch.equal(other(batch), want)
        assert type(other.forward).__name__ == "method"
    assert torch.equal(model(batch), want)


def test_weights_that_differ_between_ranks_are_refused():
    from accelerate import Accelerator

    config = Config(comm=CommConfig(outer_steps=4))
    accelerator = attach(Accelerator(cpu=True), config)
    with pytest.raises(MagiError, match="outer_steps needs a training loop of your own"):
        accelerator.prepare(torch.nn.Linear(4, 4))
