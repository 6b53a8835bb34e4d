"""Merged projections: which are merged, which are not and why, and the numbers of all of them."""

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config, FusionConfig
from tests.close import difference, relative_error, tolerance
from tests.models import MODELS, gpt2, llama, tokens

WIDTH, TOKENS = 128, 8


class Three(nn.Module):
    """Three linears of one input, by default neighbours; a loss that no two treat alike."""

    def __init__(self, rows=(WIDTH, WIDTH, WIDTH), bias=False, between=False):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q = nn.Linear(WIDTH, rows[0], bias=bias)
        if between:
            self.between = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, rows[1], bias=bias)
        self.v = nn.Linear(WIDTH, rows[2], bias=bias)

    def inputs(self, x):
        return x, x, x

    def results(self, x):
        one, two, three = self.inputs(self.before(x))
        return self.q(one), self.k(two), self.v(three)

    def forward(self, x):
        q, k, v = self.results(x)
        out = q.sin().sum() + (k * k).sum() + v.tanh().sum()
        return out + self.between(x).cos().sum() if hasattr(self, "between") else out


class Residual(Three):
    def forward(self, x):
        h = self.before(x)
        q, k, v = (f(h) for f in (self.q, self.k, self.v))
        return (h + q.sin() + k.cos() * v.tanh()).sum()


class OtherInput(Three):
    def inputs(self, x):
        return x, x.relu(), x.sin()


class Returned(Three):
    def forward(self, x):
        q, k, v = self.results(x)
        return (q * k * v).sum(), q


class Flattened(Three):
    def forward(self, x):
        q, k, v = self.results(x)
        return (q.flatten().sin() * (k * v).flatten()).sum()


def run(model, batch, lowering="aot_eager", tier="graph", merge=True):
    """Return the loss, every gradient, and the row of the pass."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    config = Config(tier=tier, lowering=lowering, fusion=FusionConfig(projections=merge))
    prepared = magi_train.prepare(model, config=config)
    prepared._magi_runtime.shadows.manage(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = prepared(**batch)
    loss = getattr(out, "loss", out)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    got = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    rows = [r.plan for r in magi_train.report(prepared).rows if r.name == "merge_projections"]
    return loss.detach(), got, rows[0] if rows else {}


def double(model, batch):
    """Return loss and gradients in float64, without anything of ours."""
    model = model.double()
    model.zero_grad(set_to_none=True)
    given = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    out = model(**given)
    loss = getattr(out, "loss", out)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def small(seed=0):
    return {"x": torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))}


def assert_right(model, batch, **how):
    """Compare with float64, and with what autocast does without the pass; return the plan."""
    _, plain, nothing = run(model, batch, **{**how, "merge": False})
    assert nothing == {}
    loss, got, plan = run(model, batch, **how)
    limit = tolerance(torch.bfloat16, WIDTH)
    want_loss, want = double(model, batch)
    assert float(loss) == pytest.approx(float(want_loss), rel=limit, abs=limit)
    assert difference(got, want) < limit
    assert relative_error(got, want) < 1.05 * relative_error(plain, want), "worse than autocast"
    return plan


def merged(plan):
    return [(len(m["products"]), m["input_gradient"], m["weight_gradient"]) for m in plan["merged"]]


def wide_llama(layers):
    return llama(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, vocab_size=96,
            intermediate_size=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lowering", "tier"),
    [
        ("aot_eager", "graph"),
        ("aot_eager", "region"),
        pytest.param("inductor", "graph", marks=pytest.mark.full),
    ],
)
def test_llama_merges_both_groups_forward_and_backward(lowering, tier):
    model = wide_llama(layers=2 if tier == "region" else 1)
    plan = assert_right(model, MODELS["llama"][1](0), lowering=lowering, tier=tier)
    assert merged(plan) == [(3, True, True), (2, True, True)]  # REGION: one graph for both blocks


@pytest.mark.parametrize(
    "lowering", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]
)
def test_bert_merges_the_forward_with_its_biases(lowering):
    plan = assert_right(bert(), MODELS["bert"][1](0), lowering=lowering)
    assert merged(plan) == [(3, False, False)]
    assert "cat(dy)" in plan["merged"][0]["because"]


def test_gpt2_has_nothing_to_merge():
    _, _, plan = run(gpt2(), {"input_ids": tokens(0), "labels": tokens(0)})
    assert plan == {}


@pytest.mark.parametrize(
    ("kind", "lowering", "rows"),
    [
        (Three, "aot_eager", (WIDTH, 64, 64)),
        pytest.param(Three, "inductor", (8, 256, 16), marks=pytest.mark.full),
        (Residual, "aot_eager", (WIDTH, WIDTH, WIDTH)),
        pytest.param(Residual, "inductor", (WIDTH, WIDTH, WIDTH), marks=pytest.mark.full),
    ],
)
def test_widths_and_a_residual(kind, lowering, rows):
    plan = assert_right(kind(rows=rows), small(), lowering=lowering)
    assert merged(plan) == [(3, True, True)]
    assert plan["merged"][0]["because"] == ""


def test_biases_are_neighbours_too():
    plan = assert_right(Three(bias=True), small())
    assert merged(plan) == [(3, True, True)]
    apart = assert_right(Three(rows=(64, WIDTH, WIDTH), bias=True), small())
    assert merged(apart) == [(2, True, True)]
    assert apart["left_alone"][0][1] == "the biases are not adjacent"


def test_without_shadows_nothing_is_adjacent():
    torch.manual_seed(0)
    config = Config(lowering="aot_eager", fusion=FusionConfig(projections=True))
    prepared = magi_train.prepare(Three(), config=config)
    with torch.autocast("cpu", torch.bfloat16):
        prepared(**small()).backward()
    assert all(r.name != "merge_projections" for r in magi_train.report(prepared).rows)


def test_weights_with_another_one_between_stay_apart():
    plan = assert_right(Three(between=True), small())
    assert merged(plan) == [(2, True, True)]
    assert plan["left_alone"][0][1] == "the weights are not adjacent"


def test_other_inputs_stay_apart():
    assert assert_right(OtherInput(), small()) == {}


def test_a_weight_used_twice_stays_apart():
    model = Three()
    model.k.weight = model.q.weight
    plan = assert_right(model, small())
    assert merged(plan) == [(2, False, False)]
    assert plan["left_alone"][0][1] == "the weights are not adjacent"


def test_a_frozen_weight_keeps_the_other_gradients_apart():
    model = Three()
    model.k.weight.requires_grad_(False)
    plan = assert_right(model, small())
    assert merged(plan) == [(3, True, False)]
    assert plan["merged"][0]["because"] == "a weight is frozen"


def test_an_output_is_no_column_of_another_tensor():
    plan = assert_right(Returned(), small())
    assert plan["merged"] == []
    assert "output" in plan["left_alone"][0][1]


def test_a_view_that_needs_a_dense_tensor_is_a_reason():
    plan = assert_right(Flattened(), small())
    assert plan["merged"] == []
    assert "needs another layout" in plan["left_alone"][0][1]


def test_gradients_of_parameters_do_not_share_memory():
    model = Three()
    run(model, small())
    places = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert all(p.grad.is_contiguous() for p in model.parameters())
