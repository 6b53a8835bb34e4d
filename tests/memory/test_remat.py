"""The row of plans by hand: what leaves first, what is thinned out, what a budget can choose."""

import itertools
import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from magi_train.core.graph import is_view
from magi_train.core.hardware import HOST
from magi_train.memory.remat import Joint, Row, SavedSet, _evict, _parts_first, _thin, checkpoints
from tests.memory.joint import capture


@pytest.fixture(scope="module")
def two_products():
    """Two tanh of products: "tanh" takes 16384 bytes, "tanh_1" 512, and both are saved."""

    def function(x, w, y, v):
        return torch.tanh(x @ w).sum() + torch.tanh(y @ v).sum()

    sizes = ((64, 64), (64, 64), (8, 8), (8, 8))
    return capture(function, *(torch.ones(s, requires_grad=True) for s in sizes)).row


def test_what_is_saved_or_given_is_not_computed(two_products):
    joint = two_products.joint
    nodes = {n.name: n for n in joint.nodes}
    tanh, mm = nodes["tanh"], nodes["mm"]
    assert joint.needed([tanh], set()) == {tanh, mm}
    assert joint.needed([tanh], {mm}) == {tanh}
    assert joint.needed([tanh], {tanh}) == set()
    assert joint.needed(joint.inputs, set()) == set()


def test_what_reads_an_input_that_the_step_writes_to_runs_once():
    def function(x, buffer):
        read, free = buffer.sin(), x.cos()
        buffer.add_(1)
        return read * free, free.exp()

    graph = make_fx(function, tracing_mode="fake")(torch.ones(4), torch.ones(4)).graph
    fixed = {n.name for n in Joint(graph, 1, HOST, fused=False).fixed}
    assert fixed & {"sin", "cos", "exp"} == {"sin"}


def test_what_looks_at_an_input_is_not_kept(two_products):
    """The transposed weights are saved by their own names, but their memory is there anyway."""
    row = two_products
    saved = [n for n in row.joint.nodes if n.name in row.default.saved]
    assert any(is_view(n) for n in saved)
    assert row.saved_bytes(row.default) == 64 * 64 * 4 + 512
    assert row.saved_bytes(row.default) <= row.timeline(row.default).peak


def evicted(row, seconds):
    """Return in which order values leave, if products take so many seconds."""
    joint = row.joint
    kept, joint.seconds = joint.seconds, {n: seconds.get(n.name, 0.0) for n in joint.nodes}
    try:
        start = {n for n in joint.nodes if n.name in ("tanh", "tanh_1")}
        sets = [{n.name for n in each} for each in _evict(joint, start, set())]
    finally:
        joint.seconds = kept
    return [(before - after).pop() for before, after in itertools.pairwise(sets)]


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        ({"mm": 8.0, "mm_1": 1.0}, ["tanh", "tanh_1"]),  # 2048 and 512 bytes a second
        ({"mm": 64.0, "mm_1": 1.0}, ["tanh_1", "tanh"]),  # 256 and 512
        ({"mm": 32.0, "mm_1": 1.0}, ["tanh", "tanh_1"]),  # alike: the earlier one
    ],
)
def test_what_frees_most_for_its_time_leaves_first(two_products, seconds, order):
    assert evicted(two_products, seconds) == order


def test_results_of_several_tensors_are_taken_apart_at_once():
    graph = torch.fx.Graph()
    both = graph.call_function(torch.ops.aten.var_mean.default, (graph.placeholder("x"),))
    first = graph.call_function(operator.getitem, (both, 0))
    between = graph.call_function(torch.ops.aten.sin.default, (first,))
    second = graph.call_function(operator.getitem, (both, 1))
    unread = graph.call_function(operator.getitem, (both, 2))
    assert _parts_first([both, first, between, second]) == [both, first, second, between]
    assert _parts_first([first, between, second]) == [first, between, second], "saved before"
    assert unread not in _parts_first([both, between])


def test_many_plans_are_thinned_out_evenly():
    sets = [{i} for i in range(60)]
    assert _thin(sets) == [*sets[::3], sets[-1]]
    assert _thin(sets[:24]) == [*sets[:24], sets[23]]
    assert _thin(sets[:25]) == [*sets[:25:2], sets[24]]


def test_every_checkpoint_is_something():
    def function(x, w):
        for _ in range(4):
            x = x + torch.tanh(x @ w)
        return x.sum()

    row = capture(function, *(torch.ones(64, 64, requires_grad=True) for _ in range(2))).row
    bounds = checkpoints(row.joint)
    # the input is there anyway, so inside of the first layer one value crosses as well
    want = ["mm", "tanh", "add", "add_1", "add_2", "add_3"]
    assert [{n.name for n in bound} for bound in bounds] == [{name} for name in want]


def plan(name, seconds):
    return SavedSet(frozenset({name}), seconds)


def test_a_budget_chooses_the_fastest_that_fits_and_the_frontier_is_what_it_can_choose():
    row = object.__new__(Row)
    default, slow, slower, slowest = (plan(n, s) for n, s in zip("abcd", range(4), strict=True))
    row.default, row.plans = default, [default, slow, slower, slowest]
    peaks = {default: 10, slow: 12, slower: 6, slowest: 6}
    choices = [row.choose(peaks.__getitem__, limit) for limit in (5, 6, 9, 10, 20)]
    assert choices == [None, slower, slower, default, default]
    assert row.frontier(peaks.__getitem__) == [default, slower]
    asked = []

    def peak(plan):
        asked.append(plan)
        return peaks[plan]

    assert row.choose(peak, 6, at_least=lambda plan: 7 if plan is slow else 6) is slower
    assert asked == [default, default, slower], "what cannot fit is not looked at"
