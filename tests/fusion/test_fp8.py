"""FP8 linears: the numbers of the quantisation, what is quantised, and what is refused and why."""

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config
from magi_train.core import hardware
from magi_train.fusion import fp8_match

M, K, N = 32, 64, 48
FREE = fp8_match.Machine(1.0, 2.0, 1e12, 0.0)
"""A machine on which every linear gains."""


@pytest.fixture
def fp8(monkeypatch):
    """Let linears of any size run in fp8 here; the CPU has the product, only no gain from it."""
    monkeypatch.setattr(hardware, "no_fp8_because", lambda _: "")
    monkeypatch.setattr(fp8_match, "MACHINE", FREE)


def run(model, batch, precision="fp8", dtype=torch.bfloat16, manage=True, **config):
    """Return the loss, every gradient, and the plans of the passes by name."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    config = Config(**{"lowering": "aot_eager", **config}, precision=precision)
    prepared = magi_train.prepare(model, config=config)
    if manage:
        prepared._magi_runtime.shadows.manage(model.parameters())
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = prepared(**batch)
    loss = getattr(out, "loss", out)
    loss.backward()
    got = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    plans = {r.name: r.plan for r in magi_train.report(prepared).rows}
    return loss.detach(), got, plans


class Quantised(torch.autograd.Function):
    """A linear as fp8 computes it, in float64, but for roundings to bf16."""

    @staticmethod
    def round(x, dtype):
        scale = x.abs().max().clamp(min=2.0**-100) / torch.finfo(dtype).max
        return (x / scale).float().to(dtype).double() * scale

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = (Quantised.round(t, torch.float8_e4m3fn) for t in (x, weight))
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = Quantised.round(dy, torch.float8_e5m2)
        return dy @ weight, dy.flatten(0, -2).t() @ x.flatten(0, -2)


def emulated(model, batch, names):
    """Return loss and gradients in float64 with the named linears quantised."""
    model = model.double()
    model.zero_grad(set_to_none=True)

    def forward(self, x):
        weight = self.weight if isinstance(self, nn.Linear) else self.weight.t()
        y = Quantised.apply(x, weight)
        return y if self.bias is None else y + self.bias

    for name, module in model.named_modules():
        if name.split(".")[-1] in names:
            module.forward = forward.__get__(module)
    out = model(**{n: v.double() if v.is_floating_point() else v for n, v in batch.items()})
    loss = getattr(out, "loss", out)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (200, 72), (16, 300)])
def test_the_cast_kernel_rounds_and_turns_as_its_reference(dtype, source, shape):
    kernels = pytest.importorskip("magi_train.fusion.kernels.fp8_cast")
    if not kernels.interpreted():
        pytest.skip("kernels are made for the device: tests/gpu/test_fp8.py")
    x = (torch.randn(shape) * torch.rand(shape).log()).to(source)
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, 1e-30, -1e-4, 1e-2], dtype=source)
    whole = x.abs().max().float() / torch.finfo(dtype).max
    for given in (x, x.t()):
        for scale in (whole, whole / 3):  # the second one clamps
            want = kernels.fp8_cast_reference(given, scale, dtype)
            got = kernels.fp8_cast(given, scale, dtype, (64, 32, 4))
            for g, w in zip(got, want, strict=True):
                assert g.is_contiguous()
                assert torch.equal(g.float(), w.float())
