"""Weight shadows kept by the optimizer's kernel on a real device. Needs CUDA."""

import copy
import gc

import pytest
import torch

import magi_train
from magi_train import Config, FusionConfig
from magi_train.core.errors import StaleShadowError
from tests.close import difference
from tests.models import MODELS, llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 96}


def train(model, steps, *, shadows, tier="auto", dtype=torch.bfloat16, between=None):
    """Return losses, weights and report of a few steps with a scheduler and accumulation."""
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    lowering = "inductor" if tier == "auto" else "aot_eager"
    fusion = FusionConfig(weight_shadows=shadows)
    config = Config(tier=tier, lowering=lowering, fusion=fusion)
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    losses = []
    for step in range(steps):
        for micro in range(2):
            batch = {k: v.cuda() for k, v in MODELS["llama"][1](2 * step + micro).items()}
            with torch.autocast("cuda", dtype):
                loss = prepared(**batch).loss
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if between is not None:
            between(model, step)
    torch.cuda.synchronize()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return torch.stack(losses).tolist(), weights, prepared


def test_nothing_stays_but_one_copy_of_the_weights():
    taken, models = {}, []
    for shadows in (False, False, True):  # the first warms up
        before = torch.cuda.memory_allocated()
        models.append(llama(**SIZES).cuda())
        models.append(train(models[-1], 3, shadows=shadows)[2])
        gc.collect()
        taken[shadows] = torch.cuda.memory_allocated() - before
    shadow_bytes = models[-1]._magi_runtime.shadows.num_bytes
    assert 0 < taken[True] - taken[False] < 1.5 * shadow_bytes


@pytest.mark.parametrize(
    ("tier", "dtype"),
    [("auto", torch.bfloat16), ("region", torch.bfloat16), ("graph", torch.float16)],
)
def test_the_same_training_with_and_without(tier, dtype):
    torch.manual_seed(0)
    model = llama(**SIZES).cuda()
    twin = copy.deepcopy(model)
    want, weights, _ = train(model, 12, shadows=False, tier=tier, dtype=dtype)
    got, shadowed, prepared = train(twin, 12, shadows=True, tier=tier, dtype=dtype)
    rows = {row.name: row.plan for row in magi_train.report(prepared).rows}
    assert rows["fused_optimizer"]["taken"] == len(weights)
    assert rows["use_weight_shadows"]["casts"] >= 7
    assert difference(shadowed, weights) <= 1e-3
    assert got == pytest.approx(want, rel=1e-3)
    shadows = prepared._magi_runtime.shadows
    kept = [(p, s) for p in prepared.parameters() if (s := shadows.of(p)) is not None]
    assert len(kept) >= 14
    assert all(torch.equal(s, p.detach().to(dtype)) for p, s in kept)


def test_a_write_through_data_is_caught():
    def behind_the_back(model, step):
        if step == 9:  # later than the steps in which everything is compared
            model.lm_head.weight.data.mul_(0.5)

    torch.manual_seed(0)
    model = llama(**SIZES).cuda()
    with pytest.raises(StaleShadowError, match=r"written through `\.data`"):
        train(model, 14, shadows=True, tier="graph", between=behind_the_back)
