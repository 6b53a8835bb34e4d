"""Predicted peaks against executed graphs, on chains and library models; bounds of recomputation."""

import pytest
import torch
from torch import nn

from magi_train.memory.peak import simulate
from tests.memory.joint import capture
from tests.memory.tracker import traced_peak
from tests.models import MODELS, loss_of

LAYERS, TOLERANCE = 12, 0.03


class Layer(nn.Module):
    """A wide layer around a narrow stream, with dropout."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        h = nn.functional.dropout(torch.tanh(self.up(x)), 0.1)
        return x + torch.tanh(self.down(h))


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    layers = nn.Sequential(*[Layer() for _ in range(LAYERS)])
    return capture(lambda x: layers(x).square().mean(), torch.randn(256, 16))


def spread(plans, count):
    return plans[:: max(1, len(plans) // count)]


def test_planned_and_traced_peak_agree_and_gradients_are_equal(chain):
    row = chain.row
    _, want = traced_peak(*chain.cut(row.default))
    for plan in [row.default, *spread(row.plans, 10)]:
        cut = chain.cut(plan)
        peak, gradients = traced_peak(*cut)
        assert row.timeline(plan).peak == pytest.approx(peak, rel=TOLERANCE)
        assert simulate(*cut, fused=False).peak == pytest.approx(peak, rel=TOLERANCE)
        assert all(torch.equal(g, w) for g, w in zip(gradients, want, strict=True))


def test_equal_layers_are_not_rebuilt_at_once(chain):
    """All wide values gone: what is left grows by the stream, a quarter of one, with each layer."""
    row = chain.row
    wide, narrow = 256 * 64 * 4, 256 * 16 * 4
    most = row.timeline(row.default).peak
    least = min(row.timeline(plan).peak for plan in row.plans)
    assert most > LAYERS * wide
    # of each layer the stream, and the mask that dropout drew, a byte an element
    assert least < LAYERS * (narrow + wide // 4) + 8 * wide


def test_a_smaller_budget_never_takes_a_faster_or_larger_plan(chain):
    row = chain.row
    most = row.timeline(row.default).peak
    least = min(row.timeline(plan).peak for plan in row.plans)
    budgets = [least + (most - least) * i // 9 for i in range(10)]
    chosen = [row.choose(lambda p: row.timeline(p).peak, budget) for budget in budgets]
    peaks = [row.timeline(plan).peak for plan in chosen]
    seconds = [plan.seconds for plan in chosen]
    assert all(peak <= budget for peak, budget in zip(peaks, budgets, strict=True))
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(peaks)) >= 5
    assert row.choose(lambda p: row.timeline(p).peak, least - 1) is None


def test_the_largest_tensors_at_the_peak_come_with_their_line(chain):
    course = chain.row.timeline(chain.row.default)
    sizes = [t.size_bytes for t in course.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 10
    assert sizes[0] == 256 * 64 * 4
    assert any("torch.tanh(self.up(x))" in t.line for t in course.largest)
    assert course.at in course.nodes
    assert max(course.live) == course.peak


def test_what_draws_random_numbers_is_never_run_again(chain):
    again = chain.row.joint.recomputed(set())
    random = {n for n in again if n in chain.row.joint.fixed}
    assert random, "the chain has dropout"
    nodes = {n.name: n for n in chain.row.joint.nodes}
    for plan in chain.row.plans:
        assert not chain.row.joint.recomputed({nodes[n] for n in plan.saved}) & random


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "resnet"])
def test_library_models(name):
    make, batch = MODELS[name]
    model, given = make(), batch(0)
    found = capture(lambda: loss_of(model(**given)))
    row = found.row
    _, want = traced_peak(*found.cut(row.default))
    most, least = (f(row.timeline(p).peak for p in row.plans) for f in (max, min))
    assert least < 0.9 * row.timeline(row.default).peak
    for plan in spread(row.plans, 10):
        cut = found.cut(plan)
        peak, gradients = traced_peak(*cut)
        assert simulate(*cut, fused=False).peak == pytest.approx(peak, rel=TOLERANCE)
        assert row.timeline(plan).peak == pytest.approx(peak, rel=TOLERANCE)
        assert least <= row.timeline(plan).peak <= most
        for got, wanted in zip(gradients, want, strict=True):
            assert wanted is None or torch.equal(got, wanted)
