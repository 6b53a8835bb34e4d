"""What user code does in and between steps trains as without us: the same loop, twice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train import Config
from magi_train.core import compat
from tests.close import difference, tolerance

LIMIT = tolerance(torch.float32, 64)
STEPS = 5


def no_code(tier="auto", **more):
    return Config(tier=tier, lowering="aot_eager", progress=False, **more)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(6, 8, generator=g), torch.randn(6, 4, generator=g)


def squares(model, x, y):
    return F.mse_loss(model(x), y)


def train(model, step, between=lambda _: None, steps=STEPS):
    """Take some steps; return the losses, the last step's gradients, and the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for i in range(steps):
        between(i)
        optimizer.zero_grad()
        loss = step(*batch(i))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return {**model.state_dict(), **gradients, "losses": torch.stack(losses)}


def beside_plain(make, config, loss=squares, between=lambda model, step: None, whole=False):
    """Train `make()` without and with us; return the largest difference, and the report."""
    torch.manual_seed(0)
    plain = make()
    twin = copy.deepcopy(plain)
    want = train(plain, lambda *b: loss(plain, *b), lambda i: between(plain, i))
    prepared = magi_train.prepare(twin, config=config)

    def step(*b):
        return loss(prepared, *b)

    ours = magi_train.prepare_step(step, prepared) if whole else step
    got = train(twin, ours, lambda i: between(twin, i))
    return difference(got, want), magi_train.report(prepared)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _counts():
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_a_hook_that_comes_and_goes(tier):
    handles = []

    def between(model, step):
        if step == 2:
            handles.append(model[0].register_forward_hook(lambda m, args, out: 3 * out))
        if step == 4:
            handles.pop().remove()

    error, _ = beside_plain(mlp, no_code(tier), between=between)
    assert error < LIMIT
    assert graphs() == 2  # without and with the hook


class Counts(nn.Module):
    """Keeps a number of Python's that changes in each step."""

    def __init__(self):
        super().__init__()
        self.body, self.step = mlp(), 0

    def forward(self, x):
        self.step += 1
        return self.body(x) / self.step


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_a_counter_does_not_compile_again_each_step(tier):
    error, report = beside_plain(Counts, no_code(tier))
    assert error < LIMIT
    assert graphs() == 2  # as a constant, then as a variable
    assert not any("uncompiled" in note for note in report.notes)


def test_settings_of_dynamo_hold_for_our_calls_only():
    before = {n: getattr(compat.dynamo_config, n) for n in compat.WHILE_COMPILING}
    seen = []

    def look(gm, inputs):
        seen.append({n: getattr(compat.dynamo_config, n) for n in before})
        return gm.forward

    torch.compile(lambda x: x + 1, backend=look)(torch.ones(2))
    compat.call_captured(torch.compile(lambda x: x + 2, backend=look), [torch.ones(2)], {})
    assert seen == [before, compat.WHILE_COMPILING]
    assert before == {n: getattr(compat.dynamo_config, n) for n in before}


def penalized(model, x, y):
    """A loss with the gradient of a gradient."""
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, y) + slope.square().sum()


@pytest.mark.parametrize("tier", ["auto", "region", "eager"])
def test_a_gradient_penalty_in_the_step(tier):
    error, _ = beside_plain(mlp, no_code(tier), penalized, whole=True)
    assert error < LIMIT


def test_a_backward_in_the_step_is_left_to_autograd():
    """In a graph it would write `.grad` and call no hook of a parameter."""
    torch.manual_seed(0)
    model = mlp()
    seen = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    prepared = magi_train.prepare(model, config=no_code())

    def step(x, y):
        loss = squares(prepared, x, y)
        loss.backward()
        return loss.detach()

    magi_train.prepare_step(step, prepared)(*batch(0))
    assert len(seen) == 1
    assert magi_train.report(prepared).tier == "region"


class Experts(nn.Module):
    """Sends rows to experts, and asks whether there are any."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)[0]
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        return out


def test_a_size_that_depends_on_data_is_no_crash():
    error, report = beside_plain(Experts, no_code())
    assert error < LIMIT
    assert report.tier == "region"
    assert "if rows.numel()" in report.reason
