"""Two variants of a block: which are planned, what they take, and that they compute the same."""

import copy
import dataclasses
import itertools
import random
import types

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config, MagiError, lower
from magi_train.core.hardware import Speed
from magi_train.memory import blocks as memory_blocks
from magi_train.memory import step as step_memory
from magi_train.memory.blocks import Choices, Turn, in_turn
from magi_train.memory.peak import Timeline
from magi_train.memory.remat import Row, SavedSet
from magi_train.memory.step import GIB, Limit
from tests.memory.joint import capture
from tests.memory.tracker import traced_chain
from tests.models import llama, loss_of, t5, tokens
from tests.ranks import values

BLOCKS = 6


def limit_of(blocks=BLOCKS, gradient_bytes=0, update_bytes=0):
    return Limit(
        budget_bytes=0, resident={"parameters": 1000}, gradient_bytes=gradient_bytes,
        update_bytes=update_bytes, device_type="cpu", speed=Speed(flops=1e8, bytes=1e12, host=0.0),
        fused=False, blocks=blocks, two_variants=True,
    )  # fmt: skip


# -- what is planned, on rows of plans that are made up --------------------------------------------


def made_up(seed, plans=8):
    """Return a row of plans, ever slower; for every other seed they save ever less."""
    draw = random.Random(seed)
    row = object.__new__(Row)
    row.joint = types.SimpleNamespace(forward_seconds=10.0)
    waiting = draw.sample(range(1, 100), plans)
    waiting = sorted(waiting, reverse=True) if seed % 2 else waiting
    seconds = sorted(draw.uniform(0.1, 5.0) for _ in range(plans))
    row.plans = [SavedSet(frozenset({str(i)}), s) for i, s in enumerate(seconds)]
    row.default = row.plans[draw.choice([0, 0, 1])]
    row._waiting = dict(zip(row.plans, waiting, strict=True))
    row._timelines = {
        plan: Timeline((), (), row._waiting[plan] + draw.randrange(1, 60), "", ())
        for plan in row.plans
    }
    return row


def peak_of(row, limit, followed):
    """Return the peak of the step, block by block, from the plan of each."""
    n, most = len(followed), limit.gradient_bytes + limit.update_bytes
    for i, plan in enumerate(followed):
        before = sum(row.waiting_bytes(each) for each in followed[:i])
        gradients = (n - 1 - i) * limit.gradient_bytes // n
        most = max(most, row.timeline(plan).peak + before + gradients)
    return limit.resident_bytes + most


def followed(choice):
    return [plan for count, plan in choice.runs for _ in range(count)]


def limits(seed):
    draw = random.Random(seed)
    return limit_of(draw.choice([2, 3, 6]), draw.randrange(0, 300), draw.randrange(0, 50))


@pytest.mark.parametrize("seed", range(40))
def test_the_fastest_step_within_the_budget_is_chosen(seed, monkeypatch):
    """Against all pairs of plans that may be mixed, and all counts, block by block."""
    monkeypatch.setattr(memory_blocks, "WORTH", -1.0)
    row, limit = made_up(seed), limits(seed)
    n, choices = limit.blocks, Choices(row, limit)
    usable = [p for p in row.plans if p.price >= row.default.price]
    steps = [[p] * n for p in row.plans]
    steps += [
        [lean] * k + [fast] * (n - k)
        for fast, lean in itertools.combinations(usable, 2)
        for k in range(1, n)
        if row.timeline(lean).peak <= row.timeline(fast).peak
    ]
    every = [(peak_of(row, limit, each), sum(p.seconds for p in each)) for each in steps]
    free = peak_of(row, limit, [row.default] * n)
    for budget in range(min(p for p, _ in every), free + 10, 7):
        choice = choices.choose(budget)
        assert choice.peak == peak_of(row, limit, followed(choice)) <= budget
        if budget >= free:
            assert choice.runs == ((n, row.default),)
        else:
            fastest = min(seconds for peak, seconds in every if peak <= budget)
            assert choice.price[0] == pytest.approx(fastest)
    assert choices.choose(min(p for p, _ in every) - 1) is None
    assert choices.least.peak == min(p for p, _ in every)


@pytest.mark.parametrize("seed", range(40))
def test_a_smaller_budget_never_takes_a_faster_step_or_a_higher_peak(seed):
    row = made_up(seed)
    row.default = row.plans[0]
    choices = Choices(row, limits(seed))
    top = choices.alike(row.default).peak
    found = [choices.choose(budget) for budget in range(top, choices.least.peak - 1, -1)]
    assert found[-1] == choices.least
    for more, less in itertools.pairwise(found):
        assert less.price >= more.price
        assert less.peak <= more.peak


def test_one_variant_is_chosen_as_if_there_were_no_two(monkeypatch):
    monkeypatch.setattr(Choices, "_mixed", lambda self: ())
    for seed in range(20):
        row, limit = made_up(seed), limit_of(gradient_bytes=100)
        choices = Choices(row, limit)
        least = min(choices.alike(p).peak for p in row.plans)
        for budget in range(least, choices.alike(row.default).peak + 5, 11):
            plan = row.choose(lambda p, c=choices: c.alike(p).peak, budget)
            assert choices.choose(budget).runs == ((BLOCKS, plan),)


def test_where_the_default_fits_no_other_plan_is_judged():
    row = made_up(0)
    row._timelines = {row.default: row._timelines[row.default]}
    choices = Choices(row, limit_of())
    assert choices.choose(10**6).runs == ((BLOCKS, row.default),)


@pytest.mark.parametrize(("forward_seconds", "worth"), [(49.0, True), (51.0, False)])
def test_a_second_variant_that_gains_little_is_not_compiled(forward_seconds, worth):
    """One of two blocks is fast, which gains one second of twice `forward_seconds`."""
    row = object.__new__(Row)
    row.joint = types.SimpleNamespace(forward_seconds=forward_seconds)
    fast, lean = SavedSet(frozenset("a"), 0.0), SavedSet(frozenset("b"), 1.0)
    row.default, row.plans = fast, [fast, lean]
    row._waiting = {fast: 100, lean: 0}
    row._timelines = {p: Timeline((), (), 100, "", ()) for p in row.plans}
    chosen = Choices(row, limit_of(2)).choose(1150)
    assert chosen.runs == (((1, lean), (1, fast)) if worth else ((2, lean),))


# -- what the blocks take, traced ------------------------------------------------------------------


class Layer(nn.Module):
    """A wide layer around a narrow stream."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        h = torch.tanh(self.up(x))
        h = torch.sigmoid(h).cos()
        return x + torch.tanh(self.down(h))


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    block = Layer()
    return capture(block, torch.randn(256, 16, requires_grad=True))


def test_planned_and_traced_peak_of_a_step_agree(layer):
    row = layer.row
    own = row.joint.storages.total(row.joint.gradients) - 256 * 16 * 4  # of the weights
    choices = Choices(row, limit_of(gradient_bytes=BLOCKS * own))
    mixed = [choice for choice in choices.frontier if len(choice.runs) > 1]
    assert len(mixed) >= 3
    _, want = traced_chain([layer.cut(row.default)] * BLOCKS, (256, 16))
    for choice in [choices.frontier[0], *mixed, choices.alike(row.plans[-1])]:
        cuts = [layer.cut(plan) for plan in followed(choice)]
        peak, gradients = traced_chain(cuts, (256, 16))
        assert choice.peak - 1000 == pytest.approx(peak, rel=0.03)
        assert len(gradients) == len(want) == 2 * BLOCKS
        assert all(torch.equal(g, w) for g, w in zip(gradients, want, strict=True))


def test_plans_of_a_captured_layer_are_monotonic(layer):
    row = layer.row
    choices = Choices(row, limit_of(gradient_bytes=30_000))
    top, least = choices.alike(row.default).peak, choices.least.peak
    found = [choices.choose(top - i * (top - least) // 12) for i in range(13)]
    assert [len(choice.runs) for choice in found].count(2) >= 3
    for more, less in itertools.pairwise(found):
        assert less.price >= more.price
        assert less.peak <= more.peak


# -- which block runs which variant ----------------------------------------------------------------


def test_the_first_blocks_called_are_lean_and_stay_so():
    turn = Turn()
    call = in_turn(["lean".__add__, "fast".__add__], [1, 3], turn)
    blocks = [object() for _ in range(4)]
    for order in ([2, 0, 1, 3], [3, 1, 0, 2, 2], [0]):
        told = []
        for i in order:
            turn.block = id(blocks[i])
            told.append(call("!"))
        assert told == ["lean!" if i == 2 else "fast!" for i in order]


def test_each_graph_takes_its_own_first_blocks_for_lean():
    turn = Turn()
    graphs = [in_turn([lambda: "lean", lambda: "fast"], [2, 4], turn) for _ in range(2)]
    told = []
    for i, block in enumerate([object() for _ in range(6)]):
        turn.block = id(block)
        told.append(graphs[i // 3]())
    assert told == ["lean", "lean", "fast"] * 2


@pytest.mark.parametrize("seed", range(40))
def test_more_lean_blocks_never_take_more(seed):
    row, limit = made_up(seed), limit_of(gradient_bytes=40 * (seed % 3))
    choices = Choices(row, limit)
    for choice in choices.frontier:
        (_, lean), *others = choice.runs
        assert choices.alike(lean).peak <= choice.peak
        for _, fast in others:
            assert row.timeline(lean).peak <= row.timeline(fast).peak


def test_blocks_of_several_kinds_follow_one_plan():
    row, limit = made_up(1), dataclasses.replace(limit_of(), two_variants=False)
    assert all(len(choice.runs) == 1 for choice in Choices(row, limit).frontier)
    assert any(len(choice.runs) == 2 for choice in Choices(row, limit_of()).frontier)


# -- models ----------------------------------------------------------------------------------------


def prepared(model, budget_gib, lowering="aot_eager"):
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = Config(tier="region", lowering=lowering, memory_budget_gib=budget_gib)
    module, _ = magi_train.prepare(model, optimizer, config=config)
    return module, magi_train.prepare_step(lambda x: loss_of(module(input_ids=x, labels=x)), module)


def run(model, budget_gib, lowering="aot_eager"):
    """Return the plans, the loss and the gradients of one backward, dropout seeded."""
    module, step = prepared(copy.deepcopy(model), budget_gib, lowering)
    torch.manual_seed(1)
    loss = step(tokens(0, 16) % 32)
    loss.backward()
    rows = [r for r in magi_train.report(module).rows if r.name == "fit_budget"]
    return rows, loss.detach(), {n: p.grad for n, p in module.named_parameters()}


def between(plan, share):
    """Return the budget that has room for `share` of what the plan takes besides the resident."""
    held = plan["resident_gib"]
    resident = sum(held.values())
    return resident - held.get("rounding", 0) + share * (plan["without_gib"] - resident)


def same(got, want):
    return all(g is want[n] is None or torch.equal(g, want[n]) for n, g in got.items())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "vocab_size": 32, "use_cache": False}
    return llama(**sizes, attention_dropout=0.1)


@pytest.fixture(scope="module")
def unlimited(model):
    _, loss, gradients = run(model, None)
    return loss, gradients


@pytest.fixture(scope="module")
def free(model):
    return run(model, 1.0)[0][0].plan


@pytest.fixture
def called(monkeypatch):
    """Return the list of variants that run, 0 for lean."""
    told = []

    def watched(variants, *rest):
        def telling(i):
            return lambda *args: told.append(i) or variants[i](*args)

        return in_turn([telling(i) for i in range(len(variants))], *rest)

    monkeypatch.setattr(lower, "in_turn", watched)
    return told


def test_some_blocks_are_lean_and_the_numbers_stay(model, unlimited, free, called):
    assert (free["lean_blocks"], free["blocks"]) == (0, 4)
    budget = between(free, 0.6)
    (row,), loss, gradients = run(model, budget)
    plan = row.plan
    lean, fast = plan["variants"]
    assert plan["planned_gib"] <= budget
    assert 0 < plan["lean_blocks"] == lean["blocks"] < 4 == lean["blocks"] + fast["blocks"]
    assert lean["recompute_ms"] > fast["recompute_ms"]
    assert lean["saved_gib"] < fast["saved_gib"]
    for whole, part in (("recompute_ms", "recompute_ms"), ("saved_gib", "saved_gib")):
        each = sum(v["blocks"] * v[part] for v in plan["variants"])
        assert plan[whole] == pytest.approx(each, abs=1e-5)
    assert called == [0] * lean["blocks"] + [1] * fast["blocks"]
    assert torch.equal(loss, unlimited[0])
    assert same(gradients, unlimited[1])


def waiting_bytes(model, budget_gib, lowering="aot_eager"):
    """Return the bytes that a forward keeps for its backward, and those that were planned."""
    module, step = prepared(copy.deepcopy(model), budget_gib, lowering)
    batch = tokens(0, 16) % 32
    step(batch).backward()
    held = {x.untyped_storage()._cdata for x in [*module.parameters(), *module.buffers()]}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step(batch)
    found = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in held)
    loss.backward()
    (plan,) = [r.plan for r in magi_train.report(module).rows if r.name == "fit_budget"]
    return found, plan["saved_gib"] * GIB


def test_blocks_keep_what_was_planned(model, free):
    """The rest of the model, and what each block is given, is the same under every plan."""
    kept, planned = waiting_bytes(model, 1.0)
    less, planned_less = waiting_bytes(model, between(free, 0.6))
    assert kept - less == pytest.approx(planned - planned_less, abs=10)
    assert kept - planned > 4 * 16 * 16 * 32 * 4, "the inputs of the blocks"
    assert planned_less < 0.8 * planned


@pytest.mark.full
def test_two_variants_are_faster_than_the_fastest_that_fits_for_all(model, free, monkeypatch):
    budgets = [between(free, share) for share in (1.1, 0.8, 0.7, 0.6, 0.5)]
    two = [run(model, budget)[0][0].plan for budget in budgets]
    monkeypatch.setattr(Choices, "_mixed", lambda self: ())
    one = [run(model, budget)[0][0].plan for budget in budgets]
    assert two[0] == one[0]
    assert not any(plan["lean_blocks"] for plan in one)
    gained = [o["recompute_ms"] - t["recompute_ms"] for o, t in zip(one, two, strict=True)]
    assert all(gain >= 0 for gain in gained)
    assert max(gained) > 0.01 * free["step_ms"]
    assert all(p["planned_gib"] <= b for p, b in zip(two, budgets, strict=True))


@pytest.mark.full
def test_steps_that_accumulate_and_calls_without_gradients_keep_the_variants(model, free, called):
    module, step = prepared(copy.deepcopy(model), between(free, 0.6))
    losses = [step(tokens(i, 16) % 32) for i in range(2)]
    with torch.no_grad():
        step(tokens(2, 16) % 32)
    sum(losses).backward()
    step(tokens(3, 16) % 32).backward()
    (plan,) = [r.plan for r in magi_train.report(module).rows if r.name == "fit_budget"]
    lean = plan["lean_blocks"]
    assert called == 3 * ([0] * lean + [1] * (4 - lean))


@pytest.mark.full
def test_a_block_that_a_checkpoint_runs_again_keeps_its_variant(model, unlimited, free, called):
    module = copy.deepcopy(model)
    module.gradient_checkpointing_enable({"use_reentrant": False})
    (row,), loss, gradients = run(module, between(free, 0.6))
    lean = row.plan["lean_blocks"]
    forward = [0] * lean + [1] * (4 - lean)
    assert called == forward + forward[::-1]
    assert torch.equal(loss, unlimited[0])
    assert same(gradients, unlimited[1])


def two_ranks_with_other_batches(rank, world_size):
    torch.manual_seed(0)
    model = llama(num_hidden_layers=4, vocab_size=32, use_cache=False)
    plans = []
    for share in (None, 0.6):
        budget = 1.0 if share is None else between(plans[0], share)
        module, step = prepared(copy.deepcopy(model), budget)
        step(tokens(rank, 16) % 32).backward()
        plans += [r.plan for r in magi_train.report(module).rows if r.name == "fit_budget"]
    return plans


@pytest.mark.full
def test_ranks_make_the_same_blocks_lean(two_ranks):
    first, second = values(two_ranks(two_ranks_with_other_batches))
    assert [plan["lean_blocks"] > 0 for plan in first] == [False, True]
    assert first == second


@pytest.mark.full
def test_kinds_of_blocks_have_one_plan_each():
    torch.manual_seed(0)
    module = t5()
    module.config.use_cache = False
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.1
    _, loss, want = run(module, None)
    rows, _, _ = run(module, 1.0)
    largest = max((row.plan for row in rows), key=lambda plan: plan["without_gib"])
    budget = between(largest, 0.7)
    rows, got_loss, got = run(module, budget)
    assert len(rows) == 4
    assert not any(r.plan["lean_blocks"] for r in rows)
    assert all(r.plan["planned_gib"] <= budget for r in rows)
    assert torch.equal(got_loss, loss)
    assert same(got, want)


def test_a_peak_beyond_the_plan_makes_more_of_them_lean(model, free, monkeypatch):
    budget = between(free, 0.7)
    monkeypatch.setattr(step_memory, "measured_peak", lambda: int(between(free, 0.85) * GIB))
    module, step = prepared(copy.deepcopy(model), budget)
    for i in range(4):
        step(tokens(i, 16) % 32).backward()
    report = magi_train.report(module)
    assert sum("planned anew" in note for note in report.notes) == 1
    first, second = [r.plan for r in report.rows if r.name == "fit_budget"]
    assert second["resident_gib"]["correction"] > 0
    assert second["saved_gib"] < first["saved_gib"]
    assert second["lean_blocks"] > 0


def test_an_impossible_budget_is_refused_with_the_smallest(model, free):
    with pytest.raises(MagiError, match=r"at least [\d.e-]+ GiB when as much") as error:
        run(model, between(free, 0.2))
    least = float(str(error.value).split("at least ")[1].split(" ")[0])
    (row,), *_ = run(model, 1.001 * least)
    assert row.plan["planned_gib"] <= 1.001 * least
    assert row.plan["lean_blocks"] > 0, "fewer bytes than any plan for all"


@pytest.mark.full
def test_generated_code_comes_from_the_cache_with_both_variants(
    model, free, called, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (alike,), loss, want = run(model, 1.0, "inductor")
    budget = between(alike.plan, 0.7)
    (cold,), *first = run(model, budget, "inductor")
    ran = list(called)
    (warm,), *second = run(model, budget, "inductor")
    assert not cold.cached
    assert warm.cached
    assert warm.plan == cold.plan
    assert warm.graphs == cold.graphs == 1
    lean = cold.plan["lean_blocks"]
    assert ran == [0] * lean + [1] * (4 - lean)
    assert called == ran + ran
    assert set(ran) == {0, 1}
    for got_loss, got in (first, second):
        assert torch.equal(got_loss, loss)
        assert same(got, want)
    kept, planned = waiting_bytes(model, 1.0, "inductor")
    less, planned_less = waiting_bytes(model, budget, "inductor")
    assert 0 < kept - less == pytest.approx(planned - planned_less, abs=10)
    called.clear()
    for file in (tmp_path / "magi_train").iterdir():
        file.unlink()
    rows, *_ = run(model, budget, "inductor")
    assert (rows, called) == ([], []), "without notes all blocks are lean"
