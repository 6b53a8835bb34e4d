"""Attention of a few queries written out: numbers, what is left alone, and that code runs it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from magi_train.exporter import compiled, few_queries
from magi_train.exporter.few_queries import spread


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return scaled_dot_product_attention(q, k, v, mask, **self.options)


def inputs(few=4, keys=300, heads=2, batch=2, dtype=torch.float32):
    return tuple(torch.randn(batch, heads, n, 16, dtype=dtype) for n in (few, keys, keys))


def written_out(module, *args):
    gm = torch.export.export(module, args).module()
    return gm, spread(gm)


def masks(few=4, keys=300):
    seen = torch.rand(2, 1, few, keys) > 0.5
    seen[0, 0, 1] = False  # a row that sees nothing
    added = torch.randn(2, 1, few, keys)
    added[1, 0, 0, :250] = float("-inf")
    return {"none": None, "boolean": seen, "added": added, "of keys": seen[:, :, :1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "boolean", "added", "of keys"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_numbers(kind, scale, dtype):
    q, k, v = inputs(dtype=dtype)
    mask = masks()[kind]
    mask = mask.to(dtype) if kind == "added" else mask
    given = (q, k, v) if mask is None else (q, k, v, mask)
    gm, found = written_out(Attend(scale=scale), *given)
    assert found == 1
    assert not [n for n in gm.graph.nodes if "attention" in str(n.target)]
    wide = [t.double() if t.is_floating_point() else t for t in given]
    wanted = scaled_dot_product_attention(*wide, scale=scale)
    got = gm(*given)
    assert got.dtype is dtype
    # a sum over 300 keys in float32, then one rounding
    limit = 300 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (got.double() - wanted).abs().max() <= limit * v.double().abs().max()


def test_attention_that_a_pass_has_put_into_the_graph():
    given = inputs(few=1)
    gm = torch.export.export(Attend(), given).module()
    (node,) = [n for n in gm.graph.nodes if "attention" in str(n.target)]
    node.target = scaled_dot_product_attention  # as CanonicalizeAttention stacks heads
    assert spread(gm) == 1
    assert torch.allclose(gm(*given), Attend()(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "left",
    [
        (Attend(), inputs(few=few_queries.MOST_QUERIES + 1)),
        (Attend(), inputs(keys=few_queries.LEAST_KEYS - 1)),
        (Attend(), inputs(heads=few_queries.MOST_BLOCKS)),
        (Attend(is_causal=True), inputs()),
        (Attend(dropout_p=0.5), inputs()),
        (Attend(enable_gqa=True), (inputs(heads=4)[0], *inputs()[1:])),
        (Attend(), inputs(dtype=torch.float64)),
        (Attend(), tuple(t[0, 0] for t in inputs(few=1))),
        (Attend(), (*inputs(few=1)[:2], inputs()[2][0])),
    ],
    ids=["many queries", "few keys", "many heads", "causal", "dropout", "grouped", "float64"]
    + ["one head", "shared values"],
)
def test_what_gains_nothing_or_means_something_else_is_left_alone(left):
    module, given = left
    _, found = written_out(module, *given)
    assert found == 0


def test_sizes_that_vary_are_left_alone():
    class Plain(Attend):
        def forward(self, q, k, v):
            return super().forward(q, k, v)

    batch = torch.export.Dim("batch", min=1, max=4)
    given = inputs()
    gm = torch.export.export(Plain(), given, dynamic_shapes=({0: batch},) * 3).module()
    assert spread(gm) == 0
    assert torch.equal(gm(*given), Attend()(*given))


def test_compiled_programs_use_it_where_there_is_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(compiled, "spread", lambda gm: calls.append(spread(gm)))
    given = inputs()
    program = torch.export.export(Attend(), given)
    run = compiled.Compiled(program, {})
    run(*given)
    assert not calls, "on a CPU the fused kernel has blocks enough"
    gm = program.module()
    spread(gm)
    torch._dynamo.reset()
    got = torch.compile(gm, fullgraph=True)(*given)
    assert torch.allclose(got, Attend()(*given), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    monkeypatch.setattr(compiled, "_check", lambda *_: None)
    elsewhere = tuple(t.to("meta") for t in given)
    compiled.Compiled(torch.export.export(Attend(), elsewhere), {})(*elsewhere)
    assert calls == [1]
