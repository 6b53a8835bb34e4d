"""Attention canonicalization: what it plans, computes, refuses; on Dynamo and exported graphs."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train.core import compat
from magi_train.core.passes import PassContext
from magi_train.fusion import attention
from magi_train.fusion.attention import CanonicalizeAttention, attention_arguments
from tests.close import difference, tolerance
from tests.models import gpt2, llama, tokens

BATCH, HEADS, GROUPS, LENGTH, SIZE = 2, 4, 2, 8, 16
CUDA = PassContext("cuda")  # grouping pays there; the graph itself is traced on the CPU


def capture(function, *inputs, dynamic=False):
    """Return Dynamo's graph of `function`."""
    graphs = []
    backend = lambda gm, _: graphs.append(gm) or gm.forward  # noqa: E731
    with compat.capture_settings():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return graphs[-1]


def call(gm, q, k, v):
    """Run a captured graph; Dynamo orders inputs by first use."""
    values = {"L_q_": q, "L_k_": k, "L_v_": v}
    return gm(*(values[n.target] for n in gm.graph.find_nodes(op="placeholder")))


def qkv(heads=HEADS, length=LENGTH, keys=LENGTH, dtype=torch.float32):
    q = torch.randn(BATCH, HEADS, length, SIZE, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(BATCH, heads, keys, SIZE, dtype=dtype, requires_grad=True) for _ in "kv")
    return q, k, v


def plan_of(function, *inputs, context=CUDA, **kwargs):
    gm = capture(function, *inputs, **kwargs)
    return gm, CanonicalizeAttention().plan(gm, context)


def index_mask(rule):
    """A mask built as libraries do: from positions, in the graph."""

    def function(q, k, v):
        rows = torch.arange(q.shape[2])[None, None, :, None]
        columns = torch.arange(k.shape[2])[None, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rule(rows, columns))

    return function


def additive(rule, low=-float("inf")):
    def build(r, c):
        return torch.where(rule(r, c), 0.0, low)

    return build


def causal(r, c):
    return c <= r


PROVEN = {
    "boolean": causal,
    "expanded": lambda r, c: (c <= r).expand(BATCH, -1, -1, -1),
    "by cumsum": lambda r, c: torch.ones(1, 1, LENGTH, LENGTH).cumsum(-1) <= r + 1,
    "additive, inf": additive(causal),
    "additive, lowest": additive(causal, torch.finfo(torch.float32).min),
    "and of two": lambda r, c: (c <= r) & (c >= 0),
}
NEAR_MISSES = {
    "strict": lambda r, c: (c < r) | (r == 0),
    "window": lambda r, c: (c <= r) & (c > r - 3),
    "one hole": lambda r, c: (c <= r) & ~((r == 5) & (c == 2)),
    "one extra": lambda r, c: (c <= r) | ((r == 0) & (c == 7)),
    "shifted": lambda r, c: c <= r + 1,
    "additive bias": additive(causal, -5.0),
    "alibi": lambda r, c: torch.where(c <= r, (c - r) * 0.5, -float("inf")),
    "anti-causal": lambda r, c: c >= r,
}


@pytest.mark.parametrize("spelling", PROVEN)
def test_causal_masks_are_proven_and_dropped(spelling):
    inputs = qkv()
    function = index_mask(PROVEN[spelling])
    gm, plan = plan_of(function, *inputs)
    assert len(plan.causal) == 1
    want = function(*inputs)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    CanonicalizeAttention().apply(gm, plan, CUDA)
    gm.graph.lint()
    gm.recompile()
    (got,) = call(gm, *inputs)
    gradients = torch.autograd.grad(got.square().sum(), inputs)
    limit = tolerance(torch.float32, LENGTH * SIZE)
    pairs = {"out": got, **dict(zip("qkv", gradients, strict=True))}
    assert difference(pairs, {"out": want, **dict(zip("qkv", wanted, strict=True))}) < limit
    node = next(n for n in gm.graph.nodes if n.target in attention.ATTENTION)
    assert {n.op for n in node.all_input_nodes} == {"placeholder"}
    left = [n for n in gm.graph.nodes if n.users and n.op == "call_function" and n is not node]
    assert not left, "the mask is still computed"


@pytest.mark.parametrize("spelling", NEAR_MISSES)
def test_near_misses_are_left_alone(spelling):
    _, plan = plan_of(index_mask(NEAR_MISSES[spelling]), *qkv())
    assert not plan.causal
    assert not plan.unmasked
    assert plan.left_alone[0][1]


def test_every_mask_of_three_by_three():
    """The proof against brute force: 512 boolean masks, one of them causal, one all-true."""
    q, k, v = (torch.randn(1, 1, 3, 4) for _ in "qkv")
    verdicts = {"causal": 0, "unmasked": 0}
    for bits in itertools.product((False, True), repeat=9):
        mask = torch.tensor(bits).view(3, 3)
        graph = torch.fx.Graph()
        nodes = [graph.placeholder(name) for name in "qkv"]
        for node, value in zip(nodes, (q, k, v), strict=True):
            node.meta["example_value"] = value
        constant = graph.call_function(torch.tensor, (mask.tolist(),))
        constant.meta["example_value"] = mask
        out = graph.call_function(
            F.scaled_dot_product_attention, tuple(nodes), {"attn_mask": constant}
        )
        graph.output((out,))
        plan = CanonicalizeAttention().plan(torch.fx.GraphModule(nn.Module(), graph), CUDA)
        verdicts["causal"] += len(plan.causal)
        verdicts["unmasked"] += len(plan.unmasked)
        assert bool(plan.causal) == torch.equal(mask, torch.ones(3, 3).tril().bool())
        assert bool(plan.unmasked) == bool(mask.all())
    assert verdicts == {"causal": 1, "unmasked": 1}


def test_an_all_true_mask_is_dropped_without_causality():
    gm, plan = plan_of(index_mask(lambda r, c: (c >= 0) & (r >= 0)), *qkv(keys=6))
    assert plan.unmasked
    CanonicalizeAttention().apply(gm, plan, CUDA)
    node = next(n for n in gm.graph.nodes if n.target in attention.ATTENTION)
    assert attention_arguments(node)["attn_mask"] is None
    assert attention_arguments(node)["is_causal"] is False


def test_a_triangle_that_is_not_square_is_left_alone():
    _, plan = plan_of(index_mask(causal), *qkv(keys=LENGTH + 2))
    assert plan.left_alone[0][1] == "the mask is constant, but neither causal nor all-true"


def test_a_mask_from_an_input_is_left_alone():
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())

    _, plan = plan_of(function, *qkv(), torch.ones(BATCH, LENGTH))
    assert "depends on" in plan.left_alone[0][1]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(LENGTH, LENGTH) > -1,
        lambda: torch.bernoulli(torch.ones(LENGTH, LENGTH)).bool(),
        lambda: torch.empty(LENGTH, LENGTH).uniform_() >= 0,
        lambda: F.dropout(torch.ones(LENGTH, LENGTH), 1e-9, training=True) > 0,
    ],
)
def test_a_random_mask_is_left_alone(draw):
    _, plan = plan_of(index_mask(lambda r, c: draw()), *qkv())
    assert "is random or uninitialised" in plan.left_alone[0][1]


def hole_by_setitem(mask):
    mask[5, 2] = False
    return mask


def hole_by_method(mask):
    mask[5].logical_and_(torch.arange(LENGTH) > 2)
    return mask


def hole_by_operator(mask):
    row = mask[5]
    row &= torch.arange(LENGTH) > 2
    return mask


@pytest.mark.parametrize("change", [hole_by_setitem, hole_by_method, hole_by_operator])
def test_a_mask_that_is_changed_in_place_keeps_the_change(change):
    def function(q, k, v):
        mask = change(torch.ones(LENGTH, LENGTH).tril().bool())
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    _, plan = plan_of(function, *qkv())
    assert not plan.causal, plan
    assert plan.left_alone[0][1]


def test_a_mask_that_a_keyword_changes_in_place_keeps_the_change():
    def function(q, k, v):
        mask = torch.full((LENGTH, LENGTH), -float("inf")).triu(1)
        F.relu(mask, inplace=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    _, plan = plan_of(function, *qkv())
    assert not plan.causal, plan
    assert "in place" in plan.left_alone[0][1]


def test_a_result_that_is_changed_in_place_says_nothing_about_the_mask():
    def function(q, k, v):
        out = index_mask(causal)(q, k, v).sum()
        out *= 0.5
        return out

    _, plan = plan_of(function, *qkv())
    assert plan.causal


def test_a_view_through_which_a_mask_is_changed_is_told_from_a_copy():
    def function(q, k, v, change_a_copy):
        mask = torch.ones(LENGTH, LENGTH).tril().bool()
        rows = mask.clone() if change_a_copy else mask.view(LENGTH, LENGTH)
        rows.chunk(2)[1].fill_(True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert plan_of(lambda q, k, v: function(q, k, v, True), *qkv())[1].causal
    assert not plan_of(lambda q, k, v: function(q, k, v, False), *qkv())[1].causal


class Counts(nn.Module):
    """Changes buffers in place, as BatchNorm and moving averages do, beside an attention."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(LENGTH)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(SIZE))

    def forward(self, q, k, v):
        self.calls.add_(1)
        self.average.mul_(0.9).add_(q.detach().mean((0, 1, 2)))
        return index_mask(causal)(self.norm(q[:, 0])[:, None] + q, k, v)


def test_the_models_own_changes_in_place_survive():
    plain, inputs = Counts(), qkv()
    twin = copy.deepcopy(plain)
    prepared = magi_train.prepare(twin, config=magi_train.Config(lowering="aot_eager"))
    for _ in range(2):
        plain(*inputs).square().mean().backward()
        prepared(*inputs).square().mean().backward()
    rows = {r.name: r.plan for r in magi_train.report(prepared).rows}
    assert rows["canonicalize_attention"]["causal"]
    assert twin.calls == plain.calls == 2
    for (name, a), (_, b) in zip(plain.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double()), name


def test_repeated_heads_that_are_changed_in_place_stay():
    def function(q, k, v):
        k, v = REPEATS["interleave"](k), REPEATS["interleave"](v)
        k.mul_(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with torch.no_grad():
        _, plan = plan_of(function, *qkv(heads=GROUPS))
    assert plan is None


def test_dynamic_lengths_are_left_alone():
    _, plan = plan_of(index_mask(causal), *qkv(), dynamic=True)
    assert "dynamic" in plan.left_alone[0][1]


REPEATS = {
    "expand": lambda t: (
        t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, HEADS, LENGTH, SIZE)
    ),
    "interleave": lambda t: t.repeat_interleave(2, dim=1),
    "unsqueeze": lambda t: t.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
}  # fmt: skip


@pytest.mark.parametrize("spelling", REPEATS)
def test_repeated_heads_go_in_unrepeated(spelling):
    repeat, inputs = REPEATS[spelling], qkv(heads=GROUPS)

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    gm, plan = plan_of(function, *inputs)
    assert len(plan.grouped) == 1
    want = function(*inputs)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    CanonicalizeAttention().apply(gm, plan, CUDA)
    gm.recompile()
    (got,) = call(gm, *inputs)
    gradients = torch.autograd.grad(got.square().sum(), inputs)
    pairs = {"out": got, **dict(zip("qkv", gradients, strict=True))}
    limit = tolerance(torch.float32, LENGTH * SIZE)
    assert difference(pairs, {"out": want, **dict(zip("qkv", wanted, strict=True))}) < limit


def decode(q, k, v, repeat, rows=1):
    """One query over a cache, of which a number says how much is filled."""
    mask = (torch.arange(k.shape[2]) <= v[0, 0, 0, 0].abs())[None, None, None]
    mask = mask.expand(BATCH, 1, rows, k.shape[2])
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, scale=0.3)


SERVING = PassContext("cuda", training=False)


@pytest.mark.parametrize("spelling", REPEATS)
def test_heads_of_one_query_under_a_mask_become_rows(spelling):
    q, k, v = (t.detach() for t in qkv(heads=GROUPS, length=1))
    repeat = REPEATS[spelling]
    gm, plan = plan_of(lambda q, k, v: decode(q, k, v, repeat), q, k, v, context=SERVING)
    assert [each[0] for each in plan.left_alone] == [each[0] for each in plan.stacked]
    assert not plan.grouped
    CanonicalizeAttention().apply(gm, plan, SERVING)
    gm.recompile()
    (node,) = [n for n in gm.graph.nodes if n.target in attention.ATTENTION]
    assert node.args[0].meta["example_value"].shape == (BATCH, GROUPS, HEADS // GROUPS, SIZE)
    assert node.args[1].meta["example_value"].shape == k.shape, "repeats nothing"
    for filled in (0.5, 3.0, 20.0):
        v[0, 0, 0, 0] = filled
        (got,) = call(gm, q, k, v)
        want = decode(q, k, v, repeat)
        assert difference({"y": got}, {"y": want}) < tolerance(torch.float32, LENGTH * SIZE)


def test_heads_become_rows_only_where_all_of_them_see_the_same():
    repeat = REPEATS["interleave"]
    q, k, v = (t.detach() for t in qkv(heads=GROUPS, length=1))

    def by_head(q, k, v):
        mask = (torch.arange(LENGTH) < v[0, 0, 0, 0]).expand(1, HEADS, 1, LENGTH)
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)

    def other(q, k, v):
        return decode(q, k, v, lambda t: t.repeat(1, 2, 1, 1))

    two = torch.cat([q, q], 2)
    cases = [
        (by_head, (q, k, v), SERVING),
        (other, (q, k, v), SERVING),
        (lambda q, k, v: decode(q, k, v, repeat, 2), (two, k, v), SERVING),
        (lambda q, k, v: decode(q, k, v, repeat), (q, k, v), CUDA),
    ]
    for function, inputs, context in cases:
        _, plan = plan_of(function, *inputs, context=context)
        assert len(plan.left_alone) == 1
        assert not plan.stacked


def test_heads_in_another_order_are_not_a_repeat():
    def function(q, k, v):  # k0 k1 k0 k1, where grouped attention means k0 k0 k1 k1
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    _, plan = plan_of(function, *qkv(heads=GROUPS))
    assert plan is None


def test_on_a_cpu_heads_stay_where_grouping_has_no_fast_kernel():
    def function(q, k, v):
        repeat = REPEATS["interleave"]
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    gm = capture(function, *qkv(heads=GROUPS))
    fast = compat.fused_attention_choice(
        *(t.detach().requires_grad_() for t in qkv(heads=GROUPS)), is_causal=True, enable_gqa=True
    )
    plan = CanonicalizeAttention().plan(gm, PassContext("cpu"))
    assert (plan is not None) == (fast != 0)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_unmodified_library_models(make):
    model, ids = make(), tokens(0)
    gm = capture(lambda x: model(input_ids=x, labels=x, use_cache=False).loss, ids)
    plan = CanonicalizeAttention().plan(gm, CUDA)
    found = [n for n in gm.graph.nodes if n.target in attention.ATTENTION]
    already = [n for n in found if attention_arguments(n)["is_causal"]]
    assert len(found) == 2
    assert len(plan.causal) + len(already) == 2, "newer transformers drop the mask themselves"
    assert make is gpt2 or len(plan.grouped) == 2 or attention_arguments(found[0])["enable_gqa"]


def test_exported_programs():
    model, ids = llama().eval(), tokens(0)
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
    want = program.module()(input_ids=ids, use_cache=False).logits
    plan = CanonicalizeAttention().plan(program.graph_module, CUDA)
    masked = [n for n in program.graph_module.graph.nodes if n.target in attention.ATTENTION]
    assert len(plan.causal) == len(masked) == 2
    CanonicalizeAttention().apply(program.graph_module, plan, CUDA)
    program.graph_module.recompile()
    got = program.module()(input_ids=ids, use_cache=False).logits
    assert difference({"y": got}, {"y": want}) < tolerance(torch.float32)
