"""The outer loop in one process: the arithmetic by hand; another rank's ways are given."""

import pytest
import torch
from torch import nn

from magi_train.comm.outer import NO_AUTOCAST, OuterLoop
from magi_train.comm.plan import plan_buckets
from magi_train.core.config import CommConfig
from magi_train.core.report import Report
from magi_train.core.world import World

H, LR, MOMENTUM = 2, 0.5, 0.75
OTHER = -2.0
"""How far each weight of the other rank comes in a round, all elements alike."""


class Pair:
    """Stands for the compressor of two ranks: adds what the other one sends."""

    def __init__(self, module, config):
        self.plan = plan_buckets(module.named_parameters(), config, 2)
        self.way, self.started, self.settled = OTHER, [], 0

    def factor(self, index, autocast):
        assert autocast == NO_AUTOCAST
        return 0.5

    def start(self, index, flat, used, scale, autocast):
        bucket = self.plan.buckets[index]
        assert (scale, autocast) == (1.0, NO_AUTOCAST)
        assert used == {s.name for s in bucket.slots}
        assert flat.shape == (bucket.numel,)
        assert flat[bucket.flags_offset :].tolist() == [1.0] * len(bucket.slots)
        self.started.append(index)
        self.flat, self.bucket = flat, bucket
        return self

    def wait(self):
        for slot in self.bucket.slots:
            slot.view(self.flat).add_(self.way * self.factor(0, NO_AUTOCAST))

    def settle(self):
        self.settled += 1


@pytest.fixture
def loop():
    """Return (module, pair, report, loop); the module has a weight, a frozen one and a buffer."""
    module = nn.Linear(3, 2)
    module.register_buffer("seen", torch.ones(2))
    module.register_parameter("fixed", nn.Parameter(torch.ones(2), requires_grad=False))
    with torch.no_grad():
        module.weight.fill_(10.0)
        module.bias.fill_(20.0)
    config = CommConfig(outer_steps=H, outer_lr=LR, outer_momentum=MOMENTUM)
    report = Report()
    return module, Pair(module, config), report, OuterLoop(module, World(), config, report)


def walk(module, outer, pair, way, steps=H):
    """Take local steps that move weights by `way` each, towards less."""
    for _ in range(steps):
        outer.begin(pair)
        with torch.no_grad():
            module.weight.sub_(way)
            module.bias.sub_(2 * way)
        outer.count()


def values(module):
    return module.weight.unique().tolist(), module.bias.unique().tolist()


def test_two_rounds_by_hand(loop):
    module, pair, _, outer = loop
    walk(module, outer, pair, 1.0)
    assert values(module) == ([8.0], [16.0]), "alone"
    assert pair.started == []
    outer.begin(pair)
    # deltas (2 - 2) / 2 = 0 and (4 - 2) / 2 = 1, which is also the momentum of each
    assert values(module) == ([10.0], [20 - LR * (1 + MOMENTUM)])
    assert outer.steps == 0
    start = 20 - LR * (1 + MOMENTUM)
    walk(module, outer, pair, 3.0)
    outer.exchange(pair)
    first, second = (6 - 2) / 2, (12 - 2) / 2
    assert values(module) == (
        [10 - LR * (first + MOMENTUM * first)],
        [start - LR * (second + MOMENTUM * (MOMENTUM * 1 + second))],
    )
    buckets = len(pair.plan.buckets)
    assert pair.started == [*range(buckets)] * 2
    assert pair.settled == 2
    state = outer.state()
    assert state["weight"].unique().tolist() == [first]
    assert state["bias"].unique().tolist() == [MOMENTUM + second]
    assert module.fixed.tolist() == [1.0, 1.0]


def test_no_step_no_exchange_and_a_short_round_on_request(loop):
    module, pair, _, outer = loop
    outer.begin(pair)
    outer.exchange(pair)
    assert pair.started == []
    walk(module, outer, pair, 1.0, steps=1)
    outer.begin(pair)  # a second forward of the round: nothing
    assert values(module) == ([9.0], [18.0])
    outer.exchange(pair)
    assert values(module) == ([10 + LR * (1 + MOMENTUM) / 2], [20.0])
    outer.exchange(pair)
    assert pair.settled == 1


def test_a_round_begins_with_the_weights_of_its_first_forward(loop):
    """What the user does to them between an exchange and it counts for nothing."""
    module, pair, _, outer = loop
    walk(module, outer, pair, 1.0)
    outer.exchange(pair)
    with torch.no_grad():
        module.weight.fill_(100.0)
        module.bias.fill_(100.0)
    pair.way = 0.0
    walk(module, outer, pair, 0.0)
    outer.exchange(pair)
    # no way, only momentum: none of the weight, and 0.75 of the bias'
    assert values(module) == ([100.0], [100 - LR * MOMENTUM * MOMENTUM])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_way_that_is_not_finite_is_not_taken(loop, bad):
    module, pair, report, outer = loop
    for refused in (1, 2):
        walk(module, outer, pair, 1.0)
        pair.way = bad
        outer.exchange(pair)
        assert values(module) == ([10.0], [20.0])
        assert outer.state() == {}
        assert f"outer step {refused} of those that were not taken" in report.notes[-1]
    pair.way = OTHER
    walk(module, outer, pair, 1.0)
    outer.exchange(pair)
    assert values(module) == ([10.0], [20 - LR * (1 + MOMENTUM)])
    assert len(report.notes) == 2


def test_weights_that_are_loaded_in_a_round_are_no_way(loop):
    module, pair, _, outer = loop
    walk(module, outer, pair, 1.0, steps=1)
    module.load_state_dict({n: torch.full_like(v, 7.0) for n, v in module.state_dict().items()})
    assert outer.steps == 0
    outer.exchange(pair)
    assert values(module) == ([7.0], [7.0])


def test_momentum_by_parameter_is_loaded_and_checked(loop):
    module, pair, _, outer = loop
    walk(module, outer, pair, 1.0, steps=1)
    outer.load({"bias": torch.full((2,), 4.0), "gone": torch.ones(1)})
    assert outer.steps == 0
    assert {n: m.tolist() for n, m in outer.state().items()} == {"bias": [4.0, 4.0]}
    outer.load({})
    assert outer.state() == {}
    with pytest.raises(ValueError, match=r"of bias has shape \[3\], the parameter \[2\]"):
        outer.load({"bias": torch.ones(3)})


def test_what_is_frozen_later_is_forgotten(loop):
    module, pair, _, outer = loop
    outer.begin(pair)
    module.bias.requires_grad_(False)
    pair.plan = plan_buckets(module.named_parameters(), CommConfig(), 2)
    outer.begin(pair)
    assert outer._before.keys() == {"weight"}
