"""What is changed in the code that Inductor generates for GPUs: erf, and the sums over rows."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import magi_train
from magi_train import Config, FusionConfig, lower
from magi_train.fusion import partial_sums
from magi_train.fusion.kernels.column_sums import column_sums
from tests.close import difference, relative_error, tolerance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CAST_ALONE = "triton_poi_fused__to_copy_view"
ROWS, WIDTH = 8192, 1024
"""Enough for Inductor to sum rows and columns in one kernel."""


class Block(nn.Module):
    """What a transformer's MLP is."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.second(F.gelu(self.first(self.norm(x))))


def blocks():
    torch.manual_seed(0)
    x = torch.randn(8, ROWS // 8, WIDTH, device="cuda", requires_grad=True)
    return nn.Sequential(Block(), Block()).to("cuda"), x


def gradients(model, x, fusion):
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    prepared = magi_train.prepare(model, config=Config(fusion=fusion, progress=False))

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            prepared(x).square().mean().backward()

    _, codes = run_and_get_code(step)
    rows = [r for r in magi_train.report(prepared).rows if r.name == "narrow_erf"]
    return {n: p.grad for n, p in model.named_parameters()}, "".join(codes), rows


def test_gradients_are_as_near_float64_as_without(monkeypatch):
    model, x = blocks()
    got, code, rows = gradients(model, x, FusionConfig())
    monkeypatch.setattr(lower, "_cast_where_computed", lambda graph: None)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    usual, plain, none = gradients(model, x, FusionConfig(narrow_erf=False))
    assert partial_sums.OPERATOR in code
    assert ".erf(" not in code
    assert CAST_ALONE not in code, "the norm's kernel casts"
    assert CAST_ALONE in plain
    assert rows[-1].plan["narrowed"]
    assert ".erf(" in plain
    assert not none
    wide = copy.deepcopy(model).double()
    wide(x.double()).square().mean().backward()
    exact = {n: p.grad for n, p in wide.named_parameters()}
    assert relative_error(got, exact) < 1.1 * relative_error(usual, exact)


def test_plain_compilation_afterwards_is_as_it_was():
    model, x = blocks()
    gradients(model, x, FusionConfig())
    torch._dynamo.reset()
    compiled = torch.compile(model)
    _, codes = run_and_get_code(lambda: compiled(x).square().mean().backward())
    assert partial_sums.OPERATOR not in "".join(codes)


def test_column_sums():
    torch.manual_seed(0)
    for shape in ((788, 1024), (1024, 768), (513, 2047), (1, 7), (4096, 64)):
        x = torch.randn(shape, device="cuda")
        limit = tolerance(torch.float32, shape[0])
        assert difference({"": column_sums(x)}, {"": x.double().sum(0)}) < limit


def test_dropout_bits_and_max_pool_equal_their_references():
    from magi_train.fusion.kernels import dropout_bits, max_pool_backward

    seeds = torch.tensor([3, -(2**62)], device="cuda")
    for shape in ([8, 512, 96], [1000, 33]):
        got = dropout_bits.dropout_bits(seeds, 1, shape, 0.1)
        want = dropout_bits.dropout_bits_reference(seeds.cpu(), 1, shape, 0.1)
        assert torch.equal(got.cpu(), want)
    torch.manual_seed(0)
    for window in (((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 3), (1, 0))):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 72, 45, 62, device="cuda", dtype=dtype)
            y, offsets = torch.ops.prims._low_memory_max_pool_with_offsets(
                x, *window, (1, 1), False
            )
            dy = torch.randn_like(y)
            got = max_pool_backward.max_pool_backward(dy, offsets, x.shape[2:], *window)
            want = max_pool_backward.max_pool_backward_reference(
                dy.double(), offsets, x.shape[2:], *window
            )
            assert difference({"": got}, {"": want}) < tolerance(dtype, 9, 1)


class Convolutional(nn.Module):
    """The stem of a ResNet and a head with a dropout."""

    def __init__(self, p):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1), nn.Conv2d(64, 256, 3, bias=False), nn.BatchNorm2d(256),
            nn.ReLU(), nn.Conv2d(256, 256, 3, bias=False),
        )  # fmt: skip
        self.head, self.p = nn.Linear(256, 64), p

    def forward(self, x):
        return F.dropout(self.head(self.stem(x).flatten(2).transpose(1, 2)), self.p)


OFF = FusionConfig(packed_dropout=False, max_pool=False, relu_masks=False)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_convolutions_and_dropout_train_as_without(p):
    torch.manual_seed(0)
    model, x = Convolutional(p).to("cuda"), torch.randn(16, 3, 64, 64, device="cuda")
    errors = {}
    wide = copy.deepcopy(model).double()
    wide(x.double()).square().sum().backward()
    want = {n: q.grad for n, q in wide.named_parameters()}
    for name, fusion in (("on", FusionConfig()), ("off", OFF)):
        torch._dynamo.reset()
        trained = copy.deepcopy(model)
        prepared = magi_train.prepare(trained, config=Config(fusion=fusion, progress=False))
        with torch.autocast("cuda", torch.bfloat16):
            out = prepared(x)
        out.float().square().sum().backward()
        errors[name] = relative_error({n: q.grad for n, q in trained.named_parameters()}, want)
        plans = {row.name: row.plan for row in magi_train.report(prepared).rows}
        assert abs((out == 0).double().mean() - p) < 0.01
        if name == "off":
            assert not {"pack_dropout", "max_pool_backward", "relu_masks"} & set(plans)
        else:
            assert plans["max_pool_backward"]["taken"], plans["max_pool_backward"]
            assert len(plans["relu_masks"]["from_input"]) == 2, plans["relu_masks"]
            assert bool(plans.get("pack_dropout", {}).get("packed")) is (p > 0)
    if not p:
        assert errors["on"] < 1.1 * errors["off"]
