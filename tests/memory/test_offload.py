"""Activations that wait on the host: what is planned, that numbers stay, what is refused."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import magi_train
from magi_train import Config, MagiError
from magi_train.core import compat, hardware
from magi_train.core.hardware import Speed
from magi_train.memory import budget as memory_budget
from magi_train.memory import copies
from magi_train.memory import step as step_memory
from magi_train.memory.copies import ARRIVED, FETCH, SEND
from magi_train.memory.offload import can_wait, homeward, outward, pin
from magi_train.memory.peak import Storages, body, simulate, walk
from magi_train.memory.step import StepMemory
from tests.close import difference, tolerance
from tests.memory.joint import capture
from tests.memory.test_budget import Deep, between
from tests.memory.test_peak import GUESS, Layer, same
from tests.memory.tracker import traced_peak
from tests.models import MODELS, Small, llama, loss_of, tokens
from tests.ranks import values

GIB, TOLERANCE = 2**30, 0.03
LAYERS, PLENTY = 12, 2**40
SLOW_DEVICE = {"flops": 1e8, "bytes": 1e12}
"""Its kernels take milliseconds for toy sizes, so copies over a link of 1 GB/s hide."""
FAST, SLOW = Speed(**SLOW_DEVICE, host=1e9), Speed(**SLOW_DEVICE, host=1e4)


def chain(speed, room_bytes=PLENTY, dropout=0.1):
    torch.manual_seed(0)
    layers = nn.Sequential(*[Layer(dropout) for _ in range(LAYERS)])
    inputs = torch.randn(256, 16)
    return capture(lambda x: layers(x).square().mean(), inputs, speed=speed, room_bytes=room_bytes)


@pytest.fixture(scope="module")
def fast():
    return chain(FAST)


def fitting(row, share):
    """Return the plan for a peak that is `share` of the default's."""
    peak = row.timeline(row.default).peak
    return row.choose(lambda plan: row.timeline(plan).peak, int(share * peak))


def test_copies_leave_in_turn_and_what_is_late_is_exposed():
    """Places take 1, 2 and 3 seconds, copies 2 each: done after 3 and 5, then after 8 of 6."""
    times, link = [1.0, 2.0, 3.0], 10.0
    assert outward([(0, 20)], times, link) == ([1], 0.0)
    assert outward([(0, 20), (1, 20)], times, link) == ([1, 2], 0.0)
    assert outward([(0, 20), (1, 20), (2, 20)], times, link) == ([1, 2, 2], 2.0)
    assert outward([], times, link) == ([], 0.0)


def test_copies_come_back_as_late_as_may_be():
    """Read when 1, 3 and 6 seconds are over, 2 seconds each."""
    times, link = [1.0, 2.0, 3.0, 1.0], 10.0
    assert homeward([(3, 20)], times, link) == ([2], 0.0)
    assert homeward([(2, 20), (3, 20)], times, link) == ([1, 2], 0.0)
    assert homeward([(2, 20), (3, 40)], times, link) == ([0, 1], 0.0)
    assert homeward([(1, 20), (2, 20), (3, 20)], times, link) == ([0, 1, 2], 1.0)
    assert homeward([(0, 20)], times, link) == ([0], 2.0)
    assert homeward([], times, link) == ([], 0.0)


def test_what_one_copy_moves_may_wait():
    whole = torch.empty(64, 64)
    assert can_wait(whole, link=1e6)
    assert can_wait(whole.t(), link=1e6)
    assert can_wait(whole.as_strided((64, 1, 64), (64, 7, 1)), link=1e6)
    assert can_wait(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), link=1e6)
    assert not can_wait(whole, link=1e9), "too small to be worth it"
    assert not can_wait(whole[:32], link=1e6), "a part of its memory"
    assert not can_wait(whole[:, :1].expand(64, 64), link=1e6)
    assert not can_wait(torch.empty(128).as_strided((2, 64), (63, 1)), link=1e6)
    assert not can_wait(3, link=1e6)


def test_copies_stay_between_the_kernels_that_hide_them(monkeypatch):
    """Each begins and ends behind the product before it, and in front of the one behind."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")

    def call(target, *args):
        return graph.call_function(target, args)

    mm = torch.ops.aten.mm.default
    first = call(mm, x, x)
    sent = call(SEND, first)
    call(torch.ops.aten.sin.default, first)
    second = call(mm, first, x)
    out = call(ARRIVED, sent, first)
    back = call(FETCH, out, torch.device("cpu"))
    third = call(mm, second, x)
    there = call(ARRIVED, back, out)
    last = call(mm, third, there)
    found = []
    monkeypatch.setattr(compat, "ordered", lambda *call: found.append(call))
    pin(graph)
    assert found == [
        (
            graph,
            {
                second: [sent],
                out: [second],
                back: [second],
                third: [out, back],
                there: [third],
                last: [there],
            },
        )
    ]
    plain = torch.fx.Graph()
    plain.call_function(mm, (plain.placeholder("x"), plain.placeholder("y")))
    pin(plain)
    assert len(found) == 1


def test_over_a_fast_link_values_wait_instead_of_being_computed_again(fast):
    without = chain(Speed(**SLOW_DEVICE), room_bytes=0)
    assert not any(plan.moved for plan in without.row.plans)
    plan, other = fitting(fast.row, 0.7), fitting(without.row, 0.7)
    assert plan.moved
    assert plan.price < other.price
    assert other.seconds > 0


def test_over_a_slow_link_values_are_computed_again():
    row = chain(SLOW).row
    assert any(plan.moved for plan in row.plans)
    for share in (0.9, 0.7, 0.5):
        assert not fitting(row, share).moved


def test_a_smaller_budget_is_never_faster_or_larger(fast):
    row = fast.row
    peaks, prices = [], []
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5):
        plan = fitting(row, share)
        peaks.append(row.timeline(plan).peak)
        prices.append(plan.price[0])
    assert peaks == sorted(peaks, reverse=True)
    assert prices == sorted(prices)


@pytest.mark.parametrize("link", [FAST.host, 2e7])  # over the second one copies queue
def test_planned_and_traced_peak_agree_and_gradients_are_equal(link):
    found = chain(Speed(**SLOW_DEVICE, host=link))
    row = found.row
    _, want = traced_peak(*found.cut(row.default))
    moving = [plan for plan in row.plans if plan.moved]
    for plan in moving[:: len(moving) // 8]:
        cut, moves = found.cut_and_move(plan)
        assert set(moves.nodes) == plan.moved
        peak, gradients = traced_peak(*cut)
        assert row.timeline(plan).peak == pytest.approx(peak, rel=TOLERANCE)
        assert simulate(*cut, fused=False).peak == pytest.approx(peak, rel=TOLERANCE)
        assert same(gradients, want)


def test_a_value_is_freed_when_its_copy_is_done_and_comes_back_late(fast):
    """On the host it takes nothing: the peak falls by what waits, but for what is on its way."""
    row = fast.row
    stay = [p for p in row.plans if p.saved == row.default.saved]
    least = min(row.timeline(p).peak for p in stay)
    moved = max(fast.cut_and_move(p)[1].bytes for p in stay if p.moved)
    assert least < row.timeline(row.default).peak - 0.8 * moved
    plan = next(p for p in stay if p.moved)
    (forward, backward), _ = fast.cut_and_move(plan)
    order = [n.target for n in forward.graph.nodes if n.op == "call_function"]
    assert order.index(ARRIVED) > order.index(SEND) + 1
    order = [n.target for n in backward.graph.nodes if n.op == "call_function"]
    assert order.index(FETCH) > 0
    assert order.index(ARRIVED) > order.index(FETCH) + 1


def live(function, count, **where):
    """Return how many values of one size are there while each node runs; the inputs are not."""
    inputs = [torch.ones(64, 64)] * count
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    given, order = graph.find_nodes(op="placeholder"), body(graph)
    where = {name: {i: [(given + order)[n]] for i, n in m.items()} for name, m in where.items()}
    results = graph.output_node().all_input_nodes
    course, _ = walk(order, Storages(fused=False), resident=given[:1], keep=results, **where)
    return [size / (64 * 64 * 4) for size in course.live]


def test_memory_while_copies_are_under_way():
    def chained(x):
        return ((x.exp() + 1) * 2) * 3

    assert live(chained, 1) == [1, 2, 2, 2]
    assert live(chained, 1, leave={2: 1}) == [1, 2, 3, 2], "on its way until the third node"

    def reading(x, y):
        return ((x.exp() + 1) * 2) * y

    assert live(reading, 2, come={3: 1}) == [1, 2, 2, 3]
    assert live(reading, 2, come={1: 1}) == [1, 3, 3, 3], "begins before the second node"


def test_the_host_has_room_for_so_much():
    one = 256 * 64 * 4
    row = chain(FAST, room_bytes=3 * one).row
    most = max(len(plan.moved) for plan in row.plans)
    assert 3 <= most < max(len(plan.moved) for plan in chain(FAST).row.plans)
    assert hardware.pinned_bytes(5) == 8
    assert hardware.pinned_bytes(8) == 8
    for plan in row.plans:
        sizes = [row.joint.storages.total([n]) for n in row.joint.nodes if n.name in plan.moved]
        assert sum(map(hardware.pinned_bytes, sizes)) <= 3 * one


def test_half_of_what_is_hidden_all_of_it_and_everything_wait():
    """Copies queue on this link: those of some values are hidden, of all they are not."""
    row = chain(Speed(**SLOW_DEVICE, host=2e7)).row
    joint = row.joint
    saved = {n for n in joint.nodes if n.name in row.default.saved}
    values, trip = joint.movable(saved), joint.trip(saved)
    sizes = [joint.storages.total([n]) for n in values]
    late = [trip.move(values[:count], joint.storages) for count in range(len(values) + 1)]
    hidden = max(count for count, seconds in enumerate(late) if not seconds)
    half = min(count for count in range(hidden) if sum(sizes[:count]) * 2 >= sum(sizes[:hidden]))
    assert 0 < half < hidden < len(values)
    found = {p.moved: p for p in row.plans if p.saved == row.default.saved}
    for count in (half, hidden, len(values)):
        plan = found.pop(frozenset(n.name for n in values[:count]))
        traffic = 2 * sum(sizes[:count]) / SLOW_DEVICE["bytes"]
        assert plan.copy_seconds == pytest.approx(late[count] + traffic)
    assert found.keys() == {frozenset()}
    assert found[frozenset()].copy_seconds == 0


def test_what_others_hold_stays():
    """Outputs, inputs, views of them, and what is saved twice, share their memory."""

    def function(x, w):
        h = torch.tanh(x @ w)
        kept = torch.tanh(h @ w)
        return (kept @ w).sin().sum(), kept

    x, w = torch.ones(128, 128), torch.ones(128, 128, requires_grad=True)

    def movable(returned):
        row = capture(lambda: function(x, w)[:returned], speed=FAST, room_bytes=PLENTY).row
        saved = {n for n in row.joint.nodes if n.name in row.default.saved}
        return {n.name for n in row.joint.movable(saved)}

    assert movable(1) == {"tanh", "tanh_1", "mm_2"}
    assert movable(2) == {"tanh", "mm_2"}


class Steady(Small):
    """Layers around a stream, the same in every call."""

    def hidden(self, x):
        h = self.embedding(x)
        for _ in range(6):
            h = h + torch.tanh(self.b(torch.tanh(self.a(h))))
        return h


def prepared(model, budget_gib, *, offload=True, lowering="aot_eager", tier="graph"):
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = Config(
        tier=tier, lowering=lowering, memory_budget_gib=budget_gib, offload_activations=offload
    )
    module, _ = magi_train.prepare(model, optimizer, config=config)
    step = magi_train.prepare_step(lambda x: loss_of(module(input_ids=x, labels=x)), module)
    return module, step


def plan_of(module):
    return [r.plan for r in magi_train.report(module).rows if r.name == "fit_budget"][-1]


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.fixture
def engine(monkeypatch):
    """Let the CPU look like a device with a copy engine."""
    monkeypatch.setattr(step_memory, "speed_of", lambda _: FAST)


@pytest.fixture(scope="module")
def unlimited():
    torch.manual_seed(0)
    model = Deep()
    module, step = prepared(copy.deepcopy(model), 1.0, offload=False)
    torch.manual_seed(1)
    step(tokens(0, 16) % 32).backward()
    return model, plan_of(module), gradients(module)


def test_the_budget_is_kept_with_the_same_gradients_and_the_report_says_how(unlimited, engine):
    model, free, want = unlimited
    budget = between(free, 0.7)
    module, step = prepared(copy.deepcopy(model), budget)
    torch.manual_seed(1)
    step(tokens(0, 16) % 32).backward()
    plan = plan_of(module)
    assert plan["planned_gib"] <= budget
    assert plan["offloaded"]
    values = plan["offloaded_gib"] * GIB / (16 * 16 * 32 * 4)
    assert values == pytest.approx(sum(plan["offloaded"].values()), rel=1e-3)
    assert plan["copy_ms"] == pytest.approx(plan["offloaded_gib"] * GIB / FAST.host * 1e3, rel=1e-4)
    assert plan["exposed_ms"] >= 0
    assert plan["recompute_ms"] < free["step_ms"] / 10
    saved = [r.plan for r in magi_train.report(module).rows if r.name == "saved_activations"]
    assert saved[-1]["saved_mib"] / 1024 == pytest.approx(plan["saved_gib"], rel=0.01)
    for name, gradient in gradients(module).items():
        assert torch.equal(gradient, want[name]), name


def test_several_forwards_before_their_backwards_and_one_that_never_has_one(engine, unlimited):
    torch.manual_seed(0)
    model = Steady()
    plain = copy.deepcopy(model)
    module, step = prepared(model, between(unlimited[1], 0.6))
    batches = [tokens(seed, 16) % 32 for seed in range(4)]
    losses = [step(batch) for batch in batches]
    assert plan_of(module)["offloaded"]
    del losses[1]
    for loss in reversed(losses):
        loss.backward()
    for i in (0, 2, 3):
        loss_of(plain(input_ids=batches[i], labels=batches[i])).backward()
    assert difference(gradients(model), gradients(plain)) <= tolerance(torch.float32)


def test_a_backward_may_run_twice(engine, unlimited):
    torch.manual_seed(0)
    model = Steady()
    module, step = prepared(model, between(unlimited[1], 0.6))
    with torch._functorch.config.patch(donated_buffer=False):  # PyTorch refuses it else
        loss = step(tokens(0, 16) % 32)
        loss.backward(retain_graph=True)
        once = {name: g.clone() for name, g in gradients(module).items()}
        loss.backward()
    assert plan_of(module)["offloaded"]
    assert all(torch.equal(g, 2 * once[name]) for name, g in gradients(module).items())


class Recorded(TorchDispatchMode):
    """Notes the products and copies that run, and what the copies made."""

    def __init__(self):
        super().__init__()
        self.order, self.made = [], []
        self.fetched = set()  # addresses on the host

    @classmethod
    def is_infra_mode(cls):
        return True  # Dynamo looks away

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in copies.OPS:
            self.order.append(func)
            self.made.append(weakref.ref(result.untyped_storage()))
            if func is FETCH:
                self.fetched.add(args[0].untyped_storage().data_ptr())
        elif func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.order.append("product")
        return result


def test_nothing_is_left_of_a_step_nor_of_one_without_a_backward(engine, unlimited):
    torch.manual_seed(0)
    _, step = prepared(Steady(), between(unlimited[1], 0.6))
    batch = tokens(0, 16) % 32
    step(batch).backward()
    with Recorded() as recorded:
        loss = step(batch)
        assert sum(ref() is not None for ref in recorded.made)
        del loss
        gc.collect()
        assert not any(ref() for ref in recorded.made)
        step(batch).backward()
        gc.collect()
        assert not any(ref() for ref in recorded.made)
    assert FETCH in recorded.order


def leave_on_the_device(monkeypatch):
    """Let the same cut be chosen, by the same figures, and then move nothing."""
    real, simulate, limit = memory_budget.insert, memory_budget.simulate, StepMemory.limit
    told = []

    def insert(forward, backward, names, speed, *, fused):
        cut = memory_budget._copy(forward), memory_budget._copy(backward)
        real(*cut, names, speed, fused=fused)
        told.append(cut)
        return memory_budget.Moves()

    def unwatched(self, **how):
        self._done = True  # the peak is not that of the plan
        return limit(self, **how)

    monkeypatch.setattr(memory_budget, "insert", insert)
    monkeypatch.setattr(memory_budget, "simulate", lambda *_, **on: simulate(*told[-1], **on))
    monkeypatch.setattr(StepMemory, "limit", unwatched)


def test_generated_code_copies_where_that_was_planned(engine, monkeypatch):
    """Products run while a copy is under way; the numbers are those of the same cut without."""
    torch.manual_seed(0)
    model = Steady()
    batch = tokens(0, 16) % 32
    found = {}
    for moves in (True, False):
        if not moves:
            leave_on_the_device(monkeypatch)
        module, step = prepared(copy.deepcopy(model), 0.00058, lowering="inductor")
        with (
            torch._inductor.config.patch(fx_graph_cache=False),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            step(batch).backward()
        module.zero_grad()
        with Recorded() as recorded:
            step(batch).backward()
        found[moves] = gradients(module), recorded.order, plan_of(module)
    (got, order, plan), (want, plain, without) = found[True], found[False]
    assert plan["offloaded"]
    assert not without["offloaded"]
    assert set(plain) == {"product"}
    assert order.count("product") == len(plain)
    assert order.count(SEND) == order.count(FETCH) == sum(plan["offloaded"].values())
    for begin in (SEND, FETCH):
        first = order.index(begin)
        assert "product" in order[first : order.index(ARRIVED, first)]
    race = {"embedding.weight"} if torch.get_num_threads() > 1 else set()
    assert all(torch.equal(got[name], want[name]) for name in want.keys() - race)
    assert difference(got, want) <= tolerance(torch.float32)


def test_on_a_device_without_a_copy_engine_nothing_waits(unlimited):
    model, free, _ = unlimited
    module, step = prepared(copy.deepcopy(model), between(free, 0.8))
    step(tokens(0, 16) % 32).backward()
    assert not plan_of(module)["offloaded"]
    assert any("a 'cpu' device has no engine" in note for note in magi_train.report(module).notes)


def test_an_impossible_budget_tells_to_offload(unlimited, engine):
    model, free, _ = unlimited
    _, step = prepared(copy.deepcopy(model), between(free, 0.45), offload=False)
    with pytest.raises(MagiError, match=r"at least .* Config\(offload_activations=True\)"):
        step(tokens(0, 16) % 32)
    module, step = prepared(copy.deepcopy(model), between(free, 0.45))
    step(tokens(0, 16) % 32).backward()
    assert plan_of(module)["planned_gib"] <= between(free, 0.45)


def test_offload_without_a_budget_is_an_error():
    with pytest.raises(ValueError, match=r"memory_budget_gib is None, .* set memory_budget_gib to"):
        Config(offload_activations=True)


class Engine:
    """Stands for torch.cuda: streams that do at once what they are told, events that wait."""

    def __init__(self):
        self.waited, self.finished = [], False

    def Stream(self, device):
        return self

    def current_stream(self, device):
        return self

    def stream(self, stream):
        return contextlib.nullcontext()

    def wait_stream(self, other):
        pass

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waited.append(event)

    def query(self):
        return self.finished

    def synchronize(self):
        self.finished = True


def test_copies_are_held_until_they_are_done(monkeypatch):
    """Also after an error, when nobody waits for them any more; then the next copy lets them go."""
    cuda = Engine()
    monkeypatch.setattr(copies.torch, "cuda", cuda)
    monkeypatch.setattr(copies, "_streams", {})
    monkeypatch.setattr(copies, "_flying", {})
    device = torch.device("cpu")

    def begin():
        x = torch.randn(8)
        host = torch.empty(8)
        copies._begin(x, host, "out", device)
        return x, host

    x, host = begin()
    assert torch.equal(host, x)
    assert copies._arrived(host, x) is host
    assert len(cuda.waited) == 1
    assert not copies._flying
    lost, forgotten = begin()
    memory = weakref.ref(lost.untyped_storage()), weakref.ref(forgotten.untyped_storage())
    del lost, forgotten
    x, host = begin()
    assert all(ref() is not None for ref in memory), "the copy may still run"
    cuda.finished = True
    begin()
    assert not any(ref() for ref in memory)
    assert copies._arrived(host, x) is host
    assert len(cuda.waited) == 1, "it was seen to be done"


def test_the_users_hooks_see_what_has_arrived(monkeypatch):
    """`save_on_cpu` copies what is saved, on the host, as soon as the forward has ended."""
    cuda = Engine()
    monkeypatch.setattr(copies.torch, "cuda", cuda)
    monkeypatch.setattr(copies, "_streams", {})
    monkeypatch.setattr(copies, "_flying", {})
    for hooked in (False, True):
        x, host = torch.randn(8), torch.empty(8)
        copies._begin(x, host, "out", x.device)
        with contextlib.ExitStack() as stack:
            if hooked:
                same = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
                stack.enter_context(same)
            copies._arrived(host, x)
        assert cuda.finished == hooked


def test_a_host_without_memory_says_so(monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    class OnDevice:
        device = torch.device("cuda")
        shape, dtype, nbytes = (4, 4), torch.float32, 3 * 2**20

        def stride(self):
            return (4, 1)

    monkeypatch.setattr(copies.torch, "empty_strided", refused)
    with pytest.raises(MagiError, match=r"no 3 MiB of pinned memory .*offload_activations=False"):
        copies._send._init_fn(OnDevice())


def test_a_container_limits_the_room(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    monkeypatch.setattr(hardware, "Path", lambda _, name: tmp_path / name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hardware.host_room_bytes(8) == 2**30 * hardware.HOST_SHARE // 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert hardware.host_room_bytes(8) == 2**30 * hardware.HOST_SHARE // 8
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.host_room_bytes(1) > 2**29


def two_ranks_offload(rank, world_size):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_memory, "speed_of", lambda _: FAST)
        torch.manual_seed(0)
        model = Steady()
        plain = copy.deepcopy(model)
        module, step = prepared(model, 0.0006, lowering="inductor")
        step(tokens(rank, 16) % 32).backward()
    for each in range(world_size):
        batch = tokens(each, 16) % 32
        (loss_of(plain(input_ids=batch, labels=batch)) / world_size).backward()
    rows = {row.name: row.plan for row in magi_train.report(module).rows}
    off = difference(gradients(model), gradients(plain)) / tolerance(torch.float32)
    return off, rows["fit_budget"]["offloaded"], rows["place_collectives"]["gradients"]


@pytest.mark.full
def test_copies_and_collectives_in_one_generated_backward(two_ranks):
    for off, offloaded, reduced in values(two_ranks(two_ranks_offload)):
        assert off <= 1
        assert offloaded
        assert reduced == 6


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "bert", "resnet"])
def test_library_models(name):
    make, batch = MODELS[name]
    model, given = make(), batch(0)
    slow_device = Speed(flops=1e7, bytes=1e12, host=1e7)  # what takes 200 bytes may wait
    found = capture(lambda: loss_of(model(**given)), speed=slow_device, room_bytes=PLENTY)
    row = found.row
    _, want = traced_peak(*found.cut(row.default))
    moving = [plan for plan in row.plans if plan.moved]
    assert moving
    for plan in moving[:: max(1, len(moving) // 6)]:
        cut, moves = found.cut_and_move(plan)
        assert set(moves.nodes) == plan.moved
        peak, gradients = traced_peak(*cut)
        assert simulate(*cut, fused=False).peak == pytest.approx(peak, rel=TOLERANCE)
        assert row.timeline(plan).peak == pytest.approx(peak, rel=2 * GUESS)  # little is left
        assert same(gradients, want)


def test_what_comes_back_is_the_memory_that_the_copy_left_in(engine):
    """Generated code that copied it on the host would read it before it has arrived."""
    torch.manual_seed(0)
    module, step = prepared(llama(vocab_size=32), 0.0009, lowering="inductor")
    batch = tokens(0, 16) % 32
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        step(batch).backward()
    with Recorded() as recorded:
        loss = step(batch)
        left = {ref().data_ptr() for ref in recorded.made if ref() is not None}
        recorded.made.clear()
        loss.backward()
    plan = plan_of(module)
    assert any("attention" in kind for kind in plan["offloaded"]), "whose strides are not in order"
    assert len(left) == sum(plan["offloaded"].values())
    assert recorded.fetched == left


class Waited(Recorded):
    """Which memory each copy reads, and which is held until it is done."""

    def __init__(self):
        super().__init__()
        self.read, self.held = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in (SEND, FETCH):
            self.read[result.data_ptr()] = (args[0], result)  # both stay: no address comes twice
        elif func is ARRIVED:
            self.held[args[0].data_ptr()] = args[1].data_ptr()
        return result


def test_what_is_held_until_a_copy_is_done_is_what_it_reads(engine):
    """An embedding is computed where it is read: each op would get another copy of it."""
    torch.manual_seed(0)
    module, step = prepared(llama(vocab_size=32), 0.0009, lowering="inductor")
    batch = tokens(0, 16) % 32
    with torch._inductor.config.patch(fx_graph_cache=False):
        step(batch).backward()
    with Waited() as waited:
        step(batch).backward()
    assert "aten.embedding.default" in plan_of(module)["offloaded"]
    assert waited.held == {copy: source.data_ptr() for copy, (source, _) in waited.read.items()}


@pytest.mark.full
def test_blocks_of_a_region_offload(engine):
    torch.manual_seed(0)
    model = llama(num_hidden_layers=4, vocab_size=32)
    batch = tokens(0, 16) % 32
    results = {}
    for offload, budget in ((False, 1.0), (True, 0.00125)):
        module, step = prepared(copy.deepcopy(model), budget, offload=offload, tier="region")
        step(batch).backward()
        results[offload] = plan_of(module), gradients(module)
    (free, want), (plan, got) = results[False], results[True]
    assert not free["offloaded"]
    assert plan["offloaded"]
    assert plan["planned_gib"] <= 0.00125
    assert all(torch.equal(got[name], g) for name, g in want.items())
