"""Max-pooling's backward by a kernel: what it computes, where it is used, where it is not."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor import inductor_prims  # noqa: F401  (defines the ops)
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import magi_train
from magi_train import Config, FusionConfig
from magi_train.core import compat
from magi_train.fusion import max_pool
from magi_train.fusion.max_pool import SMALLEST

pytest.importorskip("triton")
from magi_train.fusion.kernels import max_pool_backward as kernels
from magi_train.fusion.kernels import multi_tensor
from tests.close import difference, relative_error, tolerance

SHAPE = (8, 16, 64, 64)
assert torch.Size(SHAPE).numel() == SMALLEST
WINDOWS = [  # shape, kernel, stride, padding, ceil_mode
    ((2, 24, 13, 17), (3, 3), (2, 2), (1, 1), False),
    ((2, 5, 8, 8), (2, 2), (2, 2), (0, 0), False),
    ((1, 130, 9, 10), (3, 2), (1, 3), (1, 0), False),
    ((2, 7, 11, 11), (3, 3), (2, 2), (0, 0), True),
    ((1, 3, 12, 12), (2, 2), (3, 3), (0, 0), False),
    ((1, 4, 10, 10), (5, 5), (1, 1), (2, 2), False),
    ((0, 4, 10, 10), (2, 2), (2, 2), (0, 0), False),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "ceil"), WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_reference_equal_pytorch(shape, kernel, stride, padding, ceil, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    window = (kernel, stride, padding, (1, 1), ceil)
    y, offsets = torch.ops.prims._low_memory_max_pool_with_offsets(x, *window)
    dy = torch.randn(y.shape, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    want = F.max_pool2d(wide, kernel, stride, padding, ceil_mode=ceil)
    (exact,) = torch.autograd.grad(want, wide, dy.double())
    limit = tolerance(dtype, kernel[0] * kernel[1], 1)
    functions = [kernels.max_pool_backward_reference]
    if multi_tensor.interpreted():
        functions.append(kernels.max_pool_backward)
    for function in functions:
        got = function(dy, offsets, shape[2:], kernel, stride, padding)
        assert (got.dtype, got.shape) == (dtype, exact.shape)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert difference({"": got}, {"": exact}) <= limit


class Pooled(nn.Module):
    """A convolution, a pool and what comes before them in a ResNet's stem."""

    def __init__(self, pool=None, channels=16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = pool or nn.MaxPool2d(3, 2, 1)
        self.next = nn.Conv2d(channels, channels, 3, bias=False)

    def forward(self, x):
        return self.next(self.pool(self.norm(self.stem(x)).relu())).square().mean()


def train(model, x, wanted=True):
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    config = Config(fusion=FusionConfig(max_pool=wanted), progress=False)
    prepared = magi_train.prepare(model, config=config)
    _, codes = run_and_get_code(lambda: prepared(x).backward())
    rows = [r for r in magi_train.report(prepared).rows if r.name == "max_pool_backward"]
    found = {n: p.grad for n, p in model.named_parameters()}
    return found, rows[-1].plan if rows else None, "".join(codes)


def exact(model, x):
    wide = copy.deepcopy(model).double()
    wide(x.double()).backward()
    return {n: p.grad for n, p in wide.named_parameters()}


def test_a_convolutional_net_trains_with_it():
    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(8, 3, 64, 64)
    got, plan, code = train(model, x)
    assert len(plan["taken"]) == 1
    assert not plan["left_alone"]
    assert "magi_train.max_pool_backward.default(" in code
    usual, none, without = train(model, x, wanted=False)
    assert none is None
    assert "magi_train.max_pool_backward" not in without
    want = exact(model, x)
    assert relative_error(got, want) < 1.1 * relative_error(usual, want)


@pytest.mark.parametrize(
    ("pool", "size", "said"),
    [
        (nn.MaxPool2d(3, 2, dilation=2), 64, "dilated"),
        pytest.param(nn.MaxPool2d(7, 2), 64, "keeps no offsets", marks=pytest.mark.full),
    ],
)
def test_what_is_left_alone_is_right_all_the_same(pool, size, said):
    torch.manual_seed(0)
    model, x = Pooled(pool), torch.randn(8, 3, size, size)
    got, plan, code = train(model, x)
    assert not plan["taken"]
    ((_, reason),) = plan["left_alone"]
    assert said in reason
    assert "magi_train.max_pool_backward" not in code
    assert difference(got, exact(model, x)) < tolerance(torch.float32, 8 * size * size)


def test_of_two_pools_the_small_one_is_left_alone():
    torch.manual_seed(0)
    model = Pooled(nn.Sequential(nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2)))
    x = torch.randn(8, 3, 64, 64)
    got, plan, _ = train(model, x)
    assert len(plan["taken"]) == 1
    assert "elements; from 524288" in plan["left_alone"][0][1]
    assert difference(got, exact(model, x)) < tolerance(torch.float32, 8 * 64 * 64)


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (torch.empty(SHAPE), True),
        (torch.empty(SHAPE[0] - 1, *SHAPE[1:]), False),
        (torch.empty(SHAPE, dtype=torch.float64), False),
        (torch.empty(SHAPE[1:]), False),
    ],
    ids=["taken", "small", "float64", "one image"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_pytorchs_decomposition_is_left_out_only_where_a_pool_is_taken(x, wanted, checkpointed):
    found = []

    def backend(gm, inputs):
        found.append(max_pool.may_take(gm))
        return gm

    def pooled(x):
        pool = lambda y: F.max_pool2d(y + 1, 3, 2)  # noqa: E731
        return checkpoint(pool, x, use_reentrant=False) if checkpointed else pool(x)

    for dynamic in (False, True):
        torch._dynamo.reset()
        torch.compile(pooled, backend=backend, dynamic=dynamic)(x)
    assert found == [wanted, False], "of unknown sizes none is"


@pytest.mark.parametrize(("size", "taken"), [(64, 2), (16, 0)])
def test_windows_of_one_number_for_both_sides(size, taken):
    class Sides(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.max_pool2d(x, (3,), (1,), (1,)), [2])

    torch.manual_seed(0)
    model, x = Pooled(Sides()), torch.randn(8, 3, size, size)
    got, plan, _ = train(model, x)
    assert len(plan.get("taken", ())) == taken
    assert difference(got, exact(model, x)) < tolerance(torch.float32, 8 * size * size)


def test_float64_stays_so():
    torch.manual_seed(0)
    model, x = Pooled().double(), torch.randn(8, 3, 64, 64).double()
    got, plan, _ = train(model, x)
    assert not plan.get("taken")
    assert difference(got, exact(model, x)) < tolerance(torch.float64, 8 * 64 * 64)


def test_code_is_taken_from_pytorchs_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = torch._dynamo.utils.counters["aot_autograd"]
    before, x = hits["autograd_cache_hit"], torch.randn(8, 3, 64, 64)
    for cached in (False, True):
        torch._dynamo.reset()
        config = Config(fusion=FusionConfig(max_pool=True), progress=False)
        prepared = magi_train.prepare(Pooled(), config=config)
        prepared(x).backward()
        (row,) = [r for r in magi_train.report(prepared).rows if r.name == "max_pool_backward"]
        assert len(row.plan["taken"]) == 1
        assert row.cached == cached
    assert hits["autograd_cache_hit"] == before + 1


@pytest.mark.usefixtures("idle_kernels")
def test_a_graph_without_channels_last_is_left_alone(monkeypatch):
    monkeypatch.setattr(compat, "wants_channels_last", lambda gm: False)
    _, plan, code = train(Pooled(channels=24), torch.randn(8, 3, 64, 64))
    assert "channels innermost" in plan["left_alone"][0][1]
    assert "magi_train.max_pool_backward" not in code


def test_whether_inductor_wants_channels_last():
    class Graph(nn.Module):
        def __init__(self, convolutional):
            super().__init__()
            self.convolutional = convolutional

        def forward(self, x, weight):
            return torch.ops.aten.convolution.default(
                x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
            ) if self.convolutional else x @ weight  # fmt: skip

    for convolutional in (True, False):
        inputs = [torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)]
        if not convolutional:
            inputs = [torch.randn(2, 3), torch.randn(3, 2)]
        gm = torch.fx.experimental.proxy_tensor.make_fx(Graph(convolutional), tracing_mode="fake")(
            *inputs
        )
        assert compat.wants_channels_last(gm) is convolutional
