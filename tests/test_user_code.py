"""What user code does in and between steps trains as without us: the same loop, twice."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import magi_train
from magi_train import Config
from magi_train.core import compat, device_graphs
from magi_train.core.errors import CaptureError, SecondDerivativeError
from magi_train.memory import remat
from tests.close import difference, tolerance
from tests.fake_graphs import FakeGraphs

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
        if step == 3:
            handles.pop().remove()
            handles.append(model[0].register_forward_hook(lambda m, args, out: out / 2))
        if step == 4:
            handles.pop().remove()

    error, _ = beside_plain(mlp, no_code(tier), between=between)
    assert error < LIMIT
    assert graphs() == 3  # without a hook, and with each


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


class CountsInBuffers(nn.Module):
    """Writes to buffers, and multiplies with what it has read from them, a view too."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 4)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rows", torch.ones(4))

    def forward(self, x):
        self.step += 1
        rows = self.rows.unsqueeze(0) * 2
        self.rows += 1
        return (self.body(x) * rows).sin() / self.step


class ComparesWithAQueue(nn.Module):
    """Takes products with a copy of a buffer, then writes some of its results there, as MoCo."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 4)
        self.register_buffer("queue", torch.randn(4, 12))

    def forward(self, x):
        found = self.body(x)
        scores = found @ self.queue.clone().detach()
        self.queue[:, : len(x)] = found.detach().t()
        return scores[:, :4]


@pytest.mark.parametrize("tier", ["graph", "region"])
@pytest.mark.parametrize("lowering", ["inductor", "aot_eager"])
@pytest.mark.parametrize("budget", [None, 1.0])
@pytest.mark.parametrize("kind", [CountsInBuffers, ComparesWithAQueue])
def test_the_backward_does_not_read_buffers_that_the_forward_has_written_to(
    kind, budget, lowering, tier
):
    torch.manual_seed(0)
    plain = kind()
    twin = copy.deepcopy(plain)
    config = Config(tier=tier, lowering=lowering, memory_budget_gib=budget, progress=False)
    prepared = magi_train.prepare(twin, config=config)
    for step in range(2):
        for model in (plain, prepared):
            model.zero_grad()
            squares(model, *batch(step)).backward()
        gradients = ({n: p.grad for n, p in m.named_parameters()} for m in (twin, plain))
        assert difference(*gradients) < LIMIT


class ReadsInItsBackward(torch.autograd.Function):
    """A product with a buffer, in the backward alone."""

    @staticmethod
    def forward(ctx, x, buffer):
        ctx.save_for_backward(buffer)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


class OnlyTheBackwardReads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 4)
        self.register_buffer("rows", torch.full((4,), 3.0))

    def forward(self, x):
        found = ReadsInItsBackward.apply(self.body(x), self.rows.clone())
        self.rows.copy_(found.detach()[0])
        return found


class Checkpoints(nn.Module):
    """BatchNorm in a checkpointed function, which PyTorch runs, and counts, twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [OnlyTheBackwardReads, Checkpoints])
def test_a_backward_that_alone_reads_what_the_forward_has_written_to_is_not_compiled(kind):
    error, report = beside_plain(kind, no_code())
    assert error < LIMIT
    assert report.tier == "eager"
    assert "the backward would read a buffer after the forward has written to it" in report.reason
    for forced in ("graph", "region"):
        prepared = magi_train.prepare(kind(), config=no_code(forced))
        with pytest.raises(CaptureError, match=r"written to .*only Config\(tier='eager'\)"):
            squares(prepared, *batch(0))
    with pytest.raises(CaptureError, match="memory_budget_gib needs a captured graph"):
        squares(magi_train.prepare(kind(), config=no_code(memory_budget_gib=1)), *batch(0))


class Averages(nn.Module):
    """Adds a factor times a matrix product: to a buffer, as codebooks do, and to its result."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 4)
        self.register_buffer("mean", torch.randn(4, 4))

    def forward(self, x):
        found = self.body(x)
        self.mean.mul_(0.9).add_(found.detach().t() @ found.detach(), alpha=0.1)
        return torch.add(x.sin() @ self.body.weight.t(), found @ self.mean.clone(), alpha=0.3)


class Anneals(nn.Module):
    """Keeps a float that changes in each step, and is an argument that only numbers can be."""

    def __init__(self):
        super().__init__()
        self.body, self.slope = mlp(), 1.0

    def forward(self, x):
        self.slope = self.slope * 0.9
        return F.leaky_relu(self.body(x), self.slope) / self.slope


class BreaksBehindACopy(nn.Module):
    """Takes products with a copy of a buffer, and writes there behind what cannot be captured."""

    def __init__(self, through_data):
        super().__init__()
        self.body, self.through_data = nn.Linear(8, 4), through_data
        self.head = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 4))
        self.register_buffer("queue", torch.randn(4, 4))

    def forward(self, x):
        scores = self.head(self.body(x) @ self.queue.clone().detach())
        torch._dynamo.graph_break()
        queue = self.queue.data if self.through_data else self.queue
        queue.mul_(0.5)
        return scores


@pytest.mark.parametrize("lowering", ["inductor", "aot_eager"])
@pytest.mark.parametrize(
    "make",
    [
        Averages,
        Anneals,
        functools.partial(BreaksBehindACopy, False),
        functools.partial(BreaksBehindACopy, True),
    ],
)
@pytest.mark.parametrize("budget", [None, 1.0])
def test_what_generated_code_reads_is_what_the_model_reads(make, lowering, budget, monkeypatch):
    monkeypatch.setattr(remat.Row, "choose", lambda row, peak, *_: row.frontier(peak)[-1])
    config = Config(lowering=lowering, memory_budget_gib=budget, progress=False)
    error, _ = beside_plain(make, config)
    assert error < LIMIT


def test_settings_of_dynamo_hold_for_our_calls_only():
    ours = {**compat.WHILE_COMPILING, "skip_nnmodule_hook_guards": False}
    before = {n: getattr(compat.dynamo_config, n) for n in ours}
    seen = []

    def look(gm, inputs):
        seen.append({n: getattr(compat.dynamo_config, n) for n in before})
        return gm.forward

    torch.compile(lambda x: x + 1, backend=look)(torch.ones(2))
    compat.call_captured(torch.compile(lambda x: x + 2, backend=look), [torch.ones(2)], {})
    assert seen == [before, ours]
    assert before == {n: getattr(compat.dynamo_config, n) for n in before}


def penalized(model, x, y):
    """A loss with the gradient of a gradient."""
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, y) + slope.square().sum()


@pytest.mark.parametrize("tier", ["auto", "region", "eager"])
def test_a_gradient_penalty_in_the_step(tier):
    if tier != "eager" and compat.torch_version() < (2, 13):
        # requires_grad_() ends the capture in front of the gradient, and regions have no second one
        with pytest.raises(magi_train.MagiError, match=r"Config\(tier='eager'\)"):
            beside_plain(mlp, no_code(tier), penalized, whole=True)
        return
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


class Adjustable(nn.Module):
    """Reads attributes that a training loop changes."""

    def __init__(self):
        super().__init__()
        self.body, self.factor, self.shift, self.last = mlp(), 1.0, torch.zeros(4), None

    def forward(self, x):
        out = self.body(x) * self.factor + self.shift
        out = out if self.last is None else self.last(out)
        return 2 * out if self.training else out


@pytest.mark.parametrize("tier", ["graph", "region", "eager"])
@pytest.mark.parametrize("whole", [False, True])
def test_attributes_that_are_set_on_the_prepared_module_reach_the_forward(tier, whole):
    steps = iter(range(STEPS))

    def between(model, step):
        model.factor = 1.0 / (step + 1)
        model.shift = torch.ones(4) * step
        if step == 2:
            model.last = nn.Tanh()  # in place of None, which is no submodule
        if step == 3:
            del model.last
            model.last = None
        model.training = step % 2 == 0

    torch.manual_seed(0)
    plain = Adjustable()
    prepared = magi_train.prepare(twin := copy.deepcopy(plain), config=no_code(tier))

    def step(x, y):
        return squares(prepared, x, y)

    ours = magi_train.prepare_step(step, prepared) if whole else step
    want = train(plain, lambda *b: squares(plain, *b), lambda i: between(plain, i))
    got = train(twin, ours, lambda _: between(prepared, next(steps)))
    assert difference(got, want) < LIMIT
    assert prepared.training is twin.training is True


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_forward_mode_derivatives_are_taken_uncompiled(tier):
    """Compiled graphs have none: torch then asks for a jvp of its own function."""

    def sloped(model, x, y):
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(x, torch.ones_like(x)))
            slope = forward_ad.unpack_dual(out).tangent
        return squares(model, x, y) + slope.square().sum()

    def blocks():
        return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), mlp())

    error, report = beside_plain(blocks, no_code(tier), sloped)
    assert error < LIMIT
    assert report.tier == tier


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


def test_sizes_that_happen_to_equal_another_are_not_taken_for_it():
    """4 rows of 16 are as many as the weights of 16 by 4; three forwards before a backward."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    ours = magi_train.prepare(twin, config=Config(progress=False))
    before = graphs()
    inputs = [torch.randn(n, 8) for n in (6, 4, 5, 8)]
    for each in (model, ours):
        sum(each(x).square().sum() for x in inputs).backward()
    assert graphs() - before == 2, "one for 6 rows, and one for any number"
    got, want = ({n: p.grad for n, p in m.named_parameters()} for m in (twin, model))
    assert difference(got, want) < tolerance(torch.float32)
    assert not magi_train.report(ours).notes


class Unmarked(torch.autograd.Function):
    """Trips an assertion in Dynamo (2.13): it marks none of its results."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_non_differentiable()
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Marks(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.wrong = False

    def forward(self, x):
        assert not self.wrong, "mine"
        return Unmarked.apply(self.l(x))


def test_an_assertion_of_dynamos_falls_to_a_lower_tier():
    model, x = Marks(), torch.randn(2, 4)
    twin = copy.deepcopy(model)
    ours = magi_train.prepare(twin)
    for each in (model, ours):
        each(x).sum().backward()
    assert torch.equal(twin.l.weight.grad, model.l.weight.grad)
    with pytest.raises(CaptureError, match="'region', but Marks cannot be captured"):
        magi_train.prepare(Marks(), config=Config(tier="region"))(x)
    twin.wrong = True
    with pytest.raises(AssertionError, match="mine"):
        ours(x)


class Picture(torch.Tensor):
    """A kind of tensor with methods of its own."""

    def mirrored(self):
        return self.flip(-1)


@pytest.mark.parametrize("tier", ["auto", "region"])
def test_another_kind_of_tensor_stays_one(tier):
    model, x = mlp(), torch.randn(2, 8).as_subclass(Picture)
    twin = copy.deepcopy(model)
    ours = magi_train.prepare(twin, config=no_code(tier))
    if tier == "region":
        with pytest.raises(CaptureError, match=r"is a Picture, .*as_subclass\(torch.Tensor\)"):
            ours(x)
        return
    for each in (model, ours):
        each(x).mirrored()[0].sum().backward()
    assert torch.equal(twin[0].weight.grad, model[0].weight.grad)
    assert magi_train.report(ours).tier == "eager"


class Part(nn.Module):
    """Writes to buffers, draws random numbers and counts; may trip Dynamo after that."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.wrong, self.calls = False, 0

    def forward(self, x):
        x = self.body(x)
        self.calls += 1
        torch._dynamo.graph_break()
        return Unmarked.apply(x) if self.wrong else x.sin()


class InTurn(nn.Module):
    """Holds its parts in no container, so that they are not taken for repeated blocks."""

    def __init__(self, *parts):
        super().__init__()
        self.first, self.second = parts

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("kind", [nn.Sequential, InTurn])
@pytest.mark.parametrize("since", [0, 2])
def test_what_ran_before_a_failure_to_compile_does_not_run_again(kind, since):
    torch._dynamo.reset()  # of a class that is compiled often, no more is compiled
    models = []

    def between(model, step):
        torch.manual_seed(step)
        models.append(model)
        list(model.children())[1].wrong = step >= since

    error, report = beside_plain(
        lambda: kind(Part(), Part()),
        no_code(),
        loss=lambda model, x, y: model(x).square().mean(),
        between=between,
    )
    assert error < LIMIT
    assert {part.calls for model in models for part in model.children()} == {STEPS}
    assert report.tier == ("region" if since else "eager")
    notes = [note.split(":")[0] for note in report.notes if "Unmarked.apply" in note]
    once, then = f"some code of {kind.__name__} ran uncompiled", "runs uncompiled from now on"
    assert notes == ([once, f"{kind.__name__} {then}"] if since else [])


class Block(nn.Module):
    """May trip Dynamo behind what is compiled."""

    def __init__(self):
        super().__init__()
        self.body, self.wrong = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), False

    def forward(self, x):
        x = self.body(x)
        torch._dynamo.graph_break()
        return (Unmarked.apply(x) if self.wrong else x.sin()).exp()


class Checkpointing(nn.Module):
    """Blocks that a checkpoint runs again."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("since", [0, 1])
def test_a_checkpoint_runs_again_what_the_forward_ran(since):
    torch._dynamo.reset()

    def between(model, step):
        model.blocks[1].wrong = step >= since

    error, report = beside_plain(
        Checkpointing,
        no_code(),
        loss=lambda model, x, y: model(x).square().mean(),
        between=between,
    )
    assert error < LIMIT
    assert report.tier == ("region" if since else "eager")


def test_a_refusal_leaves_no_compiled_blocks_behind():
    torch._dynamo.reset()
    model = Checkpointing()
    for block in model.blocks:
        block.wrong = True
    with pytest.raises(CaptureError, match="cannot be captured"):
        magi_train.prepare(model, config=no_code("region"))(torch.ones(2, 8))
    assert not any(block._compiled_call_impl for block in model.blocks)


def test_blocks_are_not_compiled_for_evaluation():
    ours = magi_train.prepare(Checkpointing(), config=no_code("region"))
    ours(torch.ones(2, 8)).sum().backward()
    compiled = dict(torch._dynamo.utils.counters["frames"])
    with torch.no_grad():
        ours(torch.ones(3, 8))
    assert torch._dynamo.utils.counters["frames"] == compiled


def test_a_failure_without_a_text_is_told_by_its_kind():
    """As an assertion of Dynamo's in torch 2.11."""
    where = 'from user code:\n   File "model.py", line 7, in forward\n    return f(x)'
    text = compat.capture_failure_text(AssertionError(f"\n\n{where}\n"))
    assert text == 'AssertionError at File "model.py", line 7, in forward: return f(x)'


class Heads(nn.Module):
    """Returns two heads; a loss may use one."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))

    def forward(self, x):
        hidden = self.trunk(x)
        return [head(hidden) for head in self.heads]


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_a_head_that_no_loss_uses_gets_no_gradient(tier):
    """Zeros instead would let AdamW decay its weights."""

    def one_head(model, x, y):
        return F.mse_loss(model(x)[0], y)

    error, report = beside_plain(Heads, no_code(tier), one_head)
    assert error < LIMIT
    row = next(row for row in report.rows if row.name == "unused_outputs")
    assert sorted(outputs for _, outputs in row.plan["inputs"]) == [[0], [0], [1], [1]]


@pytest.mark.parametrize("both_until", [0, 3])
def test_a_head_that_no_loss_uses_gets_no_gradient_in_replays(both_until, monkeypatch):
    """Whether the recorded step has used it, or not."""
    monkeypatch.setitem(device_graphs.makers, "cpu", FakeGraphs)
    number = iter(2 * list(range(STEPS)))

    def one_head(model, x, y):
        heads = model(x)
        used = heads if next(number) < both_until else heads[:1]
        return sum(F.mse_loss(head, y) for head in used)

    config = Config(cuda_graphs="on", progress=False)
    error, report = beside_plain(Heads, config, one_head)
    assert error < LIMIT
    assert report.measured["cuda_graph_replays"] >= 2


class Chain(nn.Module):
    """Blocks of which one returns a view of what it was given, and a head that no loss uses."""

    class Block(nn.Module):
        """One of them."""

        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x.t(), torch.tanh(self.used(x)), self.unused(x.detach())

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Chain.Block() for _ in range(2))

    def forward(self, x):
        _, x, _ = self.blocks[0](x)
        view, x, _ = self.blocks[1](x)
        return view.sum() + x.sum()


def test_a_view_of_an_argument_is_not_taken_for_what_the_graph_made():
    error, _ = beside_plain(Chain, no_code("region"), lambda model, x, y: model(x))
    assert error < LIMIT


def test_heads_in_turns_get_gradients_in_turns():
    turn = iter(2 * list(range(STEPS)))

    def in_turns(model, x, y):
        return F.mse_loss(model(x)[next(turn) % 2], y)

    error, _ = beside_plain(Heads, no_code(), in_turns)
    assert error < LIMIT
    assert graphs() == 1


class Wavy(nn.Module):
    """Saves what generated code writes over in the backward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return torch.sin(self.b(F.gelu(self.a(x))))


@pytest.mark.parametrize("lowering", ["inductor", "aot_eager"])
def test_one_forward_and_two_backwards(lowering):
    """`retain_graph=True` for the first of two losses."""
    torch.manual_seed(0)
    plain = Wavy()
    twin = copy.deepcopy(plain)
    config = Config(lowering=lowering, progress=False)
    for step in range(2):  # the compiler looks at the first backward in another way
        for model in (plain, twin):
            prepared = magi_train.prepare(twin, config=config) if model is twin else model
            model.zero_grad()
            out = prepared(batch(step)[0])
            out.abs().sum().backward(retain_graph=True)
            out.square().sum().backward()
        gradients = ({n: p.grad for n, p in m.named_parameters()} for m in (twin, plain))
        assert difference(*gradients) < LIMIT


@pytest.mark.parametrize("lowering", ["inductor", "aot_eager"])
def test_two_backwards_of_a_forward_whose_argument_is_expanded(lowering):
    """One element of memory is many of the tensor: nothing may be put back there."""

    class Masked(Wavy):
        def forward(self, x, mask):
            return torch.sin(self.b((F.gelu(self.a(x)) * mask).exp()))

    torch.manual_seed(0)
    model = Masked()
    mask = torch.rand(1, 16).expand(6, 16)
    prepared = magi_train.prepare(model, config=Config(lowering=lowering, progress=False))
    out = prepared(batch(0)[0], mask).sum()
    out.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    out.backward()
    assert difference({n: p.grad for n, p in model.named_parameters()}, first) == 0


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_a_second_derivative_of_what_is_compiled_is_refused(tier):
    model = magi_train.prepare(mlp(), config=no_code(tier))
    with pytest.raises(SecondDerivativeError, match=r"prepare_step.*Config\(tier='eager'\)"):
        penalized(model, *batch(0))


class Penalized(nn.Module):
    """A loss with a gradient penalty, behind a layer that counts batches."""

    def __init__(self):
        super().__init__()
        self.norm, self.body = nn.BatchNorm1d(8), mlp()

    def forward(self, x):
        return penalized(self.body, self.norm(x), 0.0)


def test_second_derivatives_between_graphs_run_uncompiled(monkeypatch):
    """Where Dynamo does not capture torch.autograd.grad: torch before 2.13."""
    monkeypatch.setitem(compat.WHILE_COMPILING, "trace_autograd_ops", False)
    monkeypatch.setattr(F, "mse_loss", lambda x, y: (x - y).square().mean())
    error, report = beside_plain(Penalized, no_code(), lambda model, x, y: model(x))
    assert error < LIMIT
    assert report.tier == "eager"


class Grows(nn.Module):
    """Appends to a list of its own, which Dynamo compiles for one length each."""

    def __init__(self):
        super().__init__()
        self.body, self.seen = mlp(), []

    def forward(self, x):
        out = self.body(x)
        self.seen.append(out.detach().mean())
        return out


@compat.dynamo_config.patch(recompile_limit=2)
def test_what_changes_in_every_step_is_named_and_given_up(caplog):
    torch.manual_seed(0)
    plain = Grows()
    twin = copy.deepcopy(plain)
    prepared = magi_train.prepare(twin, config=no_code())
    want = train(plain, lambda *b: squares(plain, *b), steps=8)
    caplog.clear()
    got = train(twin, lambda *b: squares(prepared, *b), steps=8)
    assert difference(got, want) < LIMIT
    assert len(twin.seen) == 8
    notes = [note for note in magi_train.report(prepared).notes if "uncompiled" in note]
    assert notes[0].startswith("some steps of Grows ran uncompiled: compiled 2 times")
    assert "seen) == 1" in notes[0]
    assert "self.seen.append" in notes[0]
    assert notes[1].startswith("Grows runs uncompiled from now on")
    assert len(notes) == 2
    ours = [r for r in caplog.records if r.name.startswith("magi_train")]
    assert len(ours) == 2  # not one in every step


class ScalesItsInput(nn.Module):
    """Has a part without gradients, in front of a line that cannot be captured."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        x = 2 * x + 1
        torch._dynamo.graph_break()
        return self.body(x)


def test_a_part_without_gradients_is_no_code_of_a_cache():
    error, report = beside_plain(ScalesItsInput, no_code())
    assert error < LIMIT
    assert report.tier == "region"
    assert not report.notes
