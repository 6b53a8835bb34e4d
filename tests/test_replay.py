"""Replay decisions on a fake device that really overwrites: every loop must equal the plain one."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train import Config
from magi_train.core import device_graphs
from magi_train.core.report import Report
from magi_train.core.slots import SMALL
from magi_train.replay import MAX_RECORDINGS, REPLAYS, TIMED, WARM, Replayer, ReplayMemory, weakly
from tests.fake_graphs import FakeGraphs

WIDE = SMALL // 4 // 8 + 8  # logits [8, WIDE] of float32 are no small output


class Norm(nn.Module):
    """Statistics of two dtypes that a forward writes, and reads before it does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        centred = x - self.mean
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.steps += 1
        return centred


class Net(nn.Module):
    """Dropout, written buffers, a small loss, and logits that may be wide."""

    def __init__(self, width=6, dropout=0.5):
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.norm = Norm()
        self.outer = nn.Linear(5, width)
        self.dropout = dropout

    def forward(self, x, y):
        hidden = F.dropout(self.norm(self.inner(x)), self.dropout, self.training)
        logits = self.outer(hidden)
        return F.cross_entropy(logits, y), logits


class Harness:
    """A model whose forward is replayed as a captured graph is: parameters are its inputs."""

    def __init__(self, model, measure=False, ready=lambda: True, function=None):
        self.model = model
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        names = self.names = list(state)
        self.device = FakeGraphs(buffers=model.buffers())
        self.report = Report()
        self.memory = ReplayMemory(self.device, self.report)

        def compiled(*args):
            given = dict(zip(names, args, strict=False))
            call = function or (lambda m, a: torch.func.functional_call(m, given, tuple(a)))
            return call(model, args[len(names) :])

        self.replayer = Replayer(
            compiled, frozenset(range(len(self.names))), self.memory,
            measure=measure, ready=ready, report=self.report,
        )  # fmt: skip

    def __call__(self, *batch):
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return self.replayer([*state.values(), *batch])

    @property
    def replays(self):
        return int(self.report.measured.get(REPLAYS, 0))


def batch(i, rows=8, width=6):
    g = torch.Generator().manual_seed(i)
    return torch.randn(rows, 4, generator=g), torch.randint(0, width, (rows,), generator=g)


def compare(loop, model=None, replays=None, **options):
    """Run `loop(call, model, optimizer)` plainly and replayed; everything must be bitwise equal."""
    model = model or Net()
    results, harness = [], None
    for replayed in (False, True):
        mine = copy.deepcopy(model)
        call = mine
        if replayed:
            call = harness = Harness(mine, **options)
        torch.manual_seed(0)
        seen = loop(call, mine, torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9))
        gradients = [p.grad for p in mine.parameters() if p.grad is not None]
        results.append([*seen, *mine.state_dict().values(), *gradients, torch.rand(3)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    if replays is not None:
        assert harness.replays == replays, harness.report
    return harness


STEPS = 8
ALL = STEPS - WARM  # replays, where nothing forbids one


def plain_loop(call, model, optimizer, width=6):
    losses = []
    for i in range(STEPS):
        loss, _ = call(*batch(i, width=width))
        losses.append(loss)  # with its graph, as people do
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_plain_loop_replays_with_dropout_buffers_and_losses_kept():
    harness = compare(plain_loop, replays=ALL)
    assert harness.device.captures == 2
    assert harness.device.replays == 2 * ALL


def test_gradients_are_handed_over_without_a_copy():
    harness = Harness(Net())
    for i in range(WARM + 1):
        harness.model.zero_grad()
        harness(*batch(i))[0].backward()
    slots = harness.replayer.recording.gradients
    for p, slot in zip(harness.model.parameters(), slots, strict=True):
        assert p.grad.data_ptr() == slot.tensor.data_ptr()


def test_outputs_that_live_on_are_kept_and_copied_from_then_on():
    def loop(call, model, optimizer):
        kept = []
        for i in range(STEPS):
            loss, logits = call(*batch(i, width=WIDE))
            kept.append(logits.detach()[:, ::1000])  # a view holds the memory as well
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return kept

    harness = compare(loop, Net(WIDE), replays=ALL - 1)  # one call found them alive
    assert harness.device.captures == 4  # what is held for long keeps its memory: other for us
    assert "outputs that outlive" in str(harness.report)


def test_the_variable_of_the_last_output_is_enough():
    def loop(call, model, optimizer):
        for i in range(STEPS):
            out = call(*batch(i, width=WIDE))
            out[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        return out

    compare(loop, Net(WIDE), replays=ALL - 1)


def test_accumulation_copies_the_first_gradients_only():
    def loop(call, model, optimizer):
        losses = []
        for i in range(3 * STEPS):
            loss = call(*batch(i))[0]
            (loss / 3).backward()
            losses.append(loss.detach())
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    harness = compare(loop)
    assert harness.replays >= 3 * STEPS - WARM - 1
    assert "gradients that outlive" in str(harness.report)


def test_gradients_that_stay_are_added_into():
    def loop(call, model, optimizer):
        for i in range(STEPS):
            call(*batch(i))[0].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return []

    compare(loop, replays=ALL)  # the first gradients came from plain calls


def test_gradients_that_the_user_keeps():
    def loop(call, model, optimizer):
        kept = []
        for i in range(STEPS):
            call(*batch(i))[0].backward()
            kept.append(model.inner.weight.grad)
            optimizer.step()
            optimizer.zero_grad()
        return kept

    assert compare(loop, replays=ALL - 1).device.captures == 4


def test_two_forwards_before_their_backwards():
    def loop(call, model, optimizer):
        seen = []
        for i in range(STEPS):
            first, second = call(*batch(i))[0], call(*batch(i + 100))[0]
            if i % 2:
                (first + 2 * second).backward()
            else:
                second.backward()
                first.backward()
            seen += [first.detach(), second.detach()]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    harness = compare(loop)
    assert STEPS - WARM <= harness.replays <= STEPS


def test_a_forward_without_backward_between():
    def loop(call, model, optimizer):
        seen = []
        for i in range(STEPS):
            forgotten = call(*batch(i + 100))[0].detach()
            loss = call(*batch(i))[0]
            loss.backward()
            seen += [forgotten, loss.detach()]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    assert compare(loop).replays >= 2 * ALL


def test_graphs_make_room_for_a_plain_call():
    """The second forward of a pair runs plainly; there is no memory for it beside the graphs."""

    def loop(call, model, optimizer):
        for i in range(STEPS):
            if i == STEPS - 3 and isinstance(call, Harness):
                call.device.free = -1
            first = call(*batch(i))[0]
            second = call(*batch(i + 100))[0] if i >= STEPS - 3 else 0.0
            (first + second).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [first.detach()]

    harness = compare(loop)
    assert harness.device.replays == 2 * (ALL - 3) + 2
    assert "no room for a plain call beside the graphs" in str(harness.report)


def test_evaluation_between():
    def loop(call, model, optimizer):
        seen = []
        for i in range(STEPS):
            call(*batch(i))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                seen.append(call(*batch(50))[0])
        return seen

    compare(loop, replays=ALL)


def test_parameters_that_move_are_recorded_again_some_times():
    def loop(call, model, optimizer):
        for i in range(12):
            call(*batch(i))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            if i > 2:
                model.inner.weight.data = model.inner.weight.data.clone()
        return []

    harness = compare(loop)
    assert harness.device.captures == 2 * MAX_RECORDINGS
    assert "parameters or buffers move: recorded 3 times" in str(harness.report)


def test_a_failed_capture_loses_nothing():
    model = Net()

    def loop(call, model, optimizer):
        if isinstance(call, Harness):
            call.device.fail = RuntimeError("operation not permitted when stream is capturing")
        return plain_loop(call, model, optimizer)

    harness = compare(loop, model, replays=0)
    assert harness.device.captures == 1  # not tried again
    assert "capture failed: RuntimeError: operation not permitted" in str(harness.report)


def test_a_failed_capture_of_another_form_voids_the_graphs_before():
    """They would draw from random numbers of their own, or refuse to run."""
    model = Net()
    one, two, state = two_forms(model)

    def run(form, i):
        form(*batch(i))[0].backward()
        model.zero_grad()

    for i in range(WARM + 1):
        run(one, i)
    one.device.fail = RuntimeError("operation not permitted when stream is capturing")
    for i in range(WARM + 1):
        run(lambda *b: two([*state, *b]), i)
    one.device.fail, old = None, one.replayer.recording
    run(one, 0)
    assert one.replayer.recording is not old
    assert one.replays == 2


def test_a_backward_that_keeps_its_graph_computes_it_again():
    def loop(call, model, optimizer):
        for i in range(STEPS):
            loss = call(*batch(i))[0]
            if i == 5:
                loss.backward(retain_graph=True)
                # the buffers moved on once, not twice, and the mask is the first one's
                (2 * loss).backward()
            else:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(loop, replays=ALL)


def test_a_graph_retained_from_the_start_is_never_recorded():
    def loop(call, model, optimizer):
        for i in range(STEPS):
            loss = call(*batch(i))[0]
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    harness = compare(loop, replays=0)
    assert "retain_graph" in str(harness.report)


def test_a_second_backward_without_the_graph_is_an_error():
    harness = Harness(Net())
    for i in range(WARM + 1):
        loss = harness(*batch(i))[0]
        loss.backward()
    assert harness.replays == 1
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_gradients_of_other_outputs_than_before():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x, y):
            return self.a(x).square().mean(), self.b(x).square().mean()

    def loop(call, model, optimizer):
        for i in range(STEPS):
            one, other = call(*batch(i))
            (one + other if i == 5 else one).backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(loop, Two(), replays=ALL)


def test_of_several_outputs_only_one_gets_a_gradient():
    def loop(call, model, optimizer):
        for i in range(STEPS):
            loss, logits = call(*batch(i))
            (logits.square().mean() if i % 2 else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(loop, replays=ALL)


def test_an_expanded_gradient():
    def loop(call, model, optimizer):
        for i in range(STEPS):
            call(*batch(i))[1].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(loop, replays=ALL)


def test_one_parameter_in_two_places_of_the_loss():
    def loop(call, model, optimizer):
        for i in range(STEPS):
            loss = call(*batch(i))[0] + model.outer.weight.square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(loop, replays=ALL)


def test_gradients_that_are_one_memory_are_told_apart():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x, y):
            return ((self.a + self.b) * x[0, :3]).square().sum(), y + 0

    def loop(call, model, optimizer):
        for i in range(STEPS):
            call(*batch(i))[0].backward()
            with torch.no_grad():
                model.a.grad.mul_(2)  # must not reach the other
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(loop, Sum(), replays=ALL)


def test_saved_tensor_hooks_see_a_plain_call():
    packed = []

    def loop(call, model, optimizer):
        for i in range(STEPS):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, i=i: packed.append(i) or x, lambda x: x
            ):
                loss = call(*batch(i))[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(loop, replays=0)
    assert set(packed) == set(range(STEPS))


def test_an_input_that_is_returned_is_the_callers_own():
    harness = Harness(Net(), function=lambda m, a: (m(*a)[0], a[0]))
    for i in range(STEPS):
        x, y = batch(i)
        loss, same = harness(x, y)
        loss.backward()
        assert same is x
    assert harness.replays == ALL


def test_another_stream_and_a_capture_of_the_users_run_plainly():
    harness = Harness(Net())
    for i in range(WARM + 1):
        harness(*batch(i))[0].backward()
        harness.model.zero_grad()
    harness.device.current = 1
    harness(*batch(9))[0].backward()
    harness.device.current, harness.device.capturing = 0, True
    harness(*batch(9))[0].backward()
    assert harness.replays == 1


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ([3], "is a number"),
        ([torch.zeros(2, device="meta")], "lies on meta"),
        ([torch.zeros(1).expand(3)], "repeats its memory"),
    ],
)
def test_refused_inputs(extra, why):
    harness = Harness(nn.Linear(4, 2), function=lambda m, a: (m(a[0]).sum(),))
    for i in range(STEPS):
        harness(batch(i)[0], *extra)[0].backward()
    assert harness.replays == 0
    assert why in str(harness.report)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, a: (m(a[0].add_(1)).sum(),), "writes input 2, which is no buffer"),
        (lambda m, a: (m(a[0]).sum(), a[0][:2]), "output 1 shares its memory"),
        (lambda m, a: (m(a[0]).sum(), torch.zeros(2, device="meta")), "output 1 is a Tensor on me"),
    ],
)
def test_refused_functions(function, why):
    harness = Harness(nn.Linear(4, 2), function=function)
    for i in range(STEPS):
        harness(batch(i)[0])[0].backward()
    assert harness.replays == 0
    assert why in str(harness.report)


@pytest.mark.parametrize(("replay_ms", "kept"), [(9.8, True), (9.95, False)])
def test_replaying_stays_only_if_it_pays(replay_ms, kept):
    def loop(call, model, optimizer):
        for i in range(WARM + 3 * TIMED + 6):
            call(*batch(i))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            if isinstance(call, Harness):
                call.device.now += replay_ms if call.replayer.recording else 10.0
        return []

    harness = compare(loop, measure=True)
    row = next(row for row in harness.report.rows if row.name == "cuda_graphs")
    assert row.plan["replayed"] is kept
    assert bool(harness.replayer.recording) is kept
    if kept:
        assert (row.plan["plain_ms"], row.plan["replay_ms"]) == (10.0, 9.8)
        assert harness.replays > TIMED + 3
    else:
        assert "9.95 ms a call replayed, 10.0 ms plainly" in row.plan["reason"]
        assert harness.device.pools  # its memory is given back


def test_nothing_is_recorded_before_the_settings_are_chosen():
    harness = Harness(Net(), ready=lambda: False)
    for i in range(STEPS):
        harness(*batch(i))[0].backward()
    assert harness.device.captures == 0


def two_forms(model):
    one = Harness(model)
    two = Replayer(
        one.replayer.compiled, frozenset(range(len(one.names))), one.memory,
        measure=False, ready=lambda: True, report=one.report,
    )  # fmt: skip
    return one, two, [*model.parameters(), *model.buffers()]


def test_what_is_held_is_overwritten_by_no_other_form():
    """Both lie in one pool: when the first one leaves its memory to the user, both move."""
    one, two, state = two_forms(Net(WIDE))
    for i in range(WARM + 1):
        for call in (one, lambda *b: two([*state, *b])):
            call(*batch(i))[0].backward()
            one.model.zero_grad()
    kept = one(*batch(0))[1].detach()
    old = two.recording
    for i in range(2):  # found once, held for long
        one(*batch(i))[0].backward()
        one.model.zero_grad()
    assert old.dropped
    assert one.device.pools
    two([*state, *batch(0)])[0].backward()
    assert two.recording is not old
    assert kept.isfinite().all()


def test_two_forms_share_one_watch():
    """The second form must not replay while the first one's forward waits."""
    model = Net(dropout=0.0)
    one, two, state = two_forms(model)
    for i in range(WARM + 1):
        one(*batch(i))[0].backward()
        model.zero_grad()
        two([*state, *batch(i)])[0].backward()
        model.zero_grad()
    assert one.replays == 2
    loss = one(*batch(0))[0]
    two([*state, *batch(1)])
    assert one.replays == 3
    loss.backward()


def test_what_dynamo_keeps_holds_no_recording():
    harness = Harness(Net())
    kept = weakly(harness.replayer)
    for i in range(WARM + 1):
        harness(*batch(i))[0].backward()
        harness.model.zero_grad()
    recording, model = weakref.ref(harness.replayer.recording), harness.model
    state = [*model.parameters(), *model.buffers()]
    harness.memory.clear()
    del harness
    gc.collect()
    assert recording() is None
    kept(*state, *batch(0))[0].backward()


# -- through prepare() -----------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    made = []
    monkeypatch.setitem(
        device_graphs.makers, "cpu", lambda device: made.append(FakeGraphs(device)) or made[-1]
    )
    return made


def test_a_prepared_model_replays(fake):
    """AOTAutograd's wrappers, its epilogue for buffers, a weight written before the backward."""
    model = Net()
    twin = copy.deepcopy(model)
    prepared = magi_train.prepare(
        twin, config=Config(lowering="aot_eager", tier="graph", cuda_graphs=True)
    )
    fake[0].buffers = list(twin.buffers())
    results = []
    for module in (model, prepared):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        results.append(plain_loop(module, module, optimizer))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    report = magi_train.report(prepared)
    assert report.measured[REPLAYS] == ALL, report
    assert twin.norm.steps == STEPS
    loss, _ = prepared(*batch(0))
    saved = {t.data_ptr() for t in loss.grad_fn.saved_tensors}
    assert twin.outer.weight.data_ptr() in saved  # on a device nothing else would notice
    with torch.no_grad():
        twin.outer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_reason_why_there_are_none():
    model = magi_train.prepare(Net(), config=Config(lowering="aot_eager", cuda_graphs="on"))
    model(*batch(0))[0].backward()
    assert "cuda_graphs: there are none on cpu" in str(magi_train.report(model))


def test_the_setting():
    assert Config(cuda_graphs=True).cuda_graphs == "on"
    assert Config(cuda_graphs=False).cuda_graphs == "off"
    with pytest.raises(ValueError, match="cuda_graphs must be one of"):
        Config(cuda_graphs="sometimes")
