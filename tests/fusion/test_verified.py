"""The proof framework: what a region is, what runs in a proof, and that near misses fail."""

import pytest
import torch
import torch.nn.functional as F

from magi_train.core.graph import example_value, op_name
from magi_train.fusion.verified import Small, autocast_at, prove, slice_region

ROWS, WIDTH = 1000, 200


def rms_norm(x, weight, power=2, eps=1e-6, mean=torch.mean):
    return x * torch.rsqrt(mean(x.float().pow(power), -1, True) + eps).to(x.dtype) * weight


def captured(function, inputs, use, dynamic=False):
    """Call `use(gm, input nodes, output node)` inside a Dynamo backend; return what it does."""
    results = []

    def backend(gm, _):
        found = [n for n in gm.graph.find_nodes(op="placeholder") if tensor(n)]
        results.append(use(gm, found, gm.graph.output_node().args[0][0]))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return results[0]


def tensor(node):
    return isinstance(example_value(node), torch.Tensor)


def verdict(gm, inputs, output, reference=rms_norm):
    """Propose that the whole graph computes `reference`."""
    region = slice_region(gm, inputs, output)
    if isinstance(region, str):
        return region
    fakes = [example_value(n) for n in inputs]
    small = Small(fakes)

    def draw(how):
        return [how.normal(small.shape(v), v, how.magnitude if v.dim() > 1 else 1.0) for v in fakes]

    def function(*values):
        x = next(v for v in values if v.dim() > 1)
        return reference(x, next(v for v in values if v.dim() == 1))

    return prove(region, lambda exact: function, draw, small, autocast_at(gm, output))


def arguments(dtype=torch.float32):
    return torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(WIDTH, dtype=dtype)


def spelled(x, weight):
    variance = (x.float() * x.float()).mean(-1, keepdim=True)
    return weight * (x / (variance + 1e-6).sqrt().to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_another_spelling_is_proven(dtype, dynamic):
    assert captured(spelled, arguments(dtype), verdict, dynamic) == ""


NEAR_MISSES = {
    "epsilon": lambda x, w: rms_norm(x, w, eps=1e-4),
    "sum": lambda x, w: rms_norm(x, w, mean=torch.sum),
    "power": lambda x, w: rms_norm(x, w, power=2.001),
    "weight plus one": lambda x, w: rms_norm(x, w + 1),
    "centred": lambda x, w: rms_norm(x - x.mean(-1, keepdim=True), w),
    "no gradient": lambda x, w: rms_norm(x, w.detach()),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_misses_fail(miss, dtype):
    why = captured(NEAR_MISSES[miss], arguments(dtype), verdict)
    assert "differs from the reference by" in why or "cannot be executed" in why, why


def test_a_fine_near_miss_fails_where_the_dtype_resolves_it():
    why = captured(lambda x, w: rms_norm(x, w, eps=1.002e-6), arguments(), verdict)
    assert "differs from the reference by" in why


def read_inside(x, weight):
    h = x * 2.0
    return h * weight + x.sum(), h


def in_place(x, weight):
    h = x * 2.0
    h.add_(1.0)
    return h * weight


def input_in_place(x, weight):
    h = x * weight
    x.add_(1.0)
    return h + weight


def random(x, weight):
    return F.dropout(x, 0.5) * weight


REFUSED = {
    "read inside": (read_inside, "is also read by"),
    "changed in place": (in_place, "changes a tensor in place"),
    "an input is changed in place": (input_in_place, "changes a tensor in place"),
    "random": (random, "is random or uninitialised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_regions_that_may_not_be_replaced(case):
    function, expected = REFUSED[case]
    assert expected in captured(function, arguments(), verdict)


def test_another_input_is_named():
    def use(gm, inputs, output):
        return slice_region(gm, inputs[:1], output)

    assert captured(spelled, arguments(), use).startswith("it also depends on l_")


def test_a_proof_leaves_no_trace():
    def use(gm, inputs, output):
        before = torch.get_rng_state(), [n.format_node() for n in gm.graph.nodes]
        assert verdict(gm, inputs, output) == ""
        assert torch.is_grad_enabled() == enabled
        return before, (torch.get_rng_state(), [n.format_node() for n in gm.graph.nodes])

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            (state, nodes), (later, after) = captured(spelled, arguments(), use)
        assert torch.equal(state, later)
        assert nodes == after


def test_a_proof_runs_on_small_sizes():
    seen = []

    def reference(x, weight):
        seen.append(x.numel())
        return rms_norm(x, weight)

    assert captured(spelled, arguments(), lambda *a: verdict(*a, reference)) == ""
    assert max(seen) < 1000


def test_exported_programs():
    class Norm(torch.nn.Module):
        def forward(self, x, weight):
            return spelled(x, weight)

    sizes = {"x": {0: torch.export.Dim("rows")}, "weight": None}
    gm = torch.export.export(Norm(), arguments(), dynamic_shapes=sizes).graph_module
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    assert verdict(gm, inputs, gm.graph.output_node().args[0][0]) == ""


def test_spelled_out_shapes_are_made_small():
    def rows(x, weight):
        return x.view(50, 20, WIDTH).reshape(ROWS, WIDTH) * weight

    assert captured(rows, arguments(), lambda *a: verdict(*a, torch.mul)).startswith(
        "it cannot be executed"
    ), "20 has no stand-in"

    def heads(x, weight):
        return x.view(ROWS, 2, WIDTH // 2, 1).flatten(2).view(ROWS, WIDTH) * weight

    why = captured(heads, arguments(), lambda *a: verdict(*a, torch.mul))
    assert "no small stand-in for the size 100" in why

    def flat(x, weight):
        return x.view(ROWS * WIDTH).view(ROWS, WIDTH).view(10 * ROWS // 10, WIDTH) * weight

    assert captured(flat, arguments(), lambda *a: verdict(*a, torch.mul)) == ""


def test_autocast_is_that_of_the_place():
    def function(x, weight):
        before = x @ x.t()
        with torch.autocast("cpu", torch.bfloat16):
            inside = x @ x.t()
            with torch.autocast("cpu", enabled=False):
                off = x @ x.t()
        return before, inside, off, x @ x.t() * weight[0]

    def use(gm, inputs, output):
        products = [n for n in gm.graph.nodes if op_name(n) == "matmul"]
        return [autocast_at(gm, n).enabled for n in products]

    assert captured(function, arguments(), use) == [False, True, False, False]
    with torch.autocast("cpu", torch.bfloat16):
        assert captured(function, arguments(), use) == [True, True, False, True]


def test_autocast_takes_part_in_the_proof():
    def function(x, weight):
        return F.linear(x, weight[None])[:, 0]

    def product(x, weight):
        return x @ weight

    def product_in_float32(x, weight):
        with torch.autocast("cpu", enabled=False):
            return x @ weight

    def use(reference):
        return lambda *a: verdict(*a, reference)

    with torch.autocast("cpu", torch.bfloat16):
        assert captured(function, arguments(), use(product)) == ""
        why = captured(function, arguments(), use(product_in_float32))
    assert why == "it is torch.bfloat16, alone torch.bfloat16, replaced torch.float32"
