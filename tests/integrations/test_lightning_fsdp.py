"""strategy="magi_fsdp" against strategy="ddp" on two ranks."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from magi_train import Config, ShardingConfig
from tests.close import difference, tolerance
from tests.integrations import lightning_features as features
from tests.ranks import values


def fully_sharded(f, **more):
    from magi_train.integrations.lightning import fully_sharded_class

    config = Config(engine="fsdp2", lowering="aot_eager", **more)
    return fully_sharded_class(f.pl.__name__)(config=config)


def model_for(f):
    """Two blocks, a head of the LightningModule's own, which its step uses, and a running mean."""

    class Model(f.Model):
        def __init__(self):
            super().__init__()
            del self.a
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in "ab")
            self.register_buffer("mean", torch.zeros(8), persistent=False)

        def forward(self, x):
            if self.training:
                self.mean.lerp_(x.mean(0), 0.1)
            else:
                x = x - self.mean
            for block in self.blocks:
                x = x + block(x)
            return self.b(torch.cat((x, x), 1))

        def training_step(self, batch, batch_idx):
            decay = self.b.weight.square().mean()  # outside of any submodule's forward
            return super().training_step(batch, batch_idx) + decay

    return Model()


def whole(weights):
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in weights.items()}


def both(rank, _):
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
        f = features.Feature("ddp", shared[0])
        theirs = f.fit(model_for(f), **options)
        f = features.Feature("magi", shared[0])
        model, trainer = model_for(f), f.trainer(strategy=fully_sharded(f), **options)
        trainer.fit(model, features.loader(), features.loader())
        ours = features.outcome(model, trainer)
        ours["weights"] = whole(ours["weights"])
        tested = trainer.test(model, features.loader(), verbose=False)[0]["test"]
        path = f"{shared[0]}/sharded"
        trainer.save_checkpoint(path)
        again, options["max_epochs"] = model_for(f), 3
        trainer = f.trainer(strategy=fully_sharded(f), **options)
        trainer.fit(again, features.loader(), ckpt_path=path)
        f = features.Feature("ddp", shared[0])
        straight = f.fit(model_for(f), **options)
        dist.barrier()
    resumed = whole(again.state_dict())
    return theirs, ours, tested, resumed, straight["weights"]


def test_trains_tests_saves_and_resumes_as_ddp_does(two_ranks):
    limit = tolerance(torch.float32, 64)
    for theirs, ours, tested, resumed, straight in values(two_ranks(both)):
        assert ours["tier"] == "region"
        assert difference(ours["weights"], theirs["weights"]) < limit
        assert ours["numbers"] == pytest.approx(theirs["numbers"], rel=limit, abs=limit)
        assert tested == pytest.approx(theirs["numbers"]["validation"], rel=limit)
        assert difference(resumed, straight) < limit


def empty(rank, _):
    with tempfile.TemporaryDirectory() as folder:
        f = features.Feature("magi", folder)
        trainer = f.trainer(strategy=fully_sharded(f), max_epochs=8)
        with trainer.init_module(empty_init=True):
            model = model_for(f)
        was_meta = all(p.is_meta for p in model.parameters())
        trainer.fit(model, features.loader(), features.loader())
        return was_meta, float(trainer.callback_metrics["train_epoch"])


@pytest.mark.full
def test_a_model_that_never_was_whole_trains(two_ranks):
    for was_meta, loss in values(two_ranks(empty)):
        assert was_meta
        assert loss < 1.6  # of 1.39 for a uniform guess among four, and the decay


def test_the_name_is_registered_and_other_engines_are_refused():
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import StrategyRegistry

    from magi_train.integrations.lightning import MagiFullyShardedStrategy, strategy_class

    assert isinstance(StrategyRegistry.get("magi_fsdp"), pl.strategies.ModelParallelStrategy)
    with pytest.raises(ValueError, match=r"is for Config\(engine='fsdp2'\), got 'replicate'"):
        MagiFullyShardedStrategy(config=Config())
    with pytest.raises(ValueError, match="use strategy='magi_fsdp'"):
        strategy_class("lightning.pytorch")(config=Config(engine="fsdp2"))
    sharding = ShardingConfig(gather_dtype="bfloat16")
    assert MagiFullyShardedStrategy(config=Config(engine="fsdp2", sharding=sharding))


def twice(rank, _):
    with tempfile.TemporaryDirectory() as folder:
        f = features.Feature("magi", folder)
        model, trainer = model_for(f), f.trainer(strategy=fully_sharded(f), max_epochs=1)
        trainer.fit(model, features.loader())
        first = trainer.strategy.report.steps.count
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, features.loader())
        return first, trainer.strategy.report.steps.count


@pytest.mark.full
def test_a_second_fit_with_one_strategy_is_recorded(two_ranks):
    for first, both in values(two_ranks(twice)):
        assert first > 0
        assert both == 2 * first
