"""Engine deepspeed: settings and refusals without DeepSpeed; with it, training on gloo ranks."""

import importlib.util
import json
import os
import shutil

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import CommConfig, Config, MagiError, ShardingConfig
from magi_train.comm.zero_config import zero_config
from magi_train.comm.zero_files import client_state
from magi_train.comm.zero_leaves import Leaves
from tests.close import difference, tolerance
from tests.distributed.test_fully_shard import make, state_of, train, uneven
from tests.models import Small
from tests.ranks import run_ranks, values

needs_deepspeed = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]


def settings(given=None, comm=None, **sharding):
    sharding = ShardingConfig(deepspeed=given, **sharding)
    return Config(
        engine="deepspeed", lowering="aot_eager", sharding=sharding, comm=comm or CommConfig()
    )


# -- settings, which need no DeepSpeed -----------------------------------------------------------


def test_settings_of_both_sides_come_together(tmp_path):
    given = {"zero_optimization": {"overlap_comm": "auto"}, "bf16": {"enabled": True}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    for each in (given, str(path)):
        comm = CommConfig(bucket_mib=4, compression="bfloat16")
        got = zero_config(settings(each, comm, zero_stage=3, offload=True))
        assert got["zero_optimization"] == {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "reduce_bucket_size": 2**20,
        }
        assert got["bf16"] == {"enabled": True}
        assert got["communication_data_type"] == "bf16"
        assert got["gradient_clipping"] == 0.0, "DeepSpeed's default would clip to 1"
        assert got["managed_gradient_accumulation"] is False
        assert got["train_micro_batch_size_per_gpu"] == 1
    assert zero_config(settings())["zero_optimization"] == {"stage": 2}
    assert zero_config(settings({"zero_optimization": {"stage": 1}}))["zero_optimization"] == {
        "stage": 1
    }
    assert given["zero_optimization"] == {"overlap_comm": "auto"}, "the user's own dict"


@pytest.mark.parametrize(
    ("given", "ours", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, {"zero_stage": 2}, ("stage = 3", "zero_stage is 2")),
        ({"zero_optimization": {"stage": 0}}, {}, ("stage = 0", "stages 1, 2 and 3")),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            {"offload": True},
            ("offload_optimizer.device = 'nvme'", "offload is True"),
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 7}},
            {"comm": CommConfig(bucket_mib=1)},
            ("reduce_bucket_size = 7", "262144"),
        ),
        ({"gradient_accumulation_steps": 4}, {}, ("gradient_accumulation_steps = 4", "be 1")),
        ({"optimizer": {"type": "Adam"}}, {}, ("'optimizer'", "the script makes")),
        ("nowhere.json", {}, ("'nowhere.json'", "cannot be read as JSON")),
    ],
)
def test_contradictions_name_both_values(given, ours, words):
    with pytest.raises(ValueError, match=r"ShardingConfig\.deepspeed") as caught:
        zero_config(settings(given, **ours))
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_does_not_go_with_deepspeed_is_refused():
    for wrong in ({"tune": True}, {"shard_optimizer": True}, {"memory_budget_gib": 1.0}):
        with pytest.raises(ValueError, match="which does not go with"):
            Config(engine="deepspeed", **wrong)
    with pytest.raises(ValueError, match=r"zero_stage is for Config\(engine='deepspeed'\)"):
        Config(sharding=ShardingConfig(zero_stage=2))
    with pytest.raises(TypeError, match="the name of a JSON file or a dict, got list"):
        ShardingConfig(deepspeed=[])
    assert hash(settings({"a": {}})) == hash(settings({"a": {}}))


def test_without_deepspeed_it_says_how_to_install_it(monkeypatch):
    own = importlib.util.find_spec
    gone = lambda name, *more: None if name == "deepspeed" else own(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    model = Small()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(MagiError, match=r"pip install .* 'magi-train\[deepspeed\]'"):
        magi_train.prepare(model, sgd, config=settings())
    from magi_train.integrations.lightning import MagiDeepSpeedStrategy

    with pytest.raises(MagiError, match=r"pip install .* 'magi-train\[deepspeed\]'"):
        MagiDeepSpeedStrategy()
    with pytest.raises(ValueError, match=r"does not take \['stage'\]"):
        MagiDeepSpeedStrategy(stage=2)


def test_blocks_that_deepspeed_could_not_sum_are_refused_by_name():
    model = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    leaves, x = Leaves(model, list(model)), torch.ones(2, 4)
    asked = []
    model[0][0].register_forward_hook(lambda m, args, out: asked.append(args[0].requires_grad))
    leaves.begin()
    model[0](x)
    assert asked == [True], "else DeepSpeed's hook runs before the weights' gradients"
    with pytest.raises(MagiError, match=r"0 \(Sequential\) runs twice in one forward"):
        model[0](x)
    with pytest.raises(MagiError, match=r"1 \(Sequential\) is called without a positional input"):
        model[1](input=x)
    leaves.end()
    model[0](x)  # again for its backward
    with torch.no_grad():
        leaves.begin()
        model[0](x)
        model[0](x)


# -- training ----------------------------------------------------------------------------------


def quick():
    """Leave out a collective for inference that DeepSpeed would compile for a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def sharded(stage, **more):
    zero = {"stage3_param_persistence_threshold": 0}
    return settings({"zero_optimization": zero, **more.pop("given", {})}, zero_stage=stage, **more)


def whole(model):
    import deepspeed

    cut = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(cut):
        return {n: v.detach().clone() for n, v in model.state_dict().items()}


def against_ddp(rank, _, stage, offload):
    quick()
    ddp = DistributedDataParallel(make("blocks"))
    sgd = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    want = train(ddp, sgd, "blocks", rank, accumulate=2)
    twin = make("blocks")
    if rank:  # prepare() has to take rank 0's
        nn.init.ones_(next(iter(twin.parameters())))
    sgd = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    halved = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)  # takes our step for torch's
    config = sharded(stage, offload=offload, given={"gradient_clipping": 1.0})
    model, sgd = magi_train.prepare(twin, sgd, config=config)
    got = train(model, sgd, "blocks", rank, accumulate=2)
    halved.step()
    engine, report = model._magi_runtime.reducer.engine, magi_train.report(model)
    try:
        sgd.state_dict()
        refused = ""
    except MagiError as error:
        refused = str(error)
    theirs, mine = state_of(ddp.module), whole(twin)
    del theirs["mean"], mine["mean"]  # each rank has its own after the forward
    return {
        "losses": difference({"": torch.tensor(got[0])}, {"": torch.tensor(want[0])}),
        "norm": abs(float(engine.get_global_grad_norm()) / want[2][-1] - 1),
        "weights": difference(mine, theirs),
        "tier": report.tier,
        "passes": [r.name for r in report.rows if r.stage == "pre_grad" and r.plan],
        "numbers": sum(p.numel() for p in twin.parameters()),
        "refused": refused,
    }


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, False), (2, False), (3, False), (2, True), (3, True)]
)
class TestTraining:
    pytestmark = needs_deepspeed

    def test_losses_norm_and_weights_are_those_of_ddp(self, stage, offload):
        limit = tolerance(torch.float32, 64)
        for got in values(run_ranks(against_ddp, stage, offload)):
            assert got["losses"] <= limit
            assert got["norm"] <= limit
            assert got["weights"] <= limit
            assert got["tier"] == ("region" if stage == 3 else "graph")
            assert "canonicalize_attention" in got["passes"]
            assert (got["numbers"] == 0) == (stage == 3), "weights are gone between steps"
            assert "magi_train.save_checkpoint()" in got["refused"]


@needs_deepspeed[0]
@needs_deepspeed[1]
@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_is_left_as_it_was(stage, monkeypatch):
    """Without a launcher, group and LOCAL_RANK are ours, and go with the engine."""
    quick()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    model = nn.Linear(4, 4)
    for _ in range(2):  # DeepSpeed must not find the group that is gone
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        prepared, sgd = magi_train.prepare(model, sgd, config=sharded(stage))
        for _ in range(2):
            prepared(torch.ones(2, 4)).sum().backward()
            sgd.step()
        assert torch.distributed.is_initialized()
        assert ("LOCAL_RANK" in os.environ) == (stage == 3), "which reads it in the first steps"
        prepared._magi_runtime.reducer.destroy()
        assert "LOCAL_RANK" not in os.environ
        assert not torch.distributed.is_initialized()
        model = nn.Linear(4, 4)


def clips_in_the_loop(rank, _, stage):
    """Return how far DDP is where DeepSpeed clips too, and what is said where it does not."""
    quick()
    by_norm = nn.utils.clip_grad_norm_  # as `from torch.nn.utils import clip_grad_norm_`

    def trained(model, optimizer, clip=by_norm):
        for step in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + rank))
            (model(x) - 10 * rank).square().mean().backward()
            clip(model.parameters(), 0.25)
            optimizer.step()
            optimizer.zero_grad()

    def made():
        torch.manual_seed(0)
        model = nn.Linear(16, 16)
        return model, torch.optim.SGD(model.parameters(), 0.5)

    (plain, sgd), (twin, own) = made(), made()
    ddp = DistributedDataParallel(plain)
    config = sharded(stage, given={"gradient_clipping": 0.25})
    model, own = magi_train.prepare(twin, own, config=config)
    trained(ddp, sgd)  # whose gradients torch clips all the same
    trained(model, own)
    far = difference(whole(twin), plain.state_dict())
    model, own = magi_train.prepare(*made(), config=sharded(stage))
    said = []
    for clip in (by_norm, nn.utils.clip_grad_value_):
        try:
            trained(model, own, clip)
        except MagiError as error:
            said.append(str(error))
    lone = nn.Linear(1, 1)  # nobody's but torch's
    lone(torch.ones(1, 1)).sum().backward()
    nn.utils.clip_grad_value_(lone.parameters(), 0.25)
    return far, said, [float(p.grad) for p in lone.parameters()]


@pytest.mark.parametrize("stage", [1, 2, 3])
class TestClipping:
    pytestmark = needs_deepspeed

    def test_in_the_loop_it_is_deepspeeds_or_refused(self, stage):
        for far, (norm, value), lone in values(run_ranks(clips_in_the_loop, stage)):
            assert far <= tolerance(torch.float32, 64)
            assert "clipping by norm to 0.25 is not possible" in norm
            assert "{'gradient_clipping': 0.25}" in norm
            assert "clipping by value to 0.25 is not possible" in value
            assert lone == [0.25, 0.25]


def leaves_a_batch_out(rank, _, stage, offload):
    """Train with a backward in between that zero_grad() is to undo; return how far DDP is."""
    quick()

    def trained(model, optimizer):
        for step in range(3):
            draw = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(8, 16, generator=draw)
            if step == 1:
                (model(x) * float("nan")).sum().backward()
                optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        return model, torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)

    (plain, sgd), (twin, own) = made(), made()
    trained(DistributedDataParallel(plain), sgd)
    model, own = magi_train.prepare(twin, own, config=sharded(stage, offload=offload))
    trained(model, own)
    return difference(whole(twin), plain.state_dict())


@pytest.mark.parametrize("stage", [1, 2, 3])
class TestZeroGrad:
    pytestmark = needs_deepspeed

    def test_a_batch_before_zero_grad_does_not_count(self, stage):
        for got in values(run_ranks(leaves_a_batch_out, stage, False)):
            assert got <= tolerance(torch.float32, 64)


@needs_deepspeed[0]
@needs_deepspeed[1]
def test_zero_grad_says_where_deepspeed_has_offloaded_what_it_should_drop():
    for got in run_ranks(leaves_a_batch_out, 2, True):
        assert "at ZeRO stage 2 with offload; use stage 1 or 3, or step" in got.error


def prepared(stage, seed=0):
    quick()
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = make("blocks")
    if seed:
        nn.init.ones_(next(iter(model.parameters())))
    adam = torch.optim.AdamW(model.parameters(), 1e-2)
    config = sharded(stage, given={"gradient_clipping": 1.0})  # train() clips to that
    return magi_train.prepare(model, adam, config=config)


def saves(rank, _, folder, stage):
    model, adam = prepared(stage)
    train(model, adam, "blocks", 0)  # the same batches on all ranks: their number is no matter
    magi_train.save_checkpoint(folder, model, adam)
    saved = whole(model._magi_module)
    want = train(model, adam, "blocks", 0, first=3)[0]
    model, adam = prepared(stage, seed=1)
    magi_train.load_checkpoint(folder, model, adam)
    assert train(model, adam, "blocks", 0, first=3)[0] == want
    model, adam = prepared(2 if stage == 3 else 3)
    try:
        magi_train.load_checkpoint(folder, model, adam)
        return want, saved, ""
    except MagiError as error:
        return want, saved, str(error)


def cannot_write(rank, _, folder):
    model, adam = prepared(2)
    magi_train.save_checkpoint(folder, model, adam)
    if rank == 0:
        writer = model._magi_runtime.reducer.engine.checkpoint_engine
        writer.save = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    train(model, adam, "blocks", rank)
    magi_train.save_checkpoint(folder, model, adam)


def resumes(rank, _, folder, stage):
    model, adam = prepared(stage, seed=1)
    magi_train.load_checkpoint(folder, model, adam)
    return train(model, adam, "blocks", 0, first=3)[0]


def saves_without_us(rank, _, folder, stage):
    """Return losses after each of two checkpoints, and the weights in the first."""
    quick()
    import deepspeed

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    given = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    more = {"zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    model = make("blocks")
    adam = torch.optim.AdamW(model.parameters(), 1e-2)
    engine = deepspeed.initialize(model=model, optimizer=adam, config={**given, **more})[0]

    def go_on(first):
        losses = []
        for step in range(first, first + 3):
            loss = engine(**uneven("blocks", step, 0))
            losses.append(float(loss))
            engine.backward(loss)
            engine.step()
        return losses

    go_on(0)
    engine.save_checkpoint(folder, client_state={"epoch": 7})
    saved, first = whole(model), go_on(3)
    engine.save_checkpoint(f"{folder}_again")
    return saved, first, go_on(3)


def resumes_both(rank, _, folder, stage):
    """Return losses after the first checkpoint, and after the second, which replaces it."""
    first = resumes(rank, _, folder, stage)
    if rank == 0:
        shutil.copytree(f"{folder}_again", folder, dirs_exist_ok=True)
    torch.distributed.barrier()
    return first, resumes(rank, _, folder, stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
class TestCheckpointsOfDeepSpeedsOwn:
    pytestmark = needs_deepspeed

    def test_they_are_read_on_any_number_of_ranks(self, stage, tmp_path):
        folder, limit = tmp_path / "run", tolerance(torch.float32, 64)
        saved, *want = values(run_ranks(saves_without_us, str(folder), stage))[0]
        plain = magi_train.plain_state_dict(folder)
        assert all(torch.equal(plain[n], v) for n, v in saved.items())
        assert client_state(folder)["epoch"] == 7
        shutil.copytree(folder, tmp_path / "other")
        for ranks, place in ((2, folder), (3, tmp_path / "other")):
            if ranks == 3:
                shutil.copytree(f"{folder}_again", f"{place}_again")
            for got in values(run_ranks(resumes_both, place, stage, world_size=ranks)):
                for mine, theirs in zip(got, want, strict=True):
                    assert mine == pytest.approx(theirs, rel=limit), ranks
        inner = folder / "global_step6"
        for path in inner.glob("*_optim_states.pt"):
            path.unlink()
        with pytest.raises(MagiError, match=r"'global_step6', and there is no \*_optim_states.pt"):
            magi_train.plain_state_dict(folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
class TestCheckpoints:
    pytestmark = needs_deepspeed

    def test_resumes_on_any_number_of_ranks_and_is_plain_weights(self, stage, tmp_path):
        folder = tmp_path / "step_3"
        want, saved, error = values(run_ranks(saves, folder, stage))[0]
        other = 2 if stage == 3 else 3
        assert f"was written at ZeRO stage {stage}, and this model is at stage {other}" in error
        for ranks in (3, 1):
            for got in values(run_ranks(resumes, folder, stage, world_size=ranks)):
                assert got == pytest.approx(want, rel=tolerance(torch.float32, 64)), ranks
        plain = magi_train.plain_state_dict(folder)
        assert plain.keys() == saved.keys()
        assert all(torch.equal(plain[n], v) for n, v in saved.items())
        make("blocks").load_state_dict(plain)
        cut = sorted((folder / "checkpoint").iterdir())[0]
        cut.write_bytes(cut.read_bytes()[:-10])
        with pytest.raises(MagiError, match=f"{cut.name} has .* was cut short"):
            magi_train.plain_state_dict(folder)
        (folder / "magi_files.json").unlink()
        (folder / "latest").unlink()
        with pytest.raises(MagiError, match=r"it has no magi_files.json"):
            magi_train.plain_state_dict(folder)


@needs_deepspeed[0]
@needs_deepspeed[1]
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    folder = tmp_path / "run"
    first, second = run_ranks(cannot_write, folder)
    assert first.error.startswith(f"MagiError: {folder} could not be written: on rank 0, OSError")
    assert "rank 0 failed: MagiError" in second.error
    assert "No space left on device" in second.error
    assert len(magi_train.plain_state_dict(folder)) == 16, "whole, and of before"
