"""`1 + erf(z)` to 16 bits: how close it is, where it is used, where it is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import magi_train
from magi_train import Config, FusionConfig
from magi_train.capture import narrows_erf
from magi_train.core.errors import PassError
from magi_train.fusion.narrow_erf import one_plus_erf
from tests.close import difference, relative_error
from tests.generated import code_of
from tests.models import MODELS, loss_of

FACTOR = 2**-0.5
ON = Config(fusion=FusionConfig(narrow_erf=True, weight_shadows=False), progress=False)
OFF = Config(fusion=FusionConfig(narrow_erf=False, weight_shadows=False), progress=False)


class Gelu(nn.Module):
    """GELU of what a linear makes; a loss."""

    def __init__(self, between=lambda x: F.gelu(x)):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(24, 40), nn.Linear(40, 8), between

    def forward(self, x):
        return self.second(self.between(self.first(x))).float().square().mean()


def plan_of(model):
    rows = [r for r in magi_train.report(model).rows if r.name == "narrow_erf"]
    return rows[-1].plan if rows else None


def in_float64(model, batch):
    """Return what `train` does, eager and in float64; the model is float64 then."""
    loss = loss_of(model.double()(**{n: t.double() if t.is_floating_point() else t
                                     for n, t in batch.items()}))  # fmt: skip
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def train(model, batch, config, *, dtype=torch.bfloat16, autocast=True):
    """Return the loss, the gradients of one step and the pass's plan."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    prepared = magi_train.prepare(model, config=config)
    step = magi_train.prepare_step(lambda **b: loss_of(prepared(**b)), prepared)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = step(**batch)
    loss.backward()
    loss = loss.detach()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **found}, plan_of(prepared)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_series_has_the_relative_error_that_it_is_said_to_have(dtype):
    x = torch.linspace(-8 / FACTOR, 30, 380_001, dtype=dtype)
    want = torch.special.erfc(-x.double() * FACTOR)
    got = one_plus_erf(x, FACTOR).double()
    limit = {torch.float64: 4e-6, torch.float32: 8e-6}[dtype]
    assert ((got - want) / want).abs().max() < limit
    assert limit < torch.finfo(torch.float16).eps / 2 / 50


def test_the_ends_and_what_is_not_finite():
    x = torch.tensor([-torch.inf, -1e30, -0.0, 0.0, 1e30, torch.inf, torch.nan])
    got = one_plus_erf(x, FACTOR)
    assert got.isnan().tolist() == [False] * 6 + [True]
    assert got[[0, 1, 4, 5]].tolist() == [0.0, 0.0, 2.0, 2.0]
    assert (got[2:4] - 1).abs().max() < 8e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_rounds_as_the_exact_one_or_one_step_beside(dtype):
    """Every number of the dtype between -4 and 4, where the exact one has digits to lose."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.abs() < 4)]
    want = F.gelu(x.double())
    got = (x.float() * 0.5 * one_plus_erf(x.float(), FACTOR)).to(dtype).double()
    step = torch.finfo(dtype).eps * want.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((got - want).abs() <= step).all()
    assert (got == want.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize(
    ("kind", "tier"),
    [
        ("bert", "graph"),  # a series that is 5 % off shows here and not in its blocks alone
        ("vit", "region"),
        pytest.param("bert", "region", marks=pytest.mark.full),
        pytest.param("vit", "graph", marks=pytest.mark.full),
    ],
)
def test_models_train_as_with_the_exact_one(kind, tier):
    torch.manual_seed(0)
    make, batch = MODELS[kind]
    model = make().train()
    for module in model.modules():  # random masks are other ones in every run
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    got, plan = train(model, batch(0), replace(ON, tier=tier))
    want, none = train(model, batch(0), replace(OFF, tier=tier))
    assert plan["narrowed"]
    assert not plan["left_alone"]
    assert none is None
    exact = in_float64(model, batch(0))
    assert relative_error(got, exact) < 1.1 * relative_error(want, exact), "as far off as before"


def test_the_gradient_is_that_of_float64():
    torch.manual_seed(0)
    model, x = Gelu(), torch.randn(64, 24) * 3
    (got, plan), codes = run_and_get_code(lambda: train(model, {"x": x}, ON))
    code = "".join(codes)
    assert "exp2(" in code
    assert "exp(" not in code, "the derivative's exponential is the same expression"
    assert "erf(" not in code
    usual, _ = train(model, {"x": x}, OFF)
    exact = in_float64(model, {"x": x})
    assert len(plan["narrowed"]) == 2, "the forward's, and the one that the backward repeats"
    assert difference(got, exact) < 1.1 * difference(usual, exact)


@pytest.mark.parametrize(
    ("between", "autocast", "why"),
    [
        (lambda x: F.gelu(x.float()), True, None),
        (lambda x: F.gelu(x), False, "without a rounding to 16 bits"),
        (lambda x: F.gelu(x.double()).to(x.dtype), True, "float64"),
        (lambda x: torch.erf(x.float()).to(x.dtype), True, "not added to 1"),
        (lambda x: F.gelu(x.float()).sum(-1, keepdim=True).to(x.dtype) * x, True, "sum"),
    ],
)
@pytest.mark.usefixtures("idle_kernels")
def test_what_is_left_alone(between, autocast, why):
    torch.manual_seed(0)
    model, x = Gelu(between), torch.randn(16, 24)
    _, plan = train(model, {"x": x}, ON, autocast=autocast)
    if why is None:  # float32 between two products in bfloat16
        assert plan["narrowed"]
    else:
        assert len(plan["narrowed"]) == (why == "sum"), "what the derivative reads ends in 16 bits"
        assert any(why in reason for _, reason in plan["left_alone"])


def half_cdf(x):
    return 0.5 * (1 + torch.erf(x.float() * FACTOR))


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda x: (2 * half_cdf(x * 1e-3) - 1).to(x.dtype) * 1000, "digits"),
        (lambda x: ((half_cdf(x + 1e-2) - half_cdf(x)) * 100).to(x.dtype), "digits"),
        (lambda x: torch.log(2 * half_cdf(x * 1e-3)).to(x.dtype) * 1000, "digits"),
        (lambda x: torch.where(half_cdf(F.relu(x)) > 0.5, x, 0.0).to(x.dtype), "digits"),
        (lambda x: (2 * half_cdf(F.relu(x))).to(torch.int32).to(x.dtype) * x, "digits"),
        (lambda x: torch.where(half_cdf(F.relu(x)).bool(), x, 0.0), "digits"),
        (lambda x: (1 + torch.erf((x * 4).to(torch.int8))).to(x.dtype) * x, "int8"),
        (lambda x: (1 + torch.erf(x > 0)).to(x.dtype) * x, "bool"),
    ],
)
@pytest.mark.usefixtures("idle_kernels")
def test_what_would_lose_digits_is_left_alone(between, why):
    """At 0 it is 4e-6 off 1: nothing in 16 bits, all of what is left after 1 is taken off."""
    torch.manual_seed(0)
    model, x = Gelu(between), torch.randn(16, 24)
    (_, plan), got = code_of(lambda: train(model, {"x": x}, ON))
    _, want = code_of(lambda: train(model, {"x": x}, OFF))
    assert not plan["narrowed"]
    assert any(why in reason for _, reason in plan["left_alone"])
    assert got == want


@pytest.mark.parametrize(
    "between",
    [
        lambda x: (x.float() * half_cdf(x)).to(x.dtype),
        lambda x: F.dropout(F.gelu(x.float()), 0.5).to(x.dtype),
        lambda x: torch.where(x > 0, F.gelu(x.float()), -x.float()).to(x.dtype),
    ],
)
@pytest.mark.usefixtures("idle_kernels")
def test_products_and_choices_keep_digits(between):
    torch.manual_seed(0)
    model, x = Gelu(between), torch.randn(16, 24)
    _, plan = train(model, {"x": x}, ON)
    assert plan["narrowed"]
    assert not plan["left_alone"]


class Checkpointed(nn.Module):
    """A GELU that is computed again in the backward, here by hand or, in several, by a budget."""

    def __init__(self, depth=1, wide=40):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, wide), nn.GELU(), nn.Linear(wide, 24)) for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            alone = len(self.blocks) == 1
            x = x + (checkpoint(block, x, use_reentrant=False) if alone else block(x))
        return x.float().square().mean()


def test_a_gelu_that_is_computed_again_is_not_stored_in_float32():
    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(64, 24)
    with torch._inductor.config.patch(realize_opcount_threshold=30):  # as it is on GPUs
        (_, plan), codes = run_and_get_code(lambda: train(model, {"x": x}, ON))
    assert plan["narrowed"]
    assert "empty_strided_cpu((64, 40), (40, 1), torch.bfloat16)" in "".join(codes)
    assert "empty_strided_cpu((64, 40), (40, 1), torch.float32)" not in "".join(codes)


def test_a_memory_budget_is_as_small_as_with_the_exact_one():
    torch.manual_seed(0)
    model, x = Checkpointed(depth=4, wide=96), torch.randn(4096, 24)
    least = []
    for config in (ON, OFF):
        with pytest.raises(PassError, match="a step takes at least") as error:
            train(model, {"x": x}, replace(config, memory_budget_gib=1e-3))
        least.append(str(error.value).partition("at least ")[2].partition(" GiB")[0])
    assert least[0] == least[1]


@pytest.mark.parametrize(
    ("wanted", "device", "budgeted", "lowering", "on"),
    [
        (None, "cuda", False, "inductor", True),
        (None, "cuda", True, "inductor", False),  # its plans would take operations for traffic
        (None, "cpu", False, "inductor", False),
        (None, "cuda", False, "aot_eager", False),  # each operation would be a kernel
        (True, "cpu", True, "inductor", True),
        (True, "cuda", False, "aot_eager", False),
        (False, "cuda", False, "inductor", False),
    ],
)
def test_where_it_is_used(wanted, device, budgeted, lowering, on):
    config = Config(fusion=FusionConfig(narrow_erf=wanted), lowering=lowering)
    assert narrows_erf(config, device, budgeted=budgeted) == on
    assert not narrows_erf(replace(config, fusion=None), device, budgeted=budgeted)
