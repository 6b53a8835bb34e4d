"""Each feature of Lightning under strategy="magi", against strategy="ddp": docs/lightning.md."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from magi_train.comm.reducer import Reducer
from tests.close import difference, tolerance
from tests.integrations import lightning_features as features

ROOT = Path(__file__).parents[2]
CASES = [
    ("precision", "32-true"),
    ("precision", "bf16-mixed"),
    ("precision", "bf16-true"),
    ("precision", "64-true"),
    ("accumulation",),
    ("clipping", "norm"),
    ("clipping", "value"),
    ("schedulers",),
    ("two_optimizers",),
    ("generator_used_twice",),
    ("evaluation",),
    ("evaluation_without_fit",),
    ("configure_model",),
    ("empty_init",),
    ("averaging", "ema"),
    ("averaging", "swa"),
    ("statistics_in_swa",),
    ("learning_rate_finder",),
    ("batch_size_scaler",),
    ("early_stopping",),
    ("compiled", "module"),
    ("compiled", "submodule"),
    ("compiled", "in place"),
    ("checkpoints",),
    ("collectives",),
    ("fabric", "forward"),
    ("fabric", "training_step"),
]
NAMES = ["-".join(case).replace(" ", "_") for case in CASES]
DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


QUICK = {"precision-bf16-mixed", "clipping-value", "evaluation", "averaging-ema", "compiled-module"}
QUICK |= {
    "accumulation",
    "two_optimizers",
    "generator_used_twice",
    "statistics_in_swa",
    "checkpoints",
    "collectives",
    "fabric-training_step",
}  # the others take another 20 s
MARKED = [
    pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.full)
    for case, name in zip(CASES, NAMES, strict=True)
]


@pytest.mark.parametrize("case", MARKED)
def test_as_under_ddp(two_ranks, case):
    outcomes = two_ranks(features.both, *case)
    limit = tolerance(DTYPES.get(case[-1], torch.float32), 64)
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        theirs, ours = outcome.value["ddp"], outcome.value["magi"]
        assert difference(ours["weights"], theirs["weights"]) < limit
        assert ours["numbers"] == pytest.approx(theirs["numbers"], rel=limit, abs=limit)
        assert ours.get("keys") == theirs.get("keys")
        if "predicted" in theirs:
            assert difference({"": ours["predicted"]}, {"": theirs["predicted"]}) < limit
        wanted = {"two_optimizers": "region", "generator_used_twice": ""}.get(case[0], "graph")
        assert ours["tier"] == wanted, ours.get("reason")


def test_one_process_makes_no_group_and_takes_up_two_ranks_work(two_ranks, tmp_path):
    """Fit, test and predict alone; then go on from what two ranks have saved."""
    assert not dist.is_initialized()
    saved = two_ranks(_one_epoch, str(tmp_path / "two.ckpt"))
    assert not any(o.error for o in saved), saved
    feature = features.Feature("magi", tmp_path, devices=1)
    model, trainer = feature.Model(), feature.trainer(use_distributed_sampler=False)
    trainer.fit(model, features.loader(), ckpt_path=tmp_path / "two.ckpt")
    trainer.test(model, features.loader(), verbose=False)
    trainer.predict(model, features.loader())
    assert not dist.is_initialized()
    assert trainer.global_step == 3 + 6, "3 steps of two ranks, then 6 of one"

    plain = feature.Model()  # what one more epoch makes of the same weights, by hand
    state = torch.load(tmp_path / "two.ckpt", weights_only=False)
    plain.load_state_dict(state["state_dict"])
    optimizer = plain.configure_optimizers()
    optimizer.load_state_dict(state["optimizer_states"][0])
    for batch in features.loader():
        optimizer.zero_grad()
        plain.loss(batch).backward()
        optimizer.step()
    assert difference(model.state_dict(), plain.state_dict()) < tolerance(torch.float32, 64)


def test_validation_behind_training_sends_no_buffers(tmp_path, monkeypatch):
    """It may be of another model, while the trained one is back on the host, as under DDP."""
    feature = features.Feature("magi", tmp_path, devices=1)
    trainer, taken = feature.trainer(max_epochs=1, num_sanity_val_steps=0), []
    monkeypatch.setattr(Reducer, "take_buffers", lambda _: taken.append(1))
    trainer.fit(feature.Model(), features.loader(), features.loader())
    assert len(taken) == 1
    trainer.validate(feature.Model(), features.loader(), verbose=False)
    assert len(taken) == 1


def _one_epoch(rank, world_size, path):
    feature = features.Feature("magi", str(Path(path).parent))
    trainer = feature.trainer(max_epochs=1)
    trainer.fit(feature.Model(), features.loader())
    trainer.save_checkpoint(path)


def test_slurm_is_detected(monkeypatch, tmp_path):
    variables = {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in {**variables, "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "lightning.pytorch.plugins.environments.SLURMEnvironment.detect", lambda: True
    )
    trainer = features.Feature("magi", tmp_path, devices=1).trainer()
    assert type(trainer.strategy.cluster_environment).__name__ == "SLURMEnvironment"


def test_synchronized_batch_norm_is_put_in_and_taken_out(tmp_path):
    """Its own collectives need CUDA; alone, it is a plain batch norm that Lightning swaps."""
    seen = []
    feature = features.Feature("magi", tmp_path, devices=1)

    class Model(feature.Model):
        def __init__(self):
            super().__init__()
            self.b = torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))

        def on_train_start(self):
            seen.append(type(self.b[0]).__name__)

    model = Model()
    feature.trainer(sync_batchnorm=True).fit(model, features.loader())
    assert seen == ["SyncBatchNorm"]
    assert "Sync" not in type(model.b[0]).__name__


def test_every_row_of_the_table_names_a_test():
    rows = [r for r in (ROOT / "docs/lightning.md").read_text().splitlines() if r.startswith("| ")]
    for row in rows[1:]:
        named = re.findall(r"`(test_\w+|tests/[\w/.]+::test_\w+)(?:\[([^\]]+)\])?`", row)
        assert named, f"no test in: {row}"
        for test, case in named:
            path, _, name = test.rpartition("::")
            here = [ROOT / path] if path else (ROOT / "tests/integrations").glob("test_*.py")
            assert any(f"def {name}(" in p.read_text() for p in here), test
            assert name != "test_as_under_ddp" or case in NAMES, case
