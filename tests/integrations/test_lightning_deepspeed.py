"""strategy="magi_deepspeed" against strategy="ddp" on two ranks. Needs DeepSpeed."""

import importlib.util
import tempfile

import pytest
import torch
import torch.distributed as dist

from magi_train import Config, MagiError, ShardingConfig
from tests.close import difference, tolerance
from tests.distributed.test_deepspeed import quick, whole
from tests.integrations import lightning_features as features
from tests.integrations.test_lightning_fsdp import model_for
from tests.ranks import run_ranks, values

pytestmark = pytest.mark.full


def model_without_decay(f):
    """Its step reads no weight from outside: stage 3 cannot."""

    class Model(type(model_for(f))):
        training_step = f.Model.training_step

    return Model()


def deepspeed(f, stage, **settings):
    from magi_train.integrations.lightning import deepspeed_class

    given = {"zero_optimization": {"stage3_param_persistence_threshold": 0}, **settings}
    sharding = ShardingConfig(zero_stage=stage, deepspeed=given)
    config = Config(engine="deepspeed", lowering="aot_eager", sharding=sharding)
    return deepspeed_class(f.pl.__name__)(config=config)


def both(rank, _, stage):
    quick()
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
        longer = {**options, "max_epochs": 3}
        f = features.Feature("ddp", shared[0])
        theirs = f.fit(model_without_decay(f), **options)
        f = features.Feature("ddp", shared[0])
        straight = f.fit(model_without_decay(f), **longer)
        f = features.Feature("magi", shared[0])
        model = model_without_decay(f)
        trainer = f.trainer(strategy=deepspeed(f, stage), **options)
        trainer.fit(model, features.loader(), features.loader())
        ours = features.outcome(model, trainer)
        ours["weights"] = whole(model)
        tests = [trainer.test(model, features.loader(), verbose=False)[0]["test"]]
        path = f"{shared[0]}/sharded"
        trainer.save_checkpoint(path)
        again = model_without_decay(f)
        trainer = f.trainer(strategy=deepspeed(f, stage), **longer)
        trainer.fit(again, features.loader(), ckpt_path=path)
        resumed = whole(again)
        trainer = f.trainer(strategy=deepspeed(f, stage))
        alone = trainer.test(model_without_decay(f), features.loader(), ckpt_path=path)
        tests.append(alone[0]["test"])
        dist.barrier()
    return theirs, ours, tests, resumed, straight["weights"]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_tests_saves_and_resumes_as_ddp_does(stage):
    limit = tolerance(torch.float32, 64)
    for theirs, ours, tests, resumed, straight in values(run_ranks(both, stage)):
        assert ours["tier"] == ("region" if stage == 3 else "graph")
        assert difference(ours["weights"], theirs["weights"]) < limit
        assert ours["numbers"] == pytest.approx(theirs["numbers"], rel=limit, abs=limit)
        assert tests == pytest.approx([theirs["numbers"]["validation"]] * 2, rel=limit)
        assert difference(resumed, straight) < limit


def clips_by_itself(rank, _, settings, how):
    """Fit a module that asks Lightning to clip; return what is said."""
    quick()
    with tempfile.TemporaryDirectory() as folder:
        f = features.Feature("magi", folder)

        class Model(type(model_without_decay(f))):
            def configure_gradient_clipping(self, optimizer, *_, **__):
                self.clip_gradients(optimizer, **how)

        try:
            f.trainer(strategy=deepspeed(f, 1, **settings)).fit(Model(), features.loader())
        except MagiError as error:
            return str(error)
    return ""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize(
    ("settings", "how", "want"),
    [
        ({"gradient_clipping": 0.5}, {"gradient_clip_val": 0.5}, ""),
        ({}, {"gradient_clip_val": 0.5}, "by norm to 0.5 is not possible"),
        (
            {"gradient_clipping": 0.5},
            {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            "by value to 0.5 is not possible",
        ),
    ],
)
def test_clipping_in_a_module_is_deepspeeds_or_refused(settings, how, want):
    for said in values(run_ranks(clips_by_itself, settings, how)):
        assert want in said
        assert bool(want) == bool(said)
