"""The activation budget: kept, monotonic, without a change of gradients, an error if impossible."""

import copy

import pytest
import torch

import magi_train
from magi_train import Config, MagiError, MemoryConfig
from magi_train.core.errors import CaptureError
from tests.models import GraphBreak, llama, tokens


def run(model, budget, tier="graph"):
    """Return the report and the gradients of one backward."""
    torch._dynamo.reset()
    memory = MemoryConfig(activation_budget_mib=budget)
    prepared = magi_train.prepare(
        model, config=Config(tier=tier, lowering="aot_eager", memory=memory)
    )
    ids = tokens(0)
    step = magi_train.prepare_step(lambda x: prepared(input_ids=x, labels=x).loss, prepared)
    step(ids).backward()
    return magi_train.report(prepared), {n: p.grad for n, p in prepared.named_parameters()}


def row(report, name):
    return next(r.plan for r in report.rows if r.name == name)


@pytest.fixture(scope="module")
def unlimited():
    torch.manual_seed(0)
    model = llama()
    report, gradients = run(copy.deepcopy(model), None)
    return model, row(report, "saved_activations")["saved_mib"], gradients


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25, 0.1])
def test_the_budget_is_kept_and_gradients_do_not_change(unlimited, share):
    model, most, want = unlimited
    report, got = run(copy.deepcopy(model), share * most)
    plan = row(report, "bound_activations")
    assert plan["saved_mib"] <= share * most + 1e-3
    assert row(report, "saved_activations")["saved_mib"] == pytest.approx(
        plan["saved_mib"], abs=1e-3
    )
    assert plan["ratio"] < 1
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_a_generous_budget_changes_nothing(unlimited):
    model, most, _ = unlimited
    report, _ = run(copy.deepcopy(model), 10 * most)
    assert row(report, "bound_activations")["ratio"] == 1.0
    assert row(report, "bound_activations")["saved_mib"] == pytest.approx(most, abs=1e-3)


def test_attention_is_kept_while_it_fits(unlimited):
    model, most, _ = unlimited
    report, _ = run(copy.deepcopy(model), 0.5 * most)
    assert row(report, "bound_activations")["recomputes_attention"] is False


def test_regions_share_the_budget(unlimited):
    model, most, want = unlimited
    report, got = run(copy.deepcopy(model), 0.5 * most, tier="region")
    plans = [r for r in report.rows if r.name == "bound_activations"]
    assert sum(r.plan["saved_mib"] * r.graphs for r in plans) <= 0.5 * most
    assert all(torch.allclose(got[n], g, atol=1e-6) for n, g in want.items())


def test_without_a_captured_graph_the_budget_is_an_error():
    class Nothing(GraphBreak):
        def hidden(self, x):
            return super().hidden(x)

    prepared = magi_train.prepare(
        Nothing(),
        config=Config(lowering="aot_eager", memory=MemoryConfig(activation_budget_mib=1)),
    )

    def refuse(*_, **__):
        raise RuntimeError("no compiler here")

    region = prepared._magi_region
    region.compile_graph = refuse
    with pytest.raises(CaptureError, match="needs a captured graph, but the EAGER tier"):
        prepared(input_ids=tokens(0), labels=tokens(0))


def test_an_impossible_budget_names_the_smallest(monkeypatch):
    from magi_train.memory import budget

    monkeypatch.setattr(budget, "saved_bytes", lambda _: 3 * budget.MIB)
    with pytest.raises(MagiError, match=r"saves at least 3.000 MiB when everything else"):
        run(llama(), 1.0)
