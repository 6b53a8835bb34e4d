"""The public names are the listed ones, each with a docstring; bad input has clear errors."""

import copy
import io
import pickle
import types

import pytest
import torch
from torch import nn

import magi_train
from magi_train import CommConfig, Config
from tests.models import MODELS, Small, loss_of


def test_public_names():
    assert all(getattr(magi_train, n).__doc__ for n in magi_train.__all__)  # imports them all
    members = vars(magi_train).items()
    names = [n for n, v in members if n[0] != "_" and not isinstance(v, types.ModuleType)]
    assert sorted(magi_train.__all__) == sorted(names)
    assert set(magi_train.__all__) <= set(dir(magi_train))
    with pytest.raises(AttributeError, match="no attribute 'prepar'"):
        magi_train.prepar  # noqa: B018


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Config(tier="grap"), "Config.tier must be one of"),
        (lambda: Config(comm=None), "Config.comm must be a CommConfig, got NoneType"),
        (lambda: Config(timeout_seconds=0), "timeout_seconds must be positive, got 0"),
        (lambda: CommConfig(bucket_mib=-1), "bucket_mib must be positive, got -1"),
        (lambda: CommConfig(compression="int4"), "compression must be one of"),
        (lambda: CommConfig(low_rank=0), "low_rank must be positive, got 0"),
        (lambda: Config(memory_budget_gib=0), "memory_budget_gib must be positive, got 0"),
        (lambda: Config(memory_budget_gib="all"), "must be a number of GiB, 'auto' or None"),
        (lambda: Config(tier="eager", memory_budget_gib=1), "needs a captured graph"),
    ],
)
def test_a_wrong_setting_names_itself(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


@pytest.fixture
def prepared():
    return magi_train.prepare(Small(), config=Config(lowering="aot_eager"))


def test_names_and_state_are_those_of_the_module(prepared):
    plain = Small()
    assert list(prepared.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in prepared.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(prepared.state_dict(), strict=True)
    prepared.load_state_dict(plain.state_dict(), strict=True)
    assert prepared.head is prepared._magi_module.head
    assert prepared.train(False)._magi_module.training is False


def test_attributes_reach_the_original(prepared):
    x = torch.zeros(1, 4, dtype=torch.long)
    assert prepared.hidden(x).shape == (1, 4, 32)
    with pytest.raises(AttributeError, match="no_such_thing"):
        prepared.no_such_thing  # noqa: B018


def test_copies_are_plain(prepared):
    assert type(copy.deepcopy(prepared)) is Small
    assert type(pickle.loads(pickle.dumps(prepared))) is Small
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is Small


def test_moving_to_another_dtype_moves_the_original(prepared):
    prepared.to(torch.float64)
    assert prepared._magi_module.head.weight.dtype is torch.float64


def test_prepare_refuses_what_it_cannot_mean(prepared):
    with pytest.raises(ValueError, match="prepared already"):
        magi_train.prepare(prepared)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="no parameter of this model"):
        magi_train.prepare(Small(), other)
    with pytest.raises(TypeError, match=r"expected a module from magi_train\.prepare"):
        magi_train.report(nn.Linear(2, 2))
    spread = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"lie on \['cpu', 'meta'\]"):
        magi_train.prepare(spread)


def test_a_lazy_layer_is_named():
    with pytest.raises(ValueError, match=r"0\.weight of Sequential has no shape yet.*one batch"):
        magi_train.prepare(nn.Sequential(nn.LazyLinear(2)))
    late = nn.Linear(2, 2)
    late.register_buffer("mean", nn.UninitializedBuffer())
    with pytest.raises(ValueError, match=r"mean of Linear has no shape yet.*one batch"):
        magi_train.prepare(late)


def test_prepare_gives_back_the_optimizer():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters())
    _, same = magi_train.prepare(model, optimizer, config=Config(lowering="aot_eager"))
    assert same is optimizer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 1}, "dim must be 0"),
        ({"init_sync": False}, "init_sync must be True"),
        ({"device_ids": [0, 1]}, "must name one device"),
        ({"delay_all_reduce_named_params": [1]}, "does not take"),
        ({"process_group": object()}, "must be the default group"),
        ({"bucket_cap_mb": 5, "config": Config()}, "not both"),
    ],
)
def test_data_parallel_says_what_it_does_not_take(options, words):
    with pytest.raises(ValueError, match=words):
        magi_train.DataParallel(Small(), **options)


def test_data_parallel_looks_like_ddp():
    model = magi_train.DataParallel(
        Small(), find_unused_parameters=True, config=Config(lowering="aot_eager")
    )
    assert all(key.startswith("module.") for key in model.state_dict())
    loss_of(model(**MODELS["used_twice"][1](0))).backward()
    assert model.module.head.weight.grad is not None
    with pytest.raises(ValueError, match="compression='bfloat16'"):
        model.register_comm_hook(None, print)
    with pytest.raises(ValueError, match="same number of batches"):
        model.join().__enter__()
