"""The budget of a whole step: kept, monotonic, without a change of gradients, or an error."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import magi_train
from magi_train import Config, MagiError
from magi_train.core.errors import CaptureError, PassError
from magi_train.core.hardware import Speed
from magi_train.memory import budget as memory_budget
from magi_train.memory import step as step_memory
from magi_train.memory.budget import FitBudget, SurveyedError
from magi_train.memory.peak import ROUND_BYTES, simulate
from magi_train.memory.step import Limit
from tests.memory.joint import capture
from tests.models import GraphBreak, Small, llama, loss_of, tokens
from tests.ranks import values

GIB = 2**30
SIZES = {"num_hidden_layers": 4, "vocab_size": 32}


class Deep(Small):
    """Layers with dropout around a stream."""

    def hidden(self, x):
        h = self.embedding(x)
        for _ in range(6):
            h = h + F.dropout(torch.tanh(self.b(torch.tanh(self.a(h)))), 0.1)
        return h


def prepared(model, budget_gib, tier="graph", **config):
    """Return the prepared model and a step; its optimizer is AdamW."""
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = Config(tier=tier, lowering="aot_eager", memory_budget_gib=budget_gib, **config)
    prepared, _ = magi_train.prepare(model, optimizer, config=config)
    step = magi_train.prepare_step(lambda x: loss_of(prepared(input_ids=x, labels=x)), prepared)
    return prepared, step


def run(model, budget_gib, tier="graph"):
    """Return the plan of the budget and the gradients of one backward, dropout seeded."""
    module, step = prepared(model, budget_gib, tier)
    torch.manual_seed(1)
    step(tokens(0, 16) % 32).backward()
    found = [r.plan for r in magi_train.report(module).rows if r.name == "fit_budget"]
    return found, {n: p.grad for n, p in module.named_parameters()}


def between(plan, share):
    """Return the budget that has room for `share` of what the plan takes besides the resident."""
    held = plan["resident_gib"]
    resident = sum(held.values())
    return resident - held.get("rounding", 0) + share * (plan["planned_gib"] - resident)


@pytest.fixture(scope="module")
def unlimited():
    torch.manual_seed(0)
    model = Deep()
    plans, gradients = run(copy.deepcopy(model), 1.0)
    return model, plans[0], gradients


def test_a_generous_budget_changes_nothing(unlimited):
    _, plan, _ = unlimited
    assert plan["planned_gib"] == plan["without_gib"] < 1.0
    assert plan["resident_gib"]["optimizer"] == 2 * plan["resident_gib"]["parameters"]
    assert not any(plan[of] for of in ("offloaded", "offloaded_gib", "copy_ms", "exposed_ms"))


@pytest.mark.parametrize("share", [0.8, pytest.param(0.65, marks=pytest.mark.full)])
def test_the_budget_is_kept_and_gradients_do_not_change(unlimited, share):
    model, free, want = unlimited
    budget = between(free, share)
    plans, got = run(copy.deepcopy(model), budget)
    assert plans[0]["planned_gib"] <= budget
    assert plans[0]["saved_gib"] < free["saved_gib"]
    assert plans[0]["recompute_ms"] > free["recompute_ms"]
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_an_impossible_budget_names_the_smallest(unlimited):
    model, free, _ = unlimited
    too_small = between(free, 0.45)
    with pytest.raises(MagiError, match=r"at least [\d.e-]+ GiB .* smaller batch") as error:
        run(copy.deepcopy(model), too_small)
    least = float(str(error.value).split("at least ")[1].split(" ")[0])
    plans, _ = run(copy.deepcopy(model), 1.01 * least)
    assert plans[0]["planned_gib"] <= 1.01 * least
    with pytest.raises(MagiError, match=r"without a single activation .*optimizer"):
        run(copy.deepcopy(model), 0.5 * free["resident_gib"]["optimizer"])


@pytest.mark.full
def test_blocks_of_a_region_save_alike(unlimited):
    torch.manual_seed(0)
    model = llama(**SIZES)
    free, want = run(copy.deepcopy(model), 1.0, tier="region")
    budget = between(free[0], 0.6)
    plans, got = run(copy.deepcopy(model), budget, tier="region")
    assert all(plan["planned_gib"] <= budget for plan in plans)
    assert plans[0]["saved_gib"] < free[0]["saved_gib"]
    assert all(torch.equal(got[n], g) for n, g in want.items())


def test_a_peak_beyond_the_plan_is_planned_anew_once(unlimited, monkeypatch):
    model, free, _ = unlimited
    budget = between(free, 1.02)
    beyond = int(between(free, 1.3) * GIB)
    monkeypatch.setattr(step_memory, "measured_peak", lambda: beyond)
    module, step = prepared(copy.deepcopy(model), budget)
    for _ in range(4):
        step(tokens(0, 16) % 32).backward()
    report = magi_train.report(module)
    assert sum("planned anew" in note for note in report.notes) == 1
    assert report.measured["step_peak_gib"] == pytest.approx(beyond / GIB)
    plans = [r.plan for r in report.rows if r.name == "fit_budget"]
    assert len(plans) == 2
    assert plans[1]["saved_gib"] < plans[0]["saved_gib"]
    assert not any("is not kept" in note for note in report.notes)


def test_a_budget_that_cannot_be_kept_after_all_is_said(unlimited, monkeypatch, caplog):
    model, free, _ = unlimited
    budget = between(free, 1.02)
    monkeypatch.setattr(step_memory, "measured_peak", lambda: int(3 * budget * GIB))
    module, step = prepared(copy.deepcopy(model), budget)
    for _ in range(4):
        step(tokens(0, 16) % 32).backward()
    (note,) = [n for n in magi_train.report(module).notes if "is not kept" in n]
    least = [
        r.plan["planned_gib"] for r in magi_train.report(module).rows if "planned_gib" in r.plan
    ]
    assert f"takes at least {least[-1]:.6g} GiB" in note
    assert caplog.text.count("is not kept") == 1


@pytest.mark.full
def test_a_peak_within_the_budget_is_left_alone(unlimited, monkeypatch):
    model, free, _ = unlimited
    monkeypatch.setattr(step_memory, "measured_peak", lambda: int(free["planned_gib"] * GIB))
    module, step = prepared(copy.deepcopy(model), 1.0)
    for _ in range(3):
        step(tokens(0, 16) % 32).backward()
    report = magi_train.report(module)
    assert not any("planned anew" in note for note in report.notes)
    assert report.measured["step_peak_gib"] == pytest.approx(free["planned_gib"])


def two_ranks_with_unequal_batches(rank, world_size):
    torch.manual_seed(0)
    module, step = prepared(Deep(), 1.0)
    batch = tokens(0, 8 + 8 * rank) % 32
    step(batch).backward()
    plan = next(r.plan for r in magi_train.report(module).rows if r.name == "fit_budget")
    return sum(plan["resident_gib"].values()), plan["resident_gib"]


@pytest.mark.full
def test_ranks_count_the_same_resident_bytes(two_ranks):
    (first, small), (second, large) = values(two_ranks(two_ranks_with_unequal_batches))
    assert small["batch"] != large["batch"]
    assert first == pytest.approx(second, abs=1e-9)


def ranks_of_unequal_batches_waste(rank, world_size):
    torch.manual_seed(0)
    module, step = prepared(Deep(), 0.0008, timeout_seconds=30)
    batch = tokens(0, 16 if rank == 0 else 8) % 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_memory, "measured_peak", lambda: 698_000)
        for _ in range(14):
            step(batch).backward()
    plans = [r.plan for r in magi_train.report(module).rows if r.name == "fit_budget"]
    return [plan["recompute_ms"] for plan in plans], plans[0]["without_gib"] > 0.0008


def test_ranks_judge_a_plan_alike(two_ranks):
    """One recomputes, the other does not: both plan anew, or one would wait for ever."""
    (first, bound), (second, free) = values(two_ranks(ranks_of_unequal_batches_waste))
    assert bound
    assert not free
    assert len(first) == len(second) == 2


def one_rank_cannot(rank, world_size):
    torch.manual_seed(0)
    _, step = prepared(Deep(), 0.0006)
    try:
        step(tokens(0, 4 if rank == 0 else 64) % 32)
    except MagiError as error:
        return str(error)
    return ""


@pytest.mark.full
def test_what_does_not_fit_one_rank_stops_all(two_ranks):
    first, second = values(two_ranks(one_rank_cannot))
    two_ranks.close()  # their store says that one of them failed
    assert "takes at least" in second
    assert "takes at least" in first


def test_auto_needs_a_cuda_device():
    with pytest.raises(
        ValueError, match="the memory of a CUDA device, but the model lies on 'cpu'"
    ):
        prepared(Deep(), "auto")


def test_without_a_captured_graph_the_budget_is_an_error():
    class Nothing(GraphBreak):
        def hidden(self, x):
            return super().hidden(x)

    module = magi_train.prepare(
        Nothing(), config=Config(lowering="aot_eager", memory_budget_gib=1.0)
    )

    def refuse(*_, **__):
        raise RuntimeError("no compiler here")

    module._magi_region.compile_graph = refuse
    with pytest.raises(CaptureError, match="needs a captured graph, but the EAGER tier"):
        module(input_ids=tokens(0), labels=tokens(0))


def test_a_cut_that_comes_out_larger_makes_room(unlimited, monkeypatch):
    """The plan holds for what PyTorch's partitioner cuts, not only for what the row assumed."""
    model, free, want = unlimited
    budget = between(free, 0.9)
    told = []

    def larger(*cut, **on):
        course = simulate(*cut, **on)
        told.append(course.peak)
        return dataclasses.replace(
            course, peak=course.peak + int((budget - between(free, 0.85)) * GIB)
        )

    monkeypatch.setattr(memory_budget, "simulate", larger)
    plans, got = run(copy.deepcopy(model), budget)
    assert len(told) > 1
    assert plans[0]["planned_gib"] <= budget
    assert all(torch.equal(got[n], g) for n, g in want.items())


def test_a_plan_that_wasted_memory_is_watched_again(unlimited, monkeypatch):
    model, free, _ = unlimited
    budget = between(free, 0.9)
    module, step = prepared(copy.deepcopy(model), budget)
    planned = []

    def measured():
        planned.append(module._magi_runtime.memory.planned_bytes)
        return int(planned[-1] * 0.8 if planned[-1] == planned[0] else budget * 1.02 * GIB)

    monkeypatch.setattr(step_memory, "measured_peak", measured)
    for _ in range(12):
        step(tokens(0, 16) % 32).backward()
    report = magi_train.report(module)
    plans = [r.plan for r in report.rows if r.name == "fit_budget"]
    corrections = [plan["resident_gib"].get("correction", 0) for plan in plans]
    assert len(plans) == 3
    assert corrections[0] == 0 > corrections[2] > corrections[1]
    assert plans[2]["planned_gib"] <= budget


def test_no_verdict_before_the_optimizer_has_its_state(unlimited, monkeypatch):
    """Forwards of an accumulated batch are no steps: AdamW's state comes with the first one."""
    model, free, _ = unlimited
    torch._dynamo.reset()
    module = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    config = Config(tier="graph", lowering="aot_eager", memory_budget_gib=between(free, 0.9))
    module, optimizer = magi_train.prepare(module, optimizer, config=config)
    step = magi_train.prepare_step(lambda x: loss_of(module(input_ids=x, labels=x)), module)
    memory = module._magi_runtime.memory
    state = 2 * sum(p.nbytes for p in module.parameters())

    def measured():  # the plan is right, once the state is there
        return memory.planned_bytes - (0 if optimizer.state else state)

    monkeypatch.setattr(step_memory, "measured_peak", measured)
    for i in range(40):
        step(tokens(0, 16) % 32).backward()
        if i % 10 == 9:
            optimizer.step()
            optimizer.zero_grad()
    report = magi_train.report(module)
    assert not any("planned anew" in note for note in report.notes)
    assert report.measured["step_peak_gib"] == pytest.approx(memory.planned_bytes / GIB)


def test_training_code_may_reset_the_peak_between_steps(unlimited, monkeypatch):
    model, free, _ = unlimited
    torch._dynamo.reset()
    module = copy.deepcopy(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    config = Config(tier="graph", lowering="aot_eager", memory_budget_gib=between(free, 0.9))
    module, optimizer = magi_train.prepare(module, optimizer, config=config)
    step = magi_train.prepare_step(lambda x: loss_of(module(input_ids=x, labels=x)), module)
    memory = module._magi_runtime.memory
    peak = 1
    monkeypatch.setattr(step_memory, "measured_peak", lambda: peak)
    for _ in range(12):
        step(tokens(0, 16) % 32).backward()
        peak = memory.planned_bytes  # what the backward took
        optimizer.step()
        optimizer.zero_grad()
        peak = 1
    report = magi_train.report(module)
    assert not any("planned anew" in note for note in report.notes)
    assert report.measured["step_peak_gib"] == pytest.approx(memory.planned_bytes / GIB)


def test_a_cut_beyond_the_budget_is_an_error(unlimited, monkeypatch):
    model, free, _ = unlimited
    budget = between(free, 0.9)

    def larger(*cut, **on):
        course = simulate(*cut, **on)
        return dataclasses.replace(course, peak=course.peak + int(budget * GIB))

    monkeypatch.setattr(memory_budget, "simulate", larger)
    with pytest.raises(MagiError, match="a step takes at least"):
        run(copy.deepcopy(model), budget)


# -- figures of a plan, by hand --------------------------------------------------------------------

LIMIT = Limit(
    budget_bytes=2**40, resident={"parameters": 1000}, gradient_bytes=0, update_bytes=0,
    device_type="cpu", speed=Speed(flops=1e8, bytes=1e12, host=1e8), fused=False, blocks=3,
    room_bytes=2**40,
)  # fmt: skip
"""Of a captured graph that runs three times a step."""
ONE = 64 * 32 * 4
"""Bytes of every value of `mixed`."""


@pytest.fixture(scope="module")
def mixed():
    """A chain of products and of functions of one tensor, each of its own kind."""

    def function(x, w):
        for each in ("tanh", "sin", "cos", "exp", "sigmoid", "erf", "atan", "asinh"):
            x = getattr(torch, each)(x @ w)
        return x.sum()

    torch.manual_seed(0)
    inputs = torch.randn(64, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    return capture(function, *inputs, speed=LIMIT.speed, room_bytes=LIMIT.room_bytes)


def fitted(captured, **limit):
    """Return the plan that the partitioner notes."""
    noted = []
    fit = FitBudget(dataclasses.replace(LIMIT, **limit), noted.append)
    fit(captured.graph, captured.inputs, **captured.rest)
    return noted[0]


def test_the_figures_of_a_plan_are_those_of_all_blocks(mixed):
    row = mixed.row
    free = fitted(mixed)
    peak, saved = row.timeline(row.default).peak, row.saved_bytes(row.default)
    waiting = row.waiting_bytes(row.default)
    assert (saved, waiting) == (12 * ONE, 12 * ONE + ROUND_BYTES), "and the loss"
    assert free.budget_gib == 1024
    assert (
        free.without_gib
        == free.planned_gib
        == pytest.approx((1000 + peak + 2 * waiting) / GIB, abs=1e-9)
    )
    assert free.saved_gib == pytest.approx(3 * saved / GIB, abs=1e-9)
    assert free.step_ms == pytest.approx(3e3 * row.joint.forward_seconds, abs=1e-6)
    assert free.resident_gib == {"parameters": pytest.approx(1000 / GIB, abs=1e-9)}
    assert (free.offloaded, free.frontier) == ({}, [])
    waits = fitted(mixed, budget_bytes=int(0.5 * free.planned_gib * GIB))
    count = sum(waits.offloaded.values())
    assert count > 0
    assert waits.offloaded_gib == pytest.approx(3 * count * ONE / GIB, abs=1e-8)
    assert waits.copy_ms == pytest.approx(3e3 * count * ONE / LIMIT.speed.host, abs=1e-5)


def test_the_slowest_ops_that_run_again_are_named(mixed):
    least = fitted(mixed, budget_bytes=0, strict=False, room_bytes=0)
    assert len(least.recomputed) == 6
    assert next(iter(least.recomputed)) == "aten.mm.default"
    assert least.recompute_ms > 0
    row = mixed.row
    few = min((p for p in row.plans if not p.moved), key=lambda p: row.timeline(p).peak)
    assert least.recompute_ms >= 3e3 * few.seconds - 1e-6 > 0


def test_a_budget_may_be_used_up_and_the_least_one_is_told(mixed):
    row = mixed.row

    def size(plan):
        return 1000 + row.timeline(plan).peak

    default, least = size(row.default), min(size(p) for p in row.plans if not p.moved)
    free = fitted(mixed, room_bytes=0, blocks=1, budget_bytes=default)
    assert free.planned_gib == free.without_gib
    less = fitted(mixed, room_bytes=0, blocks=1, budget_bytes=default - 1)
    assert less.recompute_ms > free.recompute_ms
    full = fitted(mixed, room_bytes=0, blocks=1, budget_bytes=least)
    assert full.planned_gib == full.budget_gib
    with pytest.raises(PassError, match=r"budget_gib is 9.53674e-07, but") as error:
        fitted(mixed, room_bytes=0, blocks=1, budget_bytes=1024)
    assert f"at least {least / GIB:.6g} GiB" in str(error.value)
    assert "offload_activations=True" in str(error.value)
    largest = str(error.value).split("largest at the peak: ")[1].split(". Raise")[0].split(", ")
    assert [each.split(" ")[1] for each in largest] == [f"{ONE / GIB:.3g}"] * 3
    with pytest.raises(PassError) as error:
        fitted(mixed, budget_bytes=1024)
    assert "offload_activations" not in str(error.value)


def test_a_survey_says_what_each_budget_costs(mixed):
    with pytest.raises(SurveyedError) as surveyed:
        fitted(mixed, survey=True, blocks=1)
    plan, row = surveyed.value.plan, mixed.row
    frontier = row.frontier(lambda p: 1000 + row.timeline(p).peak)
    assert len(plan.frontier) == len(frontier) > 3
    for (size, ms), each in zip(plan.frontier, frontier, strict=True):
        assert ms == pytest.approx(1e3 * (each.seconds + each.copy_seconds), abs=1e-5)
        want = 1000 + row.timeline(each).peak
        assert size == pytest.approx(want / GIB, abs=1e-9)
    assert plan.frontier[0][0] == plan.without_gib
