"""Generated masks: the rewritten graph equals an eager one in double precision; no wrong mask.

The graphs are written by hand, a few milliseconds each, so that hundreds of masks can be tried. The
verdict has an oracle of its own, element by element; the numbers have the attention op itself.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter

from magi_train.core.facts import ONES
from magi_train.core.passes import PassContext
from magi_train.fusion.attention import CanonicalizeAttention, mask_inputs
from tests.close import difference, tolerance

BATCH, HEADS, SIZE = 2, 4, 8
SEEDS = 60


def positions(length, keys):
    return torch.arange(length)[:, None], torch.arange(keys)[None, :]


def padded(side):
    def build(length, keys, draw):
        mask = torch.ones(BATCH, 1, 1, keys, dtype=torch.bool)
        cut = draw.randint(1, keys - 1)
        mask[draw.randrange(BATCH), ..., slice(0, cut) if side == "left" else slice(cut, None)] = 0
        return mask

    return build


def causal(length, keys, draw):
    r, c = positions(length, keys)
    return c <= r


def band(length, keys, draw):
    r, c = positions(length, keys)
    back, ahead = draw.randint(0, length), draw.choice([0, 0, draw.randint(0, length)])
    return (r - c <= back) & (c - r <= ahead)


def off_diagonal(length, keys, draw):
    r, c = positions(length, keys)
    return c <= r + draw.choice([-1, 1, keys - length, 2])


def blocks(length, keys, draw):
    r, c = positions(length, keys)
    cut = draw.randint(0, length)
    return ((r >= cut) == (c >= cut)) & (c <= r)


def flipped(length, keys, draw):
    mask = causal(length, keys, draw).expand(BATCH, HEADS, length, keys).clone()
    at = tuple(draw.randrange(n) for n in mask.shape)
    mask[at] = ~mask[at]
    return mask


def noise(length, keys, draw):
    g = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.rand(draw.choice([1, BATCH]), 1, length, keys, generator=g) > 0.3


def all_true(length, keys, draw):
    return torch.ones(length, keys, dtype=torch.bool)


KINDS = {
    "causal": causal,
    "band": band,
    "blocks": blocks,
    "left padding": padded("left"),
    "right padding": padded("right"),
    "causal and padding": lambda *a: causal(*a) & padded("right")(*a),
    "noise": noise,
    "all true": all_true,
    "off the diagonal": off_diagonal,
    "one flipped": flipped,
}
ADDITIVE = ["", "", "inf", "lowest", "finite", "alibi"]
"""How a mask is written: as booleans, or added to the scores with that value where it is false."""


def as_written(allowed, style, dtype):
    """Return a mask for the attention op: boolean, or additive in `dtype`."""
    if not style:
        return allowed
    low = {"inf": -float("inf"), "finite": -3.0}.get(style, torch.finfo(dtype).min)
    bias = torch.zeros((), dtype=dtype)
    if style == "alibi":
        r, c = positions(*allowed.shape[-2:])
        bias = -0.25 * (r - c).abs().to(dtype)
    return torch.where(allowed, bias, low).to(dtype)


def graph_of(mask, q, k, v, repeats, pad=None):
    """Return a graph of attention over q, k, v and a constant mask, and its inputs."""
    graph = Graph()
    inputs = [q, k, v] + [] if pad is None else [q, k, v, pad]
    nodes = [graph.placeholder(name) for name in ("q", "k", "v", "pad")[: len(inputs)]]
    args = nodes[:3]
    if repeats > 1:
        args[1:] = [graph.call_method("repeat_interleave", (n, repeats, 1)) for n in args[1:]]
    node = graph.call_function(torch.tensor, (mask.tolist(),), {"dtype": mask.dtype})
    if pad is not None:
        keys = graph.call_method("__getitem__", (nodes[3], (slice(None), None, None)))
        node = graph.call_function(torch.logical_and, (node, keys))
    out = graph.call_function(F.scaled_dot_product_attention, tuple(args), {"attn_mask": node})
    graph.output((out,))
    gm = GraphModule(nn.Module(), graph)

    class Notes(Interpreter):
        def run_node(self, n):
            n.meta["example_value"] = super().run_node(n)
            return n.meta["example_value"]

    Notes(gm).run(*inputs)
    return gm, inputs


def gradients(function, q, k, v, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    return dict(zip("oqkv", [out, *torch.autograd.grad(out.square().sum(), leaves)], strict=True))


def reference(mask, q, k, v, dtype):
    """Return output and gradients in `dtype`, heads repeated and mask as it is."""
    exact = mask if mask.dtype is torch.bool else mask.to(dtype)
    repeats = HEADS // k.shape[1]

    def attend(q, k, v):
        k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=exact)

    return gradients(attend, q, k, v, dtype)


def drawn(kind, seed):
    """Return mask, style and q, k, v of one case."""
    draw = random.Random(f"{kind} {seed}")
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    length = draw.choice([2, 3, 5, 8])
    keys = length if draw.random() < 0.8 else max(2, length + draw.choice([-1, 1, 3]))
    groups = draw.choice([1, 2, HEADS])
    allowed = KINDS[kind](length, keys, draw)
    allowed = allowed.expand(*allowed.shape[:-2], length, keys)
    lead = draw.choice([(), (1, 1), (BATCH, 1), (BATCH, HEADS)])
    if allowed.dim() == 2:
        allowed = allowed.expand(*lead, length, keys)
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, length, SIZE, generator=g).to(dtype)
    k, v = (torch.randn(BATCH, groups, keys, SIZE, generator=g).to(dtype) for _ in "kv")
    return allowed, draw.choice(ADDITIVE), q, k, v


def oracle(mask):
    """Return the only right verdict, by looking at every element."""
    free = 0.0 if mask.dtype.is_floating_point else True
    full, triangle = True, mask.shape[-1] == mask.shape[-2]
    lowest = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else False
    for matrix in mask.reshape(-1, *mask.shape[-2:]).tolist():
        for r, row in enumerate(matrix):
            for c, value in enumerate(row):
                full &= value == free
                triangle &= value == free if c <= r else value <= lowest and value != free
    return "unmasked" if full else "causal" if triangle else "left"


def check(gm, plan, inputs, mask, verdict):
    """Compare plan and rewritten graph with what the mask means."""
    got = {"causal": plan and plan.causal, "unmasked": plan and plan.unmasked}
    assert [name for name, nodes in got.items() if nodes] == [verdict] * (verdict != "left")
    q, k, v = inputs[:3]
    shut = mask <= torch.finfo(mask.dtype).min if mask.is_floating_point() else ~mask
    if verdict == "left" and bool(shut.all(-1).any()):
        return  # a row without a key: kernels differ about it, and the mask is still there
    if plan is not None:
        CanonicalizeAttention().apply(gm, plan, PassContext("cuda"))
        gm.graph.lint()
        gm.recompile()
    ours = gradients(lambda q, k, v: gm(q, k, v, *inputs[3:])[0], q, k, v, q.dtype)
    exact, eager = reference(mask, q, k, v, torch.float64), reference(mask, q, k, v, q.dtype)
    longest = HEADS * max(q.shape[-2], k.shape[-2]) * SIZE  # a key's gradient, over grouped heads
    limit = tolerance(q.dtype, longest) + 2 * difference(eager, exact)  # one key: all cancels
    assert difference(ours, exact) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_constant_masks(kind):
    verdicts = set()
    for seed in range(SEEDS):
        allowed, style, q, k, v = drawn(kind, seed)
        mask = as_written(allowed, style, q.dtype)
        gm, inputs = graph_of(mask, q, k, v, HEADS // k.shape[1])
        plan = CanonicalizeAttention().plan(gm, PassContext("cuda"))
        verdict = oracle(mask)
        verdicts.add(verdict)
        check(gm, plan, inputs, mask, verdict)
    wanted = {"causal": {"causal"}, "band": {"causal"}, "all true": {"unmasked"}}
    assert verdicts >= wanted.get(kind, set()) | {"left"}, "the generator misses a verdict"


@pytest.mark.parametrize("kind", ["causal", "all true", "band", "noise"])
def test_masks_with_padding(kind):
    """With the fact, a padding of ones is no part of the mask; without it nothing is proven."""
    seen = set()
    for seed in range(SEEDS):
        mask, _, q, k, v = drawn(kind, seed)
        draw = random.Random(seed)
        keys = k.shape[-2]
        full = draw.random() < 0.5
        pad = torch.ones(BATCH, keys, dtype=draw.choice([torch.bool, torch.int64, torch.float32]))
        if not full:
            pad[draw.randrange(BATCH), draw.randrange(keys)] = 0
        gm, inputs = graph_of(mask, q, k, v, HEADS // k.shape[1], pad)
        assert mask_inputs(gm) == [frozenset({"pad"})]
        facts = PassContext("cuda", facts={"pad": ONES} if full else {})
        whole = mask & pad.bool()[:, None, None]
        verdict = oracle(mask.expand_as(whole)) if full else "left"
        plan = CanonicalizeAttention().plan(gm, facts)
        assert plan.assumed == (("pad",) if verdict != "left" else ())
        check(gm, plan, inputs, whole, verdict)
        seen.add((full, verdict))
    assert (False, "left") in seen
    assert len(seen) > 1


WINDOWS = [
    (2, 0, "2 keys back and 0 ahead"),
    (0, 0, "0 keys back"),
    (3, 1, "3 keys back and 1 ahe"),
]


@pytest.mark.parametrize(("back", "ahead", "words"), WINDOWS)
def test_windows_are_named_and_left(back, ahead, words):
    r, c = positions(6, 6)
    mask = (r - c <= back) & (c - r <= ahead)
    q, k, v = (torch.randn(BATCH, HEADS, 6, SIZE) for _ in "qkv")
    for shaped in (mask, mask.expand(BATCH, 1, 6, 6)):
        gm, _ = graph_of(shaped, q, k, v, 1)
        plan = CanonicalizeAttention().plan(gm, PassContext("cuda"))
        assert words in plan.left_alone[0][1]
        near = shaped.clone()
        near[..., 4, 4] = False
        gm, _ = graph_of(near, q, k, v, 1)
        plan = CanonicalizeAttention().plan(gm, PassContext("cuda"))
        assert "neither causal nor all-true" in plan.left_alone[0][1]


def test_a_window_over_the_whole_length_is_causal():
    r, c = positions(6, 6)
    q, k, v = (torch.randn(BATCH, HEADS, 6, SIZE) for _ in "qkv")
    gm, _ = graph_of((r - c < 6) & (c <= r), q, k, v, 1)
    assert CanonicalizeAttention().plan(gm, PassContext("cuda")).causal


def test_capped_scores_are_no_attention_op():
    """Scores that pass a tanh are written out by their models: there is no mask to drop."""

    def capped(q, k, v):
        scores = 5 * torch.tanh(q @ k.transpose(-1, -2) / 5)
        r, c = positions(*scores.shape[-2:])
        return torch.where(c <= r, scores, -float("inf")).softmax(-1) @ v

    graphs = []
    inputs = [torch.randn(BATCH, HEADS, 6, SIZE) for _ in "qkv"]
    backend = lambda gm, _: graphs.append(gm) or gm.forward  # noqa: E731
    torch.compile(capped, backend=backend, fullgraph=True)(*inputs)
    assert CanonicalizeAttention().plan(graphs[0], PassContext("cuda")) is None
