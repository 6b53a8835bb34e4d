"""Gradients without their last cast: the same values, sums in float32, a plain model afterwards."""

import pytest
import torch

import magi_train
from magi_train import Config, FusionConfig

pytest.importorskip("triton")
from magi_train.fusion import fused_step
from magi_train.fusion.kernels import multi_tensor
from tests.close import difference, tolerance
from tests.models import BATCH, MODELS, SEQUENCE, loss_of

if not multi_tensor.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1; tests/gpu runs the kernels", allow_module_level=True)

LIMIT = tolerance(torch.float32, BATCH * SEQUENCE, 1)
"""Generated code may sum a bias in another order when its neighbours change."""


def apart(a, b):
    return difference({"": a}, {"": b})


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(fused_step, "DEVICES", ("cpu",))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def prepared_model(kind, *, narrow, optimizer=sgd, **config):
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, batch = MODELS[kind]
    model = make().train()
    fusion = FusionConfig(narrow_gradients=narrow, weight_shadows=False)
    settings = {"lowering": "aot_eager", "fusion": fusion, **config}
    prepared, optimizer = magi_train.prepare(
        model, optimizer(model.parameters()), config=Config(**settings)
    )
    return prepared, optimizer, batch


def train(kind, *, narrow, together=False, micro_batches=2, **config):
    """Return gradients of the first backward, of the first step, and the weights after two."""
    prepared, optimizer, batch = prepared_model(kind, narrow=narrow, **config)
    seen = []
    for step in range(2):
        losses = []
        for micro in range(micro_batches):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(loss_of(prepared(**batch(10 * step + micro))))
            if not together:
                losses.pop().backward()
            if step == 0 and micro == 0 and not together:
                seen.append([p.grad.clone() for p in prepared.parameters()])
        for loss in losses:
            loss.backward()
        if step == 0:
            seen.append([p.grad.clone() for p in prepared.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, [p.detach().clone() for p in prepared.parameters()]], prepared


def row(prepared):
    rows = magi_train.report(prepared).rows
    return next((r.plan for r in rows if r.name == "skip_gradient_casts" and r.plan), None)


@pytest.mark.parametrize(
    ("kind", "lowering"),
    [
        ("llama", "aot_eager"),
        pytest.param("gpt2", "aot_eager", marks=pytest.mark.full),
        pytest.param("bert", "inductor", marks=pytest.mark.full),
        pytest.param("resnet", "aot_eager", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.full)])
def test_values_sums_and_training_are_the_same(kind, lowering, together):
    wide, _ = train(kind, narrow=False, together=together, lowering=lowering)
    narrow, prepared = train(kind, narrow=True, together=together, lowering=lowering)
    plan = row(prepared)
    assert plan["gradients"] >= 8
    if not together:
        dtypes = [g.dtype for g in narrow[0]]
        assert dtypes.count(torch.bfloat16) == plan["gradients"]
    for mine, theirs in zip(narrow, wide, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.float(), b) or (lowering == "inductor" and apart(a, b) <= LIMIT)


@pytest.mark.full
def test_one_micro_batch_reaches_the_kernel_narrow():
    wide, _ = train("llama", narrow=False, micro_batches=1)
    narrow, _ = train("llama", narrow=True, micro_batches=1)
    assert any(g.dtype is torch.bfloat16 for g in narrow[1])
    for mine, theirs in zip(narrow[2], wide[2], strict=True):
        assert torch.equal(mine, theirs)


def test_the_model_is_plain_after_it_is_prepared_without():
    prepared, _, batch = prepared_model("llama", narrow=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(prepared(**batch(0))).backward()
    module = prepared._magi_module
    again = magi_train.prepare(module, config=Config(tier="eager", fusion=None))
    for p in module.parameters():
        assert p.grad.dtype is torch.float32
        assert p.grad_dtype is torch.float32
    assert row(again) is None


def test_they_are_narrow_again_where_a_model_goes_on_after_its_end():
    prepared, _, _ = prepared_model("llama", narrow=True)
    p, runtime = next(prepared.parameters()), prepared._magi_runtime
    for _ in range(2):
        assert runtime.narrow_gradients.takes(p)
        runtime.close()
        assert not runtime.narrow_gradients.takes(p)
        assert p.grad_dtype is torch.float32
        runtime.reopen()
    assert p.grad_dtype is None


@pytest.mark.full
@pytest.mark.parametrize("config", [{"tier": "region"}, {"tier": "eager"}])
def test_other_tiers_give_float32(config):
    prepared, _, batch = prepared_model("llama", narrow=True, **config)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(prepared(**batch(0))).backward()
    assert {p.grad.dtype for p in prepared.parameters()} == {torch.float32}


def test_what_torch_steps_gets_float32():
    """A parameter group of which the kernel cannot take a gradient goes to torch's optimizer."""
    kind = torch.optim.AdamW
    prepared, optimizer, batch = prepared_model("llama", narrow=True, optimizer=kind)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(prepared(**batch(0))).backward()
    p = next(p for p in prepared.parameters() if p.grad.dtype is torch.bfloat16)
    p.grad = p.grad.t().contiguous().t()
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p, before)
    assert any("other strides" in note for note in magi_train.report(prepared).notes)
