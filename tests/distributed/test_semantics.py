"""What DDP users rely on beyond gradients of one forward: on two gloo ranks, against DDP."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import Config
from magi_train.core.world import World
from tests.close import difference, tolerance
from tests.models import MODELS, WIDTH, Small, UnusedFrozenTied, gpt2, tokens
from tests.ranks import run_ranks, values

LIMIT = tolerance(torch.float32, 64)
EAGER_CODE = Config(lowering="aot_eager")


def gradients(model):
    named = [(n.removeprefix("module."), p.grad) for n, p in model.named_parameters()]
    return {n: None if g is None else g.clone() for n, g in named}


def pair(model, config=EAGER_CODE):
    """Return the model under DDP and under magi-train."""
    ours = magi_train.prepare(copy.deepcopy(model), config=config)
    return DistributedDataParallel(model, find_unused_parameters=True), ours


def same_gradients(rank, world_size, backward, make=Small, config=EAGER_CODE):
    """Return the difference after `backward(model, rank)` under DDP and under magi-train."""
    torch.manual_seed(0)
    theirs, ours = pair(make().train(), config)
    backward(theirs, rank)
    backward(ours, rank)
    return difference(gradients(ours), gradients(theirs)), magi_train.report(ours)


def two_forwards(model, rank):
    (model(tokens(rank), tokens(1)) + model(tokens(2 + rank), tokens(1))).backward()


def outside_contribution(model, rank):
    loss = model(tokens(rank), tokens(1))
    plain = getattr(model, "module", model)
    (loss + (rank + 1) * plain.head.weight.square().mean()).backward()


def keep_zeros(model, rank):
    for step in range(2):
        model.zero_grad(set_to_none=False)
        model(tokens(rank + step), tokens(1)).backward()


def accumulate_by_hand(model, rank):
    """Two synchronising backwards without zero_grad in between."""
    for step in range(2):
        model(tokens(rank + step), tokens(1)).backward()


def held_by_somebody(model, rank):
    """Autograd copies gradients that somebody else holds, and does not hand over the view."""
    kept = []
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters()]
    for node in nodes:
        node.register_prehook(kept.append)
    for step in range(2):
        model.zero_grad()
        model(tokens(rank + step), tokens(1)).backward()
    assert len(kept) == 2 * len(nodes)


@pytest.mark.parametrize("tier", ["auto", "eager"])
@pytest.mark.parametrize(
    "backward",
    [two_forwards, outside_contribution, keep_zeros, accumulate_by_hand, held_by_somebody],
)
def test_one_backward(backward, tier, two_ranks):
    config = Config(lowering="aot_eager", tier=tier)
    results = values(two_ranks(same_gradients, backward, Small, config))
    for apart, report in results:
        assert apart <= LIMIT
        if tier == "auto" and backward in (two_forwards, outside_contribution):
            assert report.tier == "region", "in-graph reduction must not have been trusted"
            assert "outside the captured graph" in report.reason or "launched" in report.reason
        elif tier == "auto":
            assert report.tier == "graph"


class Prompt(Small):
    """A parameter that only code outside of the forward uses, and one with gaps in memory."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.ones(()))
        self.a.weight = nn.Parameter(torch.randn(32, 64)[:, :32])


def used_outside_only(model, rank):
    plain = getattr(model, "module", model)
    if hasattr(model, "module"):  # DDP counts a parameter without a hook in the forward as unused
        loss = model(tokens(rank), tokens(1)) * 1.0
        loss.backward()
        mine = (rank + 1) * torch.ones(())
        dist.all_reduce(mine)
        plain.prompt.grad = mine / dist.get_world_size()
    else:
        (model(tokens(rank), tokens(1)) + (rank + 1) * plain.prompt).backward()


def keep_zeros_outside(model, rank):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    used_outside_only(model, rank)


@pytest.mark.parametrize("backward", [used_outside_only, keep_zeros_outside])
def test_a_parameter_that_only_outside_code_uses(backward, two_ranks):
    for apart, report in values(two_ranks(same_gradients, backward, Prompt)):
        assert apart <= LIMIT
        assert report.tier == "region"
        assert "prompt got a gradient from outside" in report.reason


class NewBuffer(Small):
    """Assigns a new tensor to its buffer in every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(32))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))

    def hidden(self, x):
        h = super().hidden(x)
        self.average = self.average * 0.9 + h.detach().mean((0, 1))
        return h


def assigned_buffer(rank, world_size, tier):
    torch.manual_seed(0)
    model = magi_train.prepare(NewBuffer(), config=Config(tier=tier, lowering="aot_eager"))
    for step in range(2):
        model(tokens(10 * step + rank), tokens(1)).backward()
    return model.state_dict()["average"].clone()


@pytest.mark.parametrize("tier", ["auto", "eager"])
def test_buffers_that_the_forward_assigns_anew(tier, two_ranks):
    first, second = values(two_ranks(assigned_buffer, tier))
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


class Written(Small):
    """Its forward reads a buffer that the program writes between steps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def hidden(self, x):
        return super().hidden(x) * self.scale


def buffers_written_between_steps(rank, world_size, tier, assign):
    torch.manual_seed(0)
    theirs, ours = pair(Written(), Config(tier=tier, lowering="aot_eager"))
    found = []
    for model in (theirs, ours):
        plain, losses = getattr(model, "module", model), []
        for step in range(3):
            loss = model(tokens(10 * step + rank), tokens(1))
            loss.backward()
            losses.append(loss.item())
            value = torch.tensor(2.0 + step + 3 * rank)
            if assign:
                plain.scale = value
            else:
                plain.scale.copy_(value)
        found.append((losses, gradients(model)))
    (want, theirs), (got, ours) = found
    return max(abs(a - b) for a, b in zip(want, got, strict=True)), difference(ours, theirs)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("tier", ["auto", "region", "eager"])
def test_buffers_that_the_program_writes_between_steps(tier, assign, two_ranks):
    """The forward reads rank 0's, as DistributedDataParallel's does."""
    for losses_apart, apart in values(two_ranks(buffers_written_between_steps, tier, assign)):
        assert losses_apart <= LIMIT
        assert apart <= LIMIT


def gradient_of_inputs(rank, world_size):
    """torch.autograd.grad through the graph leaves what .grad holds."""
    torch.manual_seed(0)
    layer = magi_train.prepare(nn.Linear(4, 4), config=EAGER_CODE)
    layer(torch.full((2, 4), rank + 1.0)).sum().backward()
    before = layer.weight.grad.clone()
    x = torch.ones(2, 4, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).square().sum(), x)
    same = torch.equal(layer.weight.grad, before)
    layer(torch.full((2, 4), rank + 1.0)).sum().backward()
    return same, torch.allclose(layer.weight.grad, 2 * before), got.abs().sum() > 0


def test_autograd_grad_leaves_the_gradients(two_ranks):
    for result in values(two_ranks(gradient_of_inputs)):
        assert all(result)


def prepared_again(rank, world_size):
    torch.manual_seed(0)
    plain = Small()
    first = magi_train.prepare(plain, config=EAGER_CODE)
    first(tokens(rank), tokens(1)).backward()
    plain.zero_grad()
    theirs = DistributedDataParallel(copy.deepcopy(plain))
    second = magi_train.prepare(plain, config=EAGER_CODE)
    for m in (theirs, second):
        m(tokens(5 + rank), tokens(1)).backward()
    try:
        first(tokens(rank), tokens(1))
        said = ""
    except magi_train.MagiError as error:
        said = str(error)
    return difference(gradients(second), gradients(theirs)), said


def test_preparing_again_takes_over(two_ranks):
    for apart, said in values(two_ranks(prepared_again)):
        assert apart <= LIMIT
        assert "was prepared again" in said


def closed_and_opened(rank, _):
    torch.manual_seed(0)
    theirs, ours = pair(Small().train(), Config(tier="eager"))
    runtime = ours._magi_runtime
    runtime.close()
    runtime.reopen()
    for model in (theirs, ours):
        model(tokens(rank), tokens(1)).backward()
    return difference(gradients(ours), gradients(theirs))


def test_a_model_that_goes_on_after_its_end_reduces_again(two_ranks):
    """As under a strategy whose fit() is called once more."""
    assert max(values(two_ranks(closed_and_opened))) <= LIMIT


def remade_group(rank, world_size):
    """A new process group over the same store must not read old answers."""
    import datetime

    seen = []
    old = magi_train.prepare(Small(), config=EAGER_CODE)
    store = dist.distributed_c10d._get_default_store()
    for generation in range(3):
        dist.barrier()
        dist.destroy_process_group()
        seconds = datetime.timedelta(seconds=60)
        fresh = dist.PrefixStore(str(generation), store)  # of gloo; ours sees `store` below it
        dist.init_process_group("gloo", store=fresh, rank=rank, world_size=2, timeout=seconds)
        world = World.current()
        world._store = world._watch_store = store
        seen.append(world.gather("which", [generation, rank], 20))
    try:
        old(tokens(rank), tokens(1))
    except magi_train.MagiError as error:
        return seen, str(error)
    return seen, ""


def test_a_remade_group_starts_afresh():
    for seen, said in values(run_ranks(remade_group)):
        assert seen == [[[g, 0], [g, 1]] for g in range(3)]
        assert "process group that this model was prepared for is gone" in said


class UnusedOnOneRank(Small):
    """Rank 1 skips a layer; a third is skipped by all."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.skip = False

    def hidden(self, x):
        h = torch.relu(self.a(self.embedding(x)))
        return h if self.skip else self.b(h)


def skip_on_rank_one(model, rank):
    getattr(model, "module", model).skip = rank == 1
    if hasattr(model, "_magi_module"):
        model._magi_module.skip = rank == 1
    model(tokens(rank), tokens(1)).backward()


@pytest.mark.parametrize("tier", ["auto", "region", "eager"])
def test_a_parameter_that_only_one_rank_uses(tier, two_ranks):
    config = Config(lowering="aot_eager", tier=tier)
    for apart, _ in values(two_ranks(same_gradients, skip_on_rank_one, UnusedOnOneRank, config)):
        assert apart <= LIMIT


def late_contribution(rank, world_size):
    model = magi_train.prepare(Small(), config=EAGER_CODE)
    model(tokens(rank), tokens(1)).backward()
    model.zero_grad()
    outside_contribution(model, rank)


def test_an_outside_contribution_after_the_first_step_is_an_error():
    for outcome in run_ranks(late_contribution):
        assert "UnreducedGradientError" in outcome.error or "RemoteRankError" in outcome.error
        assert "head.weight got a gradient from outside the captured graph" in outcome.error


def uneven_shapes(rank, world_size):
    """The last batch is shorter on one rank: that rank compiles again, alone."""
    torch.manual_seed(0)
    theirs, ours = pair(Small())
    worst = 0.0
    for step in range(4):
        short = 2 if rank == 1 and step >= 2 else 4
        for model in (theirs, ours):
            model.zero_grad()
            model(tokens(10 * step + rank, short), tokens(1, short)).backward()
        worst = max(worst, difference(gradients(ours), gradients(theirs)))
    return worst, magi_train.report(ours).tier


def test_a_rank_may_recompile_alone(two_ranks):
    for worst, tier in values(two_ranks(uneven_shapes)):
        assert worst <= LIMIT
        assert tier == "graph"


def toggled(rank, world_size):
    """Freeze and thaw a layer between steps, as fine-tuning callbacks do."""
    torch.manual_seed(0)
    model = Small()
    ours = magi_train.prepare(copy.deepcopy(model), config=EAGER_CODE)
    seen = []
    for step, frozen in enumerate((False, True, False)):
        theirs = copy.deepcopy(model)
        theirs.a.requires_grad_(not frozen)
        ours.a.requires_grad_(not frozen)
        ours.zero_grad()
        wrapped = DistributedDataParallel(theirs)
        for m in (wrapped, ours):
            m(tokens(10 * step + rank), tokens(1)).backward()
        seen.append(difference(gradients(ours), gradients(wrapped)))
    return seen


def test_freezing_between_steps(two_ranks):
    for seen in values(two_ranks(toggled)):
        assert max(seen) <= LIMIT


def frozen_before_the_backward(rank, world_size, tier):
    """The graph reduces by the plan of its forward; hooks by that of the backward."""
    torch.manual_seed(0)
    theirs, ours = pair(Small(), Config(lowering="aot_eager", tier=tier))
    results = []
    for step in range(2):
        for m, plain in ((theirs, theirs.module), (ours, ours)):
            m.zero_grad()
            loss = m(tokens(10 * step + rank), tokens(1))
            plain.a.requires_grad_(step != 0)
            loss.backward()
        results.append(gradients(ours))
    skipped = all(results[0][f"a.{n}"] is None for n in ("weight", "bias"))
    return skipped, difference(results[1], gradients(theirs))


@pytest.mark.parametrize("tier", ["graph", "eager"])
def test_freezing_between_forward_and_backward(tier, two_ranks):
    for skipped, apart in values(two_ranks(frozen_before_the_backward, tier)):
        assert skipped
        assert apart <= LIMIT


def changed_between_steps(rank, world_size, change, tier):
    """Before the third of four steps, `change` the model; DDP is made anew for it."""
    torch.manual_seed(0)
    model = UnusedFrozenTied()
    ours = magi_train.prepare(copy.deepcopy(model), config=Config(lowering="aot_eager", tier=tier))
    theirs = DistributedDataParallel(model, find_unused_parameters=True)
    worst = 0.0
    for step in range(4):
        if step == 2:
            for m in (model, ours._magi_module):
                torch.manual_seed(7 + rank)  # rank 0's new weights count
                change(m)
            theirs = DistributedDataParallel(model, find_unused_parameters=True)
        for m in (theirs, ours):
            m.zero_grad()
            with m.no_sync() if step == 3 else contextlib.nullcontext():
                m(tokens(20 + step + rank), tokens(1)).backward()
            m(tokens(10 * step + rank), tokens(1)).backward()
        worst = max(worst, difference(gradients(ours), gradients(theirs)))
    return worst


def freeze_unused(model):
    model.unused.requires_grad_(False)


def replace_layer(model):
    model.a = nn.Linear(WIDTH, WIDTH)


def load_assigned(model):
    state = {n: 0.5 * t for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.head.weight = model.embedding.weight


def add_layer(model):
    model.b = nn.Sequential(model.b, nn.Linear(WIDTH, WIDTH))


def hook_a_weight(model):
    model.a.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))


def to_double(model):
    model.double()


@pytest.mark.parametrize("tier", ["graph", "eager"])
@pytest.mark.parametrize(
    "change", [freeze_unused, replace_layer, load_assigned, add_layer, hook_a_weight, to_double]
)
def test_a_model_that_changes_between_steps(change, tier, two_ranks):
    for worst in values(two_ranks(changed_between_steps, change, tier)):
        assert worst <= LIMIT


def initial_weights(rank, world_size):
    torch.manual_seed(rank)  # each rank starts elsewhere
    model = magi_train.prepare(MODELS["resnet"][0](), config=EAGER_CODE)
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_rank_zero_gives_its_weights_and_buffers(two_ranks):
    first, second = values(two_ranks(initial_weights))
    assert all(torch.equal(first[k], second[k]) for k in first)


def scaler_and_step(rank, world_size):
    """prepare_step, GradScaler arithmetic, clipping: the weights after three steps."""
    torch.manual_seed(0)
    theirs, ours = pair(UnusedFrozenTied())
    states = []
    for model in (theirs, ours):
        run = model
        if model is ours:
            run = magi_train.prepare_step(lambda x, y: ours(x, y), ours)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            scaler.scale(run(tokens(step + rank), tokens(1))).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        states.append({n.removeprefix("module."): p for n, p in model.state_dict().items()})
    return difference(states[1], states[0])


def test_scaling_clipping_and_whole_steps(two_ranks):
    for apart in values(two_ranks(scaler_and_step)):
        assert apart <= LIMIT


def dropout_run(rank, world_size, tier):
    torch.manual_seed(0)
    model = gpt2(dropout=0.2).train()
    theirs, ours = pair(model, Config(tier=tier, lowering="aot_eager"))
    losses = []
    for m in (theirs, ours):
        torch.manual_seed(7 + rank)
        ids = tokens(rank)
        losses.append([float(m(input_ids=ids, labels=ids).loss) for _ in range(20)])
    return losses


@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_dropout(tier, two_ranks):
    """EAGER draws DDP's masks; captured graphs draw others, of the same distribution."""
    for theirs, ours in values(two_ranks(dropout_run, tier)):
        a, b = torch.tensor(theirs), torch.tensor(ours)
        if tier == "eager":
            assert torch.equal(a, b)
        standard_error = float((a.var() / len(a) + b.var() / len(b)).sqrt())
        assert abs(float(a.mean() - b.mean())) <= 4 * standard_error
        assert b.std() > 0


def accumulation_sends_nothing(rank, world_size):
    torch.manual_seed(0)
    model = magi_train.prepare(Small(), config=EAGER_CODE)
    graphs = []
    region = model._magi_region
    compile_graph = region.compile_graph
    region.compile_graph = lambda *a, **k: graphs.append(1) or compile_graph(*a, **k)
    sent = []
    real = dist.all_reduce
    dist.all_reduce = lambda *a, **k: sent.append(1) or real(*a, **k)
    counts = []
    for step in range(3):
        for micro in range(4):
            quiet = model.no_sync() if micro < 3 else contextlib.nullcontext()
            with quiet:
                model(tokens(10 * step + micro), tokens(rank)).backward()
            counts.append(len(sent))
    dist.all_reduce = real
    return counts, len(graphs), len(model._magi_runtime.reducer.plan.buckets)


def test_accumulation_sends_on_the_last_micro_batch_and_compiles_once(two_ranks):
    for counts, graphs, buckets in values(two_ranks(accumulation_sends_nothing)):
        each = [b - a for a, b in zip([0, *counts], counts, strict=False)]
        assert each == [0, 0, 0, buckets] * 3
        assert graphs == 1


def evaluates_on_rank_zero(rank, world_size):
    model = magi_train.prepare(MODELS["resnet"][0](), config=EAGER_CODE)
    model(**MODELS["resnet"][1](rank)).loss.backward()
    if rank == 0:
        model.eval()
        with torch.no_grad():
            return float(model(**MODELS["resnet"][1](5)).loss)
    return None


def test_one_rank_may_evaluate_alone(two_ranks):
    assert values(two_ranks(evaluates_on_rank_zero))[0] is not None


def backward_inside(model, rank):
    """The step that is captured runs its own backward."""

    def step(x, y):
        loss = model(x, y)
        loss.backward()
        return loss.detach()

    if isinstance(model, magi_train.api.PreparedModule):
        step = magi_train.prepare_step(step, model)
    step(tokens(rank), tokens(1))


def test_a_backward_inside_of_the_step(two_ranks):
    for error, report in values(two_ranks(same_gradients, backward_inside)):
        assert error < LIMIT
        assert report.tier == "region"


def sparse(rank, world_size):
    model = Small()
    model.embedding.sparse = True
    model = magi_train.prepare(model, config=Config(tier="eager"))
    model(tokens(rank), tokens(1)).backward()


def test_sparse_gradients_are_refused_by_name():
    for outcome in run_ranks(sparse):
        assert "gradient of embedding.weight is sparse" in outcome.error


def drop_in(rank, world_size):
    """A drop-in DataParallel keeps DDP's key names and gradients."""
    torch.manual_seed(0)
    plain = Small()
    ours = magi_train.DataParallel(copy.deepcopy(plain), config=EAGER_CODE)
    theirs = DistributedDataParallel(plain)
    for m in (theirs, ours):
        with m.no_sync():
            m(tokens(rank), tokens(1)).backward()
        m(tokens(rank + 5), tokens(1)).backward()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return difference(gradients(ours), gradients(theirs))


def test_data_parallel_drop_in(two_ranks):
    for apart in values(two_ranks(drop_in)):
        assert apart <= LIMIT
