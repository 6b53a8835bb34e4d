"""FP8 linears on a device that has them: the cast kernel's bits, and a training. Needs CUDA."""

import copy

import pytest
import torch

import magi_train
from magi_train import Config
from magi_train.core import hardware
from magi_train.fusion import fp8_match
from tests.close import relative_error
from tests.models import MODELS, llama

REFUSAL = hardware.no_fp8_because("cuda") if torch.cuda.is_available() else "needs a CUDA device"
pytestmark = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(128, 128), (200, 72), (16, 3000), (4096, 2048)])
def test_the_cast_kernel_has_the_bits_of_its_reference(dtype, shape):
    from magi_train.fusion.kernels.fp8_cast import fp8_cast, fp8_cast_reference

    x = torch.randn(shape, device="cuda") * torch.rand(shape, device="cuda").clamp(1e-6).log()
    x = x.bfloat16()
    whole = x.abs().max().float() / torch.finfo(dtype).max
    for given in (x, x.t()):
        for scale in (whole, whole / 3):  # the second one clamps
            want = fp8_cast_reference(given, scale, dtype)
            got = fp8_cast(given, scale, dtype)
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g.view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_the_product(dtype, bad):
    from magi_train.fusion.kernels.fp8_cast import fp8_cast

    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    x[3, 5] = bad
    scale = x.abs().amax().float() / torch.finfo(dtype).max
    rows, _ = fp8_cast(x, scale, dtype)
    other = torch.ones(64, 128, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    y = torch._scaled_mm(rows, other.t(), scale_a=scale, scale_b=one, out_dtype=torch.bfloat16)
    assert not y.isfinite().any()


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_a_llama_trains_in_fp8(tier, monkeypatch):
    monkeypatch.setattr(fp8_match, "MACHINE", fp8_match.Machine(1.0, 2.0, 1e12, 0.0))
    torch.manual_seed(0)
    model = llama(hidden_size=256, intermediate_size=512).cuda()
    gradients, curves = [], []
    for precision in ("autocast", "fp8"):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True)
        config = Config(precision=precision, tier=tier)
        prepared, optimizer = magi_train.prepare(twin, optimizer, config=config)
        losses = []
        for step in range(20):
            batch = {k: v.cuda() for k, v in MODELS["llama"][1](step % 2).items()}
            with torch.autocast("cuda", torch.bfloat16):
                loss = prepared(**batch).loss
            loss.backward()
            if step == 0:
                gradients.append({n: p.grad.clone() for n, p in twin.named_parameters()})
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        curves.append(losses)
    rows = {row.name: row.plan for row in magi_train.report(prepared).rows}
    assert rows["fp8_linears"]["products"] >= 12
    off = relative_error(gradients[1], gradients[0])
    assert torch.finfo(torch.bfloat16).eps < off < torch.finfo(torch.float8_e5m2).eps / 2
    assert curves[1][-1] < 0.7 * curves[1][0], "it learns the two batches by heart"
    assert curves[1][-1] == pytest.approx(curves[0][-1], rel=0.1)
