"""What runs a captured graph: operations whose results lie otherwise in memory than traced."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import magi_train
from magi_train import Config, lower
from tests.close import difference, tolerance


class SoftplusThenTranspose(nn.Module):
    """The strides of softplus' gradient differ between fake and real tensors, up to torch 2.13."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = nn.functional.softplus(self.linear(x)).transpose(1, 2).contiguous()
        return (y * torch.arange(64.0).view(2, 8, 4)).sum()


GENERATED = pytest.param("inductor", marks=pytest.mark.full)


@pytest.mark.parametrize("lowering", ["aot_eager", GENERATED])
@pytest.mark.parametrize("tier", ["graph", "region"])
def test_views_of_what_lies_otherwise_than_traced(lowering, tier):
    torch.manual_seed(0)
    want, x = SoftplusThenTranspose(), torch.randn(2, 4, 8)
    got = copy.deepcopy(want)
    want(x).backward()
    model = magi_train.prepare(got, config=Config(tier=tier, lowering=lowering))
    magi_train.prepare_step(model, model)(x).backward()
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (got, want)]
    assert difference(*gradients) <= tolerance(torch.float32, 64)


class Checkpointed(nn.Module):
    """Two outputs of a checkpointed function, whose code is no part of the graph around it."""

    def __init__(self, both):
        super().__init__()
        self.first, self.second, self.both = nn.Linear(4, 4), nn.Linear(4, 4), both

    def body(self, x):
        a, b = self.first(x), self.second(x)
        return (a + b if self.both else a.sin()), b * 3

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_notes_of_cached_code_are_those_of_the_same_checkpointed_function(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = torch._dynamo.utils.counters["aot_autograd"]
    before = hits["autograd_cache_hit"]
    for both in (True, False, True):
        torch._dynamo.reset()
        model = Checkpointed(both)
        magi_train.prepare(model, config=Config(progress=False))(torch.ones(2, 4))[
            0
        ].sum().backward()
        assert (model.second.weight.grad is not None) == both
    assert hits["autograd_cache_hit"] == before + 1


class TwoHeads(nn.Module):
    """Two outputs, each of weights of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.first(x).sin(), self.second(x).cos()


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_notes_of_cached_code_for_dynamic_sizes_hold_for_other_sizes(monkeypatch, tmp_path, tier):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = torch._dynamo.utils.counters["aot_autograd"]
    before = hits["autograd_cache_hit"]
    for rows in (5, 7):
        torch._dynamo.reset()
        model = TwoHeads()
        prepared = magi_train.prepare(model, config=Config(progress=False, tier=tier))
        for size in (8, rows):
            prepared(torch.ones(size, 4))[0].sum().backward()
        assert model.second.weight.grad is None
        report = magi_train.report(prepared)
        assert not report.notes
        assert len([row for row in report.rows if row.name == "unused_outputs"]) == 2
    assert hits["autograd_cache_hit"] == before + 2


class OnlyViews(nn.Module):
    """Between its graph breaks is nothing but a view of what is given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        torch._dynamo.graph_break()
        y = y.view(-1, 2)
        torch._dynamo.graph_break()
        return y.sin()


def test_a_graph_of_views_lacks_no_notes(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = magi_train.prepare(OnlyViews(), config=Config(progress=False, tier="region"))
    model(torch.randn(3, 4)).sum().backward()
    assert not magi_train.report(model).notes


def test_notes_that_are_lost_are_missed(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for lost in (False, True):
        torch._dynamo.reset()
        model = magi_train.prepare(nn.Linear(4, 4), config=Config(progress=False))
        model(torch.ones(2, 4)).sum().backward()
        assert any("without the notes" in note for note in magi_train.report(model).notes) is lost
        for file in (tmp_path / "magi_train").glob("*.json"):
            file.unlink()


class NormThenProducts(nn.Module):
    """The gradient behind the norm is float32, and cast for the product in front of it."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        return self.second(self.norm(x + self.first(x))).float().square().sum()


def test_casts_that_products_read_are_written_in_the_shape_of_what_is_cast():
    """Then the kernel of the norm's backward can write them; rows of products differ."""
    torch._dynamo.reset()
    model = magi_train.prepare(NormThenProducts(), config=Config(progress=False))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(5, 7, 24)).backward()

    _, codes = run_and_get_code(step)
    cast = "reinterpret_tensor(buf0, (35, 24), (24, 1), 0)"
    assert f"extern_kernels.mm({cast}, " in codes[-1], "a view of what has three dimensions"


@pytest.mark.parametrize(
    ("norm", "two"),
    [
        (nn.BatchNorm2d(8), True),
        (nn.GroupNorm(2, 8), True),
        (nn.InstanceNorm2d(8), True),
        (nn.LayerNorm([8, 4, 4]), False),
        (nn.RMSNorm([8, 4, 4]), False),
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_norms_that_read_all_twice_are_known(norm, two, checkpointed):
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm

    def run(x):
        return checkpoint(norm, x, use_reentrant=False) if checkpointed else norm(x)

    torch.compile(run, backend=backend)(torch.randn(2, 8, 4, 4))
    assert any(lower._has_norm_of_two_kernels(gm) for gm in graphs) is two


class Upsampled(nn.Module):
    """Its backward scatters into four buffers, whose sum a convolution reads in another layout."""

    def __init__(self):
        super().__init__()
        self.linear, self.classes = nn.Linear(16, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x, labels):
        picture = self.linear(x).transpose(1, 2).reshape(4, 16, 8, 8)
        logits = nn.functional.interpolate(self.classes(picture), size=(32, 32), mode="bilinear")
        return nn.functional.cross_entropy(logits, labels)


def test_what_generated_code_scatters_is_kept():
    torch.manual_seed(0)
    want, x, labels = Upsampled(), torch.randn(4, 64, 16), torch.randint(0, 2, (4, 32, 32))
    got = copy.deepcopy(want)
    model = magi_train.prepare(got, config=Config(tier="graph"))
    for each in (want, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(x, labels)
        loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (got, want)]
    assert difference(*gradients) < tolerance(torch.bfloat16, 64)
