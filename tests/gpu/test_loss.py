"""The cross-entropy kernel on a device, and losses that it computes in a step. Needs CUDA."""

import copy

import pytest
import torch

import magi_train
from magi_train import Config
from tests.close import difference, relative_error, tolerance
from tests.models import MODELS, loss_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 61), (64, 50257), (64, 128256), (3, 8192), (50, 2)])
@pytest.mark.parametrize(
    "settings", [(0.0, 1.0, None), (0.1, 1.0, None), (0.0, -0.3, None), (0.2, 1 / 30, 30.0)]
)
def test_the_kernel_equals_float64(dtype, shape, settings, padded):
    from magi_train.fusion.kernels.cross_entropy import cross_entropy, cross_entropy_reference

    torch.manual_seed(0)
    logits = (torch.randn(shape, device="cuda") * 8).to(dtype)
    labels = torch.randint(0, shape[1], (2 * shape[0],), device="cuda")[::2]
    labels[0] = -100
    torch.full(
        shape, torch.nan, dtype=dtype, device="cuda"
    )  # what memory holds that is not written
    if padded:  # as generated code lays logits out
        logits = torch.nn.functional.pad(logits, (0, -shape[1] % 64))[:, : shape[1]]
    got = cross_entropy(logits, labels, -100, *settings)
    want = cross_entropy_reference(logits.double(), labels, -100, *settings)
    wide = tolerance(torch.float32, max(shape[1], 16))
    assert difference({"": got[0]}, {"": want[0]}) < wide
    assert difference({"": got[1]}, {"": want[1]}) < wide + tolerance(dtype, 1, 1)
    assert not got[1][0].any()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_step_with_the_kernel_equals_eager(name, chunked, monkeypatch):
    monkeypatch.setattr("magi_train.fusion.loss.KERNEL_LEAST_MIB", 0.0)
    model = MODELS[name][0]().cuda().train()
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    batch = {k: v.cuda() for k, v in MODELS[name][1](0).items()}
    fusion = magi_train.FusionConfig(loss_chunk_mib=0.01 if chunked else 8192.0)
    ours = magi_train.prepare(twin, config=Config(tier="graph", fusion=fusion))
    step = magi_train.prepare_step(lambda batch: loss_of(ours(**batch)), ours)
    loss_of(exact(**batch)).backward()
    for run in (step, lambda batch: loss_of(model(**batch))):
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(batch)
        (loss * 3).backward()
    (row,) = [r for r in magi_train.report(ours).rows if r.name == "chunk_linear_cross_entropy"]
    (planned,) = row.plan["chunked"]
    assert planned["kernel"]
    assert (planned["chunks"] > 1) == chunked
    want = {n: 3 * p.grad for n, p in exact.named_parameters() if p.grad is not None}
    got, eager = ({n: p.grad for n, p in m.named_parameters()} for m in (twin, model))
    # no worse than eager under autocast, up to the noise of one rounding of a gradient
    assert relative_error(got, want) <= 1.1 * relative_error(eager, want) + 2.0**-9
