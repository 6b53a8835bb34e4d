"""Attention of a few queries: the kernel's numbers, what is left alone, and that code runs it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from magi_train.exporter import compiled, few_queries
from magi_train.exporter.few_queries import spread
from magi_train.fusion.kernels.flash_decoding import (
    MOST_QUERIES,
    MOST_SIZE,
    block_of,
    flash_decoding,
    flash_decoding_reference,
)
from tests.close import tolerance


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return scaled_dot_product_attention(q, k, v, mask, **self.options)


def inputs(few=4, keys=300, heads=2, batch=2, dtype=torch.float32):
    return tuple(torch.randn(batch, heads, n, 16, dtype=dtype) for n in (few, keys, keys))


def taken(module, *args):
    gm = torch.export.export(module, args).module()
    return gm, spread(gm)


def masks(few, keys):
    boolean = torch.rand(2, 1, few, keys) > 0.5
    boolean[0, 0, 0] = False  # a row that sees nothing
    added = torch.randn(2, 1, few, keys)
    added[1, 0, 0, : keys * 3 // 4] = float("-inf")
    mostly_empty = torch.arange(keys).expand(2, 1, 1, keys) < keys // 8 + 1
    return {"none": None, "boolean": boolean, "added": added, "mostly empty": mostly_empty}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "boolean", "added", "mostly empty"])
@pytest.mark.parametrize(
    ("few", "keys", "size", "heads"),
    [(4, 300, 16, 2), (1, 256, 40, 2), (16, 1111, 8, 1), (3, 65, 128, 9), (2, 1, 16, 2)]
    + [(2, 100, 256, 1)],
)
def test_the_kernel_equals_float64(few, keys, size, heads, kind, dtype):
    check_numbers("cpu", few, keys, size, heads, kind, dtype)


def check_numbers(device, few, keys, size, heads, kind, dtype):
    torch.manual_seed(0)
    sizes = (2, few, heads, size), (2, heads, keys, size), (2, keys, heads, size)
    q, k, v = (torch.randn(s, device=device).to(dtype) for s in sizes)
    q, v = q.transpose(1, 2), v.transpose(1, 2)  # as projections lie
    mask = masks(few, keys)[kind]
    mask = mask if mask is None else mask.to(device, dtype if kind == "added" else None)
    wide = None if mask is None else mask.double() if kind == "added" else mask
    wanted = flash_decoding_reference(q.double(), k.double(), v.double(), wide, 0.3)
    assert not wanted[0, :, 0].any() or kind != "boolean"
    # the factors and the result are rounded to the dtype, and sums are of all keys in float32
    limit = tolerance(torch.float32, max(keys, size)) + torch.finfo(dtype).eps
    for result in (flash_decoding, flash_decoding_reference):
        got = result(q, k, v, mask, 0.3)
        assert got.dtype is dtype
        assert (got.double() - wanted).abs().max() <= limit * v.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_keys_and_values_fit_into_the_shared_memory_of_small_gpus(size, dtype):
    """Two tiles, and the queries: 99 KiB of an RTX 4090 or an A10, and the compiler takes some."""
    tile = block_of(size, dtype) * size * dtype.itemsize
    assert 2 * tile + MOST_QUERIES * size * dtype.itemsize <= 96 * 2**10


def test_no_rows_and_no_keys():
    q, k, v = inputs(keys=5)
    assert flash_decoding(q[:0], k[:0], v[:0], None, 0.25).shape == (0, *q.shape[1:])
    assert torch.equal(flash_decoding(q, k[:, :, :0], v[:, :, :0], None, 0.25), torch.zeros_like(q))


def test_keys_that_no_query_sees_are_not_read():
    q, k, v = inputs(few=2, keys=512)
    k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan
    seen = torch.arange(512).expand(1, 1, 1, 512) < 128
    got = flash_decoding(q, k, v, seen, 0.25)
    wanted = flash_decoding_reference(q, k[:, :, :128], v[:, :, :128], None, 0.25)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kind", ["none", "boolean"])
def test_attention_of_a_program(kind, scale):
    given = inputs() if kind == "none" else (*inputs(), masks(4, 300)[kind])
    gm, found = taken(Attend(scale=scale), *given)
    assert found == 1
    assert not [n for n in gm.graph.nodes if "attention" in str(n.target)]
    wanted = scaled_dot_product_attention(*given, scale=scale)
    assert torch.allclose(gm(*given), wanted, rtol=1e-5, atol=1e-5)


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
        (Attend(), inputs(few=MOST_QUERIES + 1)),
        (Attend(), inputs(keys=few_queries.LEAST_KEYS - 1)),
        (Attend(), inputs(heads=few_queries.MOST_BLOCKS)),
        (Attend(is_causal=True), inputs()),
        (Attend(dropout_p=0.5), inputs()),
        (Attend(enable_gqa=True), (inputs(heads=4)[0], *inputs()[1:])),
        (Attend(), inputs(dtype=torch.float64)),
        (Attend(), tuple(t[0, 0] for t in inputs(few=1))),
        (Attend(), (*inputs(few=1)[:2], inputs()[2][0])),
        (Attend(), tuple(torch.randn(1, 1, n, MOST_SIZE + 8) for n in (4, 300, 300))),
        (Attend(), (*inputs()[:2], torch.randn(2, 2, 300, 8))),
        (Attend(), (inputs()[0][:1], *inputs()[1:])),
    ],
    ids=["many queries", "few keys", "many heads", "causal", "dropout", "grouped", "float64"]
    + ["one head", "shared values", "large heads", "narrow values", "one query for all"],
)
def test_what_gains_nothing_or_means_something_else_is_left_alone(left):
    module, given = left
    _, found = taken(module, *given)
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
    monkeypatch.setattr(compiled, "spread", lambda gm: calls.append(spread(gm)) or calls[-1])
    given = inputs()
    program = torch.export.export(Attend(), given)
    run = compiled.Compiled(program, {})
    run(*given)
    assert not calls, "on a CPU the fused kernel has blocks enough"
    told = []
    monkeypatch.setattr(torch, "compile", lambda graph, **rest: told.append(rest) or graph)
    monkeypatch.setattr(compiled, "check_same", lambda *_: None)
    monkeypatch.setattr(compiled, "WITH_KERNELS", ("meta",))
    for keys in (300, few_queries.LEAST_KEYS - 1):
        elsewhere = tuple(t.to("meta") for t in inputs(keys=keys))
        program = torch.export.export(Attend(), elsewhere)
        compiled.Compiled(program, {"a": 1}, with_kernel={"b": 2})(*elsewhere)
    assert calls == [1, 0]
    assert [rest["options"].keys() & {"a", "b"} for rest in told] == [{"a", "b"}, {"a"}]
