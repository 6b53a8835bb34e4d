"""strategy="magi_fsdp" against strategy="ddp" on two ranks."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from magi_train import Config, ShardingConfig
from tests.close import difference, tolerance
from tests.integrations import lightning_features as features
from tests.ranks import run_ranks, values


def fully_sharded(f, folder=True, **more):
    from magi_train.integrations.lightning import fully_sharded_class

    config = Config(engine="fsdp2", lowering="aot_eager", **more)
    kind = fully_sharded_class(f.pl.__name__)
    return kind(config=config, save_distributed_checkpoint=folder)


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


def model_with_history(f):
    """Groups in an order of their own, a weight without gradients, extra state, hooks."""

    class Model(f.Model):
        def __init__(self):
            super().__init__()
            self.a, self.never = nn.Linear(8, 8), nn.Linear(8, 8)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in "ab")
            self.b, self.count = nn.Linear(8, 4), []
            add, drop = (
                (lambda _, d, p, *__: d.update({f"{p}more": 1})),
                (lambda _, d, p, *__: d.pop(f"{p}more")),
            )
            self.blocks.register_state_dict_post_hook(add)
            self.blocks.register_load_state_dict_pre_hook(drop)

        def forward(self, x):
            x = torch.tanh(self.a(x))
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            return self.b(x)

        def on_train_batch_start(self, *_):
            self.count.append(len(self.count))

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

        def configure_optimizers(self):
            first, never = self.blocks[1].parameters(), self.never.parameters()
            mine = {id(p) for each in (self.blocks[1], self.never) for p in each.parameters()}
            rest = [p for p in self.parameters() if id(p) not in mine]
            groups = [{"params": first, "lr": 0.03}, {"params": rest}, {"params": never}]
            return torch.optim.AdamW(groups, lr=0.01)

    return Model()


def one_more_epoch(rank, size, strategy, begin, end, epochs):
    f = features.Feature("ddp", str(begin or end), devices=size)
    theirs = f.pl.strategies.DDPStrategy(find_unused_parameters=True)
    ours = None if strategy == "ddp" else fully_sharded(f, folder=strategy == "folder")
    trainer, model = f.trainer(strategy=ours or theirs, max_epochs=epochs), model_with_history(f)
    trainer.fit(model, features.loader(), ckpt_path=begin, weights_only=False)
    trainer.save_checkpoint(end)
    weights = whole(model.state_dict())
    weights.pop("_extra_state")
    return {n: v.clone() for n, v in weights.items() if torch.is_tensor(v)}, model.count


def test_checkpoints_go_to_other_ranks_and_strategies_and_back(two_ranks, tmp_path):
    """DDP's file, our folder, one rank, our file, and DDP again: as DDP all the way."""
    chains = {"ddp": ["ddp"] * 4, "ours": ["ddp", "folder", "file", "ddp"]}
    ended = {}
    for name, strategies in chains.items():
        begin = None
        for i, (strategy, size) in enumerate(zip(strategies, [2, 2, 1, 2], strict=True)):
            end = str(tmp_path / f"{name}_{i}")
            part = (one_more_epoch, strategy, begin, end, i + 1)
            ended[name] = values(run_ranks(*part, world_size=1) if size == 1 else two_ranks(*part))
            begin = end
    for (ours, count), (theirs, expected) in zip(ended["ours"], ended["ddp"], strict=True):
        assert difference(ours, theirs) < tolerance(torch.float32, 64)
        assert count == expected == list(range(3 + 3 + 6 + 3))


def statistics(rank, _, path):
    """Save while every rank has running statistics of its own."""
    f = features.Feature("magi", path)
    model = model_for(f)
    model.register_buffer("kept", torch.zeros(2))
    model.large = nn.Parameter(torch.zeros(1, 999))  # rank 0's: torch lets rank 1 write the rest
    trainer = f.trainer(strategy=fully_sharded(f), max_epochs=1)
    trainer.fit(model, features.loader())
    model.kept.fill_(rank + 1.0)
    trainer.save_checkpoint(f"{path}/sharded")
    saved = {"state_dict": {"kept": torch.zeros(2)}}
    dcp.load(saved, checkpoint_id=f"{path}/sharded")
    return saved["state_dict"]["kept"]


def test_a_checkpoint_holds_rank_0s_buffers(two_ranks, tmp_path):
    for kept in values(two_ranks(statistics, str(tmp_path))):
        assert kept.tolist() == [1.0, 1.0]


def averaged(rank, _, path):
    f = features.Feature("magi", path)
    callbacks = [f.pl.callbacks.EMAWeightAveraging()]
    trainer = f.trainer(strategy=fully_sharded(f), callbacks=callbacks)
    with pytest.raises(ValueError, match="EMAWeightAveraging averages whole weights"):
        trainer.fit(model_for(f), features.loader())


def test_averaging_callbacks_are_refused(two_ranks, tmp_path):
    values(two_ranks(averaged, str(tmp_path)))


def test_folders_of_others_are_refused(two_ranks, tmp_path):
    values(two_ranks(of_others, str(tmp_path)))


def of_others(rank, _, path):
    import magi_train

    f = features.Feature("magi", path)
    magi_train.save_checkpoint(f"{path}/ours", model_for(f))
    trainer = f.trainer(strategy=fully_sharded(f), max_epochs=1)
    trainer.fit(model_for(f), features.loader())
    with pytest.raises(magi_train.MagiError, match=r"ours holds no checkpoint of Lightning's"):
        trainer.strategy.load_checkpoint(f"{path}/ours")
