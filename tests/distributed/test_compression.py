"""Compressed gradients on two gloo ranks with data of their own: the rules, end to end."""

import contextlib
import copy
import platform
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import magi_train
from magi_train import CommConfig, Config
from magi_train.comm import nodes as comm_nodes
from magi_train.comm import reducer
from magi_train.comm.codecs.compressor import AllReduce, Compressor
from magi_train.core.errors import MagiError
from magi_train.core.report import Report
from magi_train.core.world import World
from tests.close import difference, relative_error, tolerance
from tests.models import Small, tokens
from tests.ranks import run_ranks, values

LOSSY = ("int8", "powersgd")


def config(compression, tier="auto", **options):
    nodes = 2 if compression == "hierarchical" else None
    comm = CommConfig(compression=compression, bucket_mib=0.005, node_size=nodes, **options)
    return Config(tier=tier, lowering="aot_eager", comm=comm)


class Tied(Small):
    """Embedding and head are one parameter, a layer is never used, rank 1 skips another."""

    def __init__(self):
        super().__init__()
        self.head.weight = self.embedding.weight
        self.never = nn.Linear(64, 64)
        self.sometimes = nn.Linear(32, 32)
        self.skip = False

    def hidden(self, x):
        h = super().hidden(x)
        return h if self.skip else self.sometimes(h)


def gradients(model):
    named = [(n.removeprefix("module."), p.grad) for n, p in model.named_parameters()]
    return {n: None if g is None else g.clone() for n, g in named}


def train(rank, world_size, compression, tier):
    """Three steps of two micro-batches; count exchanges; compare the first with DDP's gradients."""
    torch.manual_seed(0)
    model = Tied().train()
    theirs = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    ours = magi_train.prepare(model, config=config(compression, tier))
    model.skip = theirs.module.skip = rank == 1
    starts, start = [], Compressor.start

    def counted(self, index, *args):
        starts.append(index)
        return start(self, index, *args)

    Compressor.start = counted
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    error, norms = 0.0, []
    try:
        for step in range(3):
            for micro in range(2):
                for each in (ours, theirs)[: 2 if step == 0 else 1]:
                    with each.no_sync() if micro == 0 else contextlib.nullcontext():
                        each(tokens(10 * step + 2 * micro + rank), tokens(1)).backward()
            if step == 0:
                error = relative_error(gradients(ours), gradients(theirs))
                none = ours.never.weight.grad is None
            norms.append(float(nn.utils.clip_grad_norm_(ours.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
    finally:
        Compressor.start = start
    weights = {n: p.detach().clone() for n, p in ours.named_parameters()}
    plan = ours._magi_runtime.reducer.plan
    return weights, norms, error, none, (starts, len(plan.buckets), plan.codecs())


@pytest.mark.parametrize(
    ("compression", "tier"),
    [("int8", "auto"), ("int8", "eager"), ("powersgd", "auto"), ("bfloat16", "eager")],
)
def test_replicas_stay_equal_and_each_step_sends_once(compression, tier, two_ranks):
    (weights, norms, error, none, sent), other = values(two_ranks(train, compression, tier))
    assert all(torch.equal(w, other[0][n]) for n, w in weights.items())
    assert norms == other[1], "clipping sees the same averaged gradient on all ranks"
    starts, buckets, codecs = sent
    assert codecs[compression] >= 2
    assert starts == list(range(buckets)) * 3, "once a step, after accumulation, in plan order"
    assert none, "a parameter that no rank used has no gradient"
    # int8: a rounding is at most 1/254 of a block's largest element, and elements are not all small
    limit = {"int8": 0.05, "bfloat16": 2 * torch.finfo(torch.bfloat16).eps, "powersgd": 1.0}
    assert 0 < error < limit[compression]


@pytest.mark.full
@pytest.mark.parametrize("tier", ["auto", "eager"])
def test_two_nodes_of_two_ranks(tier):
    (weights, norms, error, none, sent), *others = values(
        run_ranks(train, "hierarchical", tier, world_size=4)
    )
    for other in others:
        assert all(torch.equal(w, other[0][n]) for n, w in weights.items())
        assert norms == other[1]
    starts, buckets, codecs = sent
    assert codecs["hierarchical"] >= 2
    assert starts == list(range(buckets)) * 3
    assert none
    assert 0 < error < 0.05


@pytest.mark.full
def test_nodes_keep_residuals_through_infinities_and_checkpoints():
    (plain, kept, _), *_ = values(run_ranks(scaled, "hierarchical", "eager", "", world_size=4))
    bad = values(run_ranks(scaled, "hierarchical", "eager", "loss", world_size=4))
    for weights, residuals, after in bad:
        assert after == 512.0, "the step was not skipped"
        assert all(torch.equal(w, plain[n]) for n, w in weights.items())
        assert residuals.keys() == kept.keys()
        assert all(torch.equal(r, kept[n]) for n, r in residuals.items())
    assert all(r.abs().max() > 0 for r in kept.values())
    for saved, loaded, *_ in values(run_ranks(resumed, "hierarchical", world_size=4)):
        for name, state in saved.items():
            assert state["residual"].abs().max() > 0
            off = {name: loaded[name]["residual"]}, {name: state["residual"]}
            assert difference(*off) <= tolerance(torch.float32, 4)


def nodes(rank, world_size, node_size, launcher, host):
    """Return what is taken for the ranks in a node."""
    report, names = Report(), mock.patch.object(platform, "node", return_value=host[rank])
    with mock.patch.dict("os.environ", {"LOCAL_WORLD_SIZE": launcher[rank]}), names:
        comm = CommConfig(compression="hierarchical", node_size=node_size)
        try:
            return comm_nodes.node_size(comm, World.current(), 60, report), len(report.notes)
        except MagiError as error:
            return str(error), 0


@pytest.mark.parametrize(
    ("node_size", "launcher", "host", "found"),
    [
        (None, "22", "ab", (2, 0)),  # the launcher knows better than host names
        (None, ["", ""], "aa", (2, 0)),
        (None, ["", ""], "ab", (1, 0)),
        (None, "21", "ab", (1, 0)),
        (None, ["4", "4"], "aa", (2, 0)),
        (1, "22", "aa", (1, 0)),
    ],
)
def test_nodes_are_found(node_size, launcher, host, found, two_ranks):
    assert values(two_ranks(nodes, node_size, launcher, host)) == [found, found]


def test_a_node_size_that_cannot_be_is_told(two_ranks):
    for said, _ in values(two_ranks(nodes, 3, "22", "aa")):
        assert "CommConfig.node_size is 3, which does not divide the 2 ranks" in said


def scaled(rank, world_size, compression, tier, where):
    """Train under a GradScaler; with `where`, rank 1 has an infinity there in a step of its own."""
    torch.manual_seed(0)
    model = Small().train()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours, _ = magi_train.prepare(
        model, optimizer, config=config(compression, tier), grad_scaler=scaler
    )
    for step in (0, 1, "bad", 2, 3) if where else (0, 1, 2, 3):
        seed = 5 if step == "bad" else 10 * step
        loss = ours(tokens(seed + rank), tokens(1))
        bad = step == "bad" and rank == 1
        if bad and where == "loss":
            loss = loss * torch.tensor(1e38) * 1e10
        handle = ours.a.bias.register_hook(
            lambda g, bad=bad: torch.full_like(g, float("inf")) if bad and where == "bias" else g
        )
        scaler.scale(loss).backward()
        handle.remove()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    state = magi_train.compression_state(ours)
    kept = {n: s["residual"] for n, s in state.items()}
    weights = {n: p.detach().clone() for n, p in ours.named_parameters()}
    return weights, kept, scaler.get_scale()


@pytest.mark.parametrize(
    ("compression", "tier", "where"),
    [("int8", "auto", "loss"), ("powersgd", "eager", "loss"), ("int8", "eager", "bias")],
)
def test_an_infinity_skips_the_step_on_all_ranks_and_leaves_nothing(
    compression, tier, where, two_ranks
):
    """Scales are powers of two, so the other steps must be the same bit for bit."""
    (plain, kept, scale), _ = values(two_ranks(scaled, compression, tier, ""))
    first, second = values(two_ranks(scaled, compression, tier, where))
    assert scale == 1024.0
    for weights, residuals, after in (first, second):
        assert after == 512.0, "the step was not skipped"
        assert all(torch.equal(w, plain[n]) for n, w in weights.items())
        assert residuals.keys() == kept.keys()
        assert all(torch.equal(r, kept[n]) for n, r in residuals.items())
    assert all(r.abs().max() > 0 for r in kept.values())


def resumed(rank, world_size, compression):
    """Save after two steps, go on in a new model, and freeze a layer, which makes a new plan."""
    torch.manual_seed(0)
    model = Small().train()
    first = magi_train.prepare(model, config=config(compression))
    for step in range(2):
        first(tokens(10 * step + rank), tokens(1)).backward()
        first.zero_grad()
    saved = magi_train.compression_state(first)
    second = magi_train.prepare(copy.deepcopy(model), config=config(compression, "eager"))
    magi_train.load_compression_state(second, saved)
    loaded = magi_train.compression_state(second)
    second.a.requires_grad_(False)
    second(tokens(rank), tokens(1))
    frozen = magi_train.compression_state(second)
    named = [n for n, p in second.named_parameters() if p.requires_grad]
    try:
        magi_train.load_compression_state(second, {"b.weight": {"residual": torch.zeros(3)}})
        said = ""
    except ValueError as error:
        said = str(error)
    return saved, loaded, frozen, named, said


@pytest.mark.parametrize("compression", LOSSY)
def test_state_by_parameter_name(compression, two_ranks):
    (saved, loaded, frozen, named, said), other = values(two_ranks(resumed, compression))
    kinds = {"int8": {"residual"}, "powersgd": {"residual", "basis"}}[compression]
    assert {"a.weight", "b.weight"} <= saved.keys()
    limit = tolerance(torch.float32, 2)
    for name, state in saved.items():
        assert state.keys() == kinds
        for kind, value in state.items():
            assert torch.equal(value, other[0][name][kind])
        assert state["residual"].abs().max() > 0
        off = difference({name: loaded[name]["residual"]}, {name: state["residual"]})
        assert off <= limit
    assert frozen.keys() == saved.keys() & set(named)
    assert "a.weight" not in frozen
    for name, state in frozen.items():
        assert difference({name: state["residual"]}, {name: saved[name]["residual"]}) <= limit
    assert "compression state of b.weight has shape [3]" in said


def safely(rank, world_size, tier, autocast):
    torch.manual_seed(0)
    model = Small().train()
    theirs = DistributedDataParallel(copy.deepcopy(model))
    ours = magi_train.prepare(model, config=config("safe", tier))
    errors = []
    for step in range(2):
        for each in (ours, theirs):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = each(tokens(10 * step + rank), tokens(1))
            loss.backward()
        errors.append(difference(gradients(ours), gradients(theirs)))
    plan = ours._magi_runtime.reducer.plan
    (row,) = [r.plan for r in magi_train.report(ours).rows if r.name == "safe_compression"]
    halves = {s.name for i in row["bfloat16_buckets"] for s in plan.buckets[i].slots}
    return halves, errors


@pytest.mark.parametrize("tier", ["auto", "eager"])
def test_safe_shortens_only_what_autocast_made_short(tier, two_ranks):
    for halves, errors in values(two_ranks(safely, tier, True)):
        assert {"a.weight", "b.weight"} <= halves
        assert "embedding.weight" not in halves
        assert not {n for n in halves if n.endswith("bias")}
        # one rounding of the mean of two ranks; the gradients themselves need none
        assert errors[1] <= torch.finfo(torch.bfloat16).eps
    for halves, errors in values(two_ranks(safely, tier, False)):
        assert not halves
        assert max(errors) <= tolerance(torch.float32, 64)


def packed_for_the_wire(rank, world_size, engines):
    """As on GPUs: one all-reduce in bfloat16; what it is packed from, and errors against DDP."""
    torch.manual_seed(0)
    model = Small().train()
    theirs = DistributedDataParallel(copy.deepcopy(model))
    wires = []

    def all_reduce(self, flat, wire, what):  # gloo has no mean
        work = dist.all_reduce(wire.div_(world_size), async_op=True)
        return AllReduce(work, wire, flat, World.current(), what)

    class Engines:
        def start(self, packed, flat, what):
            return all_reduce(None, flat, packed, what)

    def start(self, index, flat, used, scale, autocast, packed=None):
        wires.append((packed is flat, str(self.wire_dtype(index, autocast))))
        return begin(self, index, flat, used, scale, autocast, packed)

    begin, errors, seen = Compressor.start, [], []
    with (
        contextlib.ExitStack() as stack,
        mock.patch.object(World, "uses_nccl", return_value=True),
        mock.patch.object(reducer, "copy_engines", return_value=Engines() if engines else None),
        mock.patch.object(Compressor, "start", start),
    ):
        if not engines:
            stack.enter_context(mock.patch.object(Compressor, "_all_reduce", all_reduce))
        ours = magi_train.prepare(model, config=config("safe"))
        for step, micro_batches in enumerate((1, 1, 2)):
            wires.clear()
            for each in (ours, theirs):
                each.zero_grad()
                for i in range(micro_batches):
                    last = i == micro_batches - 1
                    with contextlib.nullcontext() if last else each.no_sync():
                        with torch.autocast("cpu", torch.bfloat16):
                            loss = each(tokens(10 * step + i + 50 * rank), tokens(1))
                        loss.backward()
            errors.append(difference(gradients(ours), gradients(theirs)))
            seen.append(list(wires))
    assert magi_train.report(ours).tier == "graph"
    return seen, errors


@pytest.mark.parametrize("engines", [False, True], ids=["nccl", "copy_engines"])
def test_gradients_are_packed_in_the_dtype_in_which_they_travel(two_ranks, engines):
    found = values(two_ranks(packed_for_the_wire, engines))
    for (first, second, accumulated), errors in found:
        assert set(first) == {(True, "torch.float32")}, "nothing is known yet"
        assert set(second) == {(True, "torch.float32"), (False, "torch.bfloat16")}
        assert set(accumulated) == {(True, "torch.float32"), (True, "torch.bfloat16")}, (
            "sums of micro-batches are made in float32, and rounded once"
        )
        # the mean of two ranks is rounded once, as is the sum of two micro-batches of a rank
        assert errors[1] <= torch.finfo(torch.bfloat16).eps
        assert errors[2] <= 2 * torch.finfo(torch.bfloat16).eps


def by_chance(rank, world_size):
    """Without autocast: the first gradient, of zeros and counts, is short; later ones are not."""
    torch.manual_seed(rank)
    model = nn.Linear(64, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    theirs = DistributedDataParallel(copy.deepcopy(model))
    ours = magi_train.prepare(model, config=config("safe", "eager"))
    optimizers = [torch.optim.SGD(each.parameters(), lr=1.0) for each in (ours, theirs)]
    x = (torch.rand(16, 64) < 0.5).float()
    y = (torch.rand(16, 1) < 0.5).float()
    errors = []
    for _ in range(3):
        for each, optimizer in zip((ours, theirs), optimizers, strict=True):
            each.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(each(x), y).backward()
            optimizer.step()
        errors.append(difference(gradients(ours), gradients(theirs)))
    return errors


def test_numbers_that_are_short_by_chance_prove_nothing(two_ranks):
    for errors in values(two_ranks(by_chance)):
        assert max(errors) <= tolerance(torch.float32, 64)


def penalised(rank, world_size, penalty):
    """A loss outside of the captured model, with a penalty on a weight or without."""
    torch.manual_seed(0)
    model = Small().train()
    theirs = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    ours = magi_train.prepare(model, config=config("safe"))
    asked, gather, errors = [], World.gather, []

    def counted(self, question, *rest):
        asked.append(question)
        return gather(self, question, *rest)

    with mock.patch.object(World, "gather", counted):
        for step in range(8):
            for each, plain in ((ours, model), (theirs, theirs.module)):
                plain.b.requires_grad_(step % 2 == 0)  # ranks take up a plan again and again
                each.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = each(tokens(10 * step + rank), tokens(1))
                (loss + penalty * plain.a.weight.square().sum()).backward()
            errors.append(difference({"a.weight": model.a.weight.grad},
                                     {"a.weight": theirs.module.a.weight.grad}))  # fmt: skip
    row = [r.plan for r in magi_train.report(ours).rows if r.name == "safe_compression"]
    return errors, row, sum("bfloat16" in each for each in asked)


def test_gradients_that_are_completed_outside_of_the_graph_are_not_shortened(two_ranks):
    for errors, _, _ in values(two_ranks(penalised, 0.1)):
        assert max(errors) <= tolerance(torch.float32, 64)


def test_what_ranks_agreed_on_for_a_plan_holds_when_it_is_taken_up_again(two_ranks):
    for errors, rows, asked in values(two_ranks(penalised, 0.0)):
        assert any(row["bfloat16_buckets"] for row in rows)
        assert asked == 2, "once for each plan"
        assert max(errors) <= torch.finfo(torch.bfloat16).eps
