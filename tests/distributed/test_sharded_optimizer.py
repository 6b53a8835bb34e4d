"""Optimizer state sharded over ranks: numbers, gradients and checkpoints are the unsharded ones."""

import contextlib
import copy
import time
from unittest import mock

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config
from magi_train.core.world import World
from magi_train.memory import shard_plan
from magi_train.memory.sharded_optimizer import ELEMENTWISE, why_not_sharded
from tests.models import WIDTH, Small, UnusedFrozenTied, tokens
from tests.ranks import run_ranks, values

EAGER = {"tier": "eager", "timeout_seconds": 20.0}
STEPS = 4


class Mixed(UnusedFrozenTied):
    """Parameters of every kind: unused, frozen, tied, permuted, with gaps, a number, none."""

    def __init__(self):
        super().__init__()
        self.a.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.b.weight = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH)[:, :WIDTH])
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.zeros(0))
        self.one = nn.Parameter(torch.ones(1))
        self.wide = nn.Parameter(torch.ones(70, dtype=torch.float64))

    def hidden(self, x):
        return super().hidden(x) * self.scale * self.one * self.wide.mean().float()


def two_groups(kind, **options):
    """Weight decay for matrices only, as everybody writes it."""

    def build(model):
        ps = [p for n, p in model.named_parameters() if n != "frozen.bias"]
        groups = [
            {"params": [p for p in ps if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in ps if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
        ]
        return kind(groups, **{"lr": 0.01, **options})

    return build


BUILDERS = {
    "AdamW": two_groups(torch.optim.AdamW),
    "AMSGrad": two_groups(torch.optim.Adam, amsgrad=True),
    "fused AdamW": two_groups(torch.optim.AdamW, fused=True),
    "foreach SGD": two_groups(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "SGD without state": two_groups(torch.optim.SGD),
    "Adagrad": two_groups(torch.optim.Adagrad),
    "NAdam": two_groups(torch.optim.NAdam),
}


def pair(name, rank, model=Mixed, small_buckets=True):
    """Return (model, optimizer) twice: as it is, and sharded."""
    shard_plan.BUCKET_BYTES = 8192 if small_buckets else 2**27  # several buckets and rounds, or one
    made = []
    for on in (False, True):
        torch.manual_seed(0)
        module = model().train()  # a copy would have no gaps
        config = Config(**EAGER, shard_optimizer=on)
        optimizer = BUILDERS[name](module)
        made.append(magi_train.prepare(module, optimizer, config=config))
    return made


def unequal(a, b, path=""):
    """Return the first place where two nested values are not bit for bit the same, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f"{path}: keys {list(a)} and {list(b)}"
        return next((w for k in a if (w := unequal(a[k], b[k], f"{path}.{k}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path}: lengths {len(a)} and {len(b)}"
        return next((w for i, k in enumerate(a) if (w := unequal(k, b[i], f"{path}[{i}]"))), None)
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return None if same and torch.equal(a, b) else f"{path}: {a} and {b}"
    return None if a == b else f"{path}: {a} and {b}"


def seen(model, optimizer, state=True):
    """Return all that a user can read; the optimizer's state only if asked for."""
    held = optimizer.state_dict() if state else {"state": {}}
    return {
        "weights": {n: p.detach() for n, p in model.named_parameters()},
        "gradients": model.__dict__["gradients"],
        "optimizer": {**held, "state": dict(sorted(held["state"].items()))},
    }


def state_bytes(optimizer):
    """Return what the states of parameters that can be cut take."""
    dense = [p for p in optimizer.state if p.dim() and p.untyped_storage().nbytes() == p.nbytes]
    held = [v for p in dense for v in optimizer.state[p].values() if torch.is_tensor(v)]
    return sum(v.untyped_storage().nbytes() for v in held if v.dim() > 0)


def backward(model, rank, step, scale=None):
    loss = model(tokens(10 * step + rank), tokens(1))
    (loss if scale is None else scale.scale(loss)).backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.__dict__["gradients"] = gradients  # torch's step may write into .grad (foreach SGD does)


# What a step does to its model and optimizer; run on both of a pair


def clip_by_norm(model, optimizer, rank, step):
    backward(model, rank, step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()


def clip_by_value_and_keep_zeros(model, optimizer, rank, step):
    backward(model, rank, step)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def accumulate_with_a_closure(model, optimizer, rank, step):
    def closure():
        optimizer.zero_grad()
        with model.no_sync():
            backward(model, rank, 2 * step)
        backward(model, rank, 2 * step + 1)
        return 3.0

    assert optimizer.step(closure) == 3.0


def freeze_and_thaw(model, optimizer, rank, step):
    """One parameter is frozen later; others are trained, or belong to a new group, later."""
    model.head.weight.requires_grad_(step < 2)
    model.frozen.weight.requires_grad_(step >= 1)
    if step == 2:
        optimizer.add_param_group({"params": [model.frozen.bias.requires_grad_()], "lr": 0.5})
    clip_by_norm(model, optimizer, rank, step)


def other_layouts(model, optimizer, rank, step):
    """A gradient with other strides, and a weight that is moved elsewhere."""
    backward(model, rank, step)
    w = model.a.weight
    w.grad = w.grad.contiguous()
    if step == 1:
        w.data = w.data.clone()
    optimizer.step()
    optimizer.zero_grad()


def schedule(model, optimizer, rank, step):
    if not hasattr(optimizer, "scheduler"):
        optimizer.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
        optimizer.register_step_post_hook(lambda o, *_: o.counted.append(len(o.param_groups)))
        optimizer.counted = []
    clip_by_norm(model, optimizer, rank, step)
    optimizer.scheduler.step()
    assert len(optimizer.counted) == step + 1, "hooks run once a step"


def scale_the_loss(model, optimizer, rank, step):
    if not hasattr(optimizer, "scaler"):
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scaler = optimizer.scaler
    backward(model, rank, step, scaler)
    if step == 1 and rank == 0:
        model.a.bias.grad[0] = torch.inf
    if step == 1:
        torch.distributed.broadcast(model.a.bias.grad, 0)
    scaler.step(optimizer)
    scaler.update()
    model.__dict__["gradients"] |= {n: p.grad for n, p in model.named_parameters()}  # unscaled


def compare(rank, world_size, name, work):
    """Return the first difference between sharded and not, and the state's bytes in both."""
    (plain, reference), (ours, optimizer) = pair(name, rank)
    assert type(optimizer) is not type(reference)
    for step in range(STEPS):
        for model, each in ((plain, reference), (ours, optimizer)):
            if work is scale_the_loss:
                each.zero_grad()
            work(model, each, rank, step)
        last = step == STEPS - 1
        different = unequal(seen(plain, reference, last), seen(ours, optimizer, last))
        if different:
            return f"step {step}{different[:600]}", 0, 0
    return None, state_bytes(optimizer), state_bytes(reference)


WORK = [
    ("AdamW", clip_by_norm),
    ("AMSGrad", clip_by_value_and_keep_zeros),
    ("foreach SGD", accumulate_with_a_closure),
    ("AdamW", freeze_and_thaw),
    ("Adagrad", freeze_and_thaw),
    ("AdamW", other_layouts),
    ("NAdam", schedule),
    ("AdamW", scale_the_loss),
    ("fused AdamW", scale_the_loss),
    ("SGD without state", clip_by_norm),
]


def compare_all(rank, world_size):
    return [compare(rank, world_size, name, work) for name, work in WORK]


@pytest.fixture(scope="module")
def compared(two_ranks):
    return values(two_ranks(compare_all))


@pytest.mark.parametrize("number", range(len(WORK)), ids=[f"{n}, {w.__name__}" for n, w in WORK])
def test_training_is_bit_for_bit_the_same(number, compared):
    for outcomes in compared:
        assert outcomes[number][0] is None
    mine = [outcomes[number][1] for outcomes in compared]
    assert sum(mine) == compared[0][number][2], "each rank holds its part, and no more"


@pytest.mark.full
def test_on_three_ranks():
    for outcomes in values(run_ranks(compare_all, world_size=3)):
        for different, _, _ in outcomes:
            assert different is None


# The fused kernel, in Triton's interpreter


def with_kernel_and_shadows(rank, world_size):
    """Train under autocast, the kernel writing pieces of shadows; compare with whole ones."""
    from magi_train.fusion import fused_step

    with mock.patch.object(fused_step, "DEVICES", ("cpu",)):
        return kernel_runs(rank)


def kernel_runs(rank):
    runs, shard_plan.BUCKET_BYTES = [], 8192
    for on in (False, True):
        torch.manual_seed(0)
        model = Small()
        config = Config(lowering="aot_eager", shard_optimizer=on, timeout_seconds=20.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        model, optimizer = magi_train.prepare(model, optimizer, config=config)
        for step in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                backward(model, rank, step)
            if step == 0:
                with torch.no_grad():
                    model.head.weight.mul_(0.5)
            optimizer.step()
            optimizer.zero_grad()
        shadows = model._magi_runtime.shadows
        copies = {n: shadows.of(p) for n, p in model.named_parameters()}
        runs.append({**seen(model, optimizer), "shadows": copies})
    weights = dict(model.named_parameters())
    behind = [n for n, c in copies.items() if c is not None and shadows._stale(weights[n])]
    taken = sum(sum(t.numels) for t in optimizer._magi_step.tables.values())
    part = taken / sum(p.numel() for p in weights.values())
    return unequal(*runs), behind, sum(c is not None for c in copies.values()), part


def test_the_kernel_steps_pieces_and_writes_their_shadows(two_ranks):
    pytest.importorskip("triton")
    for different, behind, shadowed, part in values(two_ranks(with_kernel_and_shadows)):
        assert different is None
        assert shadowed >= 4
        assert behind == [], "what was gathered has been cast"
        assert part == pytest.approx(0.5, rel=0.05), "the kernel had rows for pieces only"


# Checkpoints


def resume(rank, world_size, name):
    """Train four steps in one go, and in twos with a checkpoint between every two kinds."""
    (plain, reference), (ours, optimizer) = pair(name, rank, small_buckets=False)
    initial = copy.deepcopy(ours.state_dict())
    for step in range(4):
        clip_by_norm(plain, reference, rank, step)
    want, shapes = seen(plain, reference), []
    for first, second in (("sharded", "plain"), ("plain", "sharded"), ("sharded", "sharded")):
        saved = initial, None
        for half, kind in enumerate((first, second)):
            model = Mixed()
            model.load_state_dict(saved[0])
            model.frozen.weight.requires_grad_(False)
            optimizer = BUILDERS[name](model)
            config = Config(**EAGER, shard_optimizer=kind == "sharded")
            prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
            optimizer.register_load_state_dict_pre_hook(
                lambda _, d: shapes.extend(s["exp_avg"].shape for s in d["state"].values())
            )
            if saved[1] is not None:
                optimizer.load_state_dict(saved[1])
            for step in (2 * half, 2 * half + 1):
                clip_by_norm(prepared, optimizer, rank, step)
            saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        different = unequal(want, seen(prepared, optimizer))
        if different:
            return f"{first} to {second}{different[:500]}"
    assert set(shapes) <= {p.shape for p in plain.parameters()}, "hooks see whole states"
    return None


def test_a_checkpoint_goes_to_and_from_plain_optimizers(two_ranks):
    assert values(two_ranks(resume, "AdamW")) == [None, None]


def prepared_late(rank, world_size):
    """An optimizer that has state already is cut when it is prepared; state_dict hooks see all."""
    plain, reference = pair("AdamW", rank)[0]
    for step in range(2):
        clip_by_norm(plain, reference, rank, step)
    model = Mixed()
    model.load_state_dict(plain.state_dict())
    later = BUILDERS["AdamW"](model)
    later.load_state_dict(copy.deepcopy(reference.state_dict()))  # torch shares memory
    model, later = magi_train.prepare(model, later, config=Config(**EAGER, shard_optimizer=True))
    shapes = []
    later.register_state_dict_post_hook(
        lambda _, d: shapes.append([tuple(s["exp_avg"].shape) for s in d["state"].values()])
    )
    for each, o in ((plain, reference), (model, later)):
        clip_by_norm(each, o, rank, 2)
    different = unequal(seen(plain, reference), seen(model, later))
    model, later = magi_train.prepare(
        model._magi_module, later, config=Config(**EAGER, shard_optimizer=True)
    )
    for each, o in ((plain, reference), (model, later)):
        with contextlib.suppress(RuntimeError):  # the other model's preparation stays
            clip_by_norm(each, o, rank, 3)
    again = unequal(seen(plain, reference), seen(model, later))
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(later)
    with pytest.raises(ValueError, match="is sharded by an earlier prepare"):
        magi_train.prepare(model._magi_module, later, config=Config(**EAGER))
    piece = later.state.get(model.head.weight, later.state.get(model.a.weight))
    later_dict = later.state_dict()
    later_dict["state"][0]["exp_avg"] = later_dict["state"][0]["exp_avg"][1:]
    with pytest.raises(ValueError, match="must have the parameter's shape"):
        later.load_state_dict(later_dict)
    whole = [tuple(p.shape) for g in later.param_groups for p in g["params"]]
    kept = state_bytes(later) / state_bytes(reference)
    return different, again, set(shapes[0]) <= set(whole), piece["exp_avg"].dim(), kept


def test_an_optimizer_with_state_is_cut_when_prepared(two_ranks):
    for different, again, whole, dims, kept in values(two_ranks(prepared_late)):
        assert different is None
        assert again is None
        assert whole, "state_dict hooks see whole states"
        assert dims == 1
        assert kept < 0.7, "a part, not a view of all"


# What is cut


def balance(rank, world_size):
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())
    config = Config(**EAGER, shard_optimizer=True)
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    prepared(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    row = next(r.plan for r in magi_train.report(prepared).rows if r.name == "sharded_optimizer")
    return state_bytes(optimizer), row


def test_each_rank_holds_its_part_of_the_state(two_ranks):
    elements = 4 * (100 * 100 + 100)
    for number_bytes, row in values(two_ranks(balance)):
        assert number_bytes == pytest.approx(2 * 4 * elements / 2, rel=0.01)
        assert row["cut"] == 8
        assert row["elements"] == sum(row["of_each_rank"]) == elements
        assert row["kept_whole"] == []


def kinds_kept_whole(rank, world_size):
    model, outside = Mixed(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
    config = Config(**EAGER, shard_optimizer=True)
    prepared, _ = magi_train.prepare(model, optimizer, config=config)
    mixing = torch.optim.Adafactor(model.parameters())
    again, kept = magi_train.prepare(model, mixing, config=config)
    reports = magi_train.report(prepared), magi_train.report(again)
    return type(kept).__name__, [
        r.plan for report in reports for r in report.rows if r.name == "sharded_optimizer"
    ]


def test_the_report_says_what_is_kept_whole(two_ranks):
    for kind, (cut, refused) in values(two_ranks(kinds_kept_whole)):
        assert sorted(cut["kept_whole"]) == [
            "1 parameters: it is no parameter of the prepared model: its gradients are not "
            "averaged",
            "1 parameters: its memory has gaps or overlaps",
            "2 parameters: it is a single number, or none",
        ]
        assert kind == "Adafactor"
        assert refused["kept_whole"] == [
            "Adafactor is not known to update each element from that element alone"
        ]


SETTINGS = [
    ({}, ELEMENTWISE),
    ({"weight_decay": 0.1}, [k for k in ELEMENTWISE if k is not torch.optim.Rprop]),
    ({"maximize": True, "foreach": True}, ELEMENTWISE),
    ({"momentum": 0.9, "weight_decay": 0.1}, [torch.optim.SGD, torch.optim.RMSprop]),
    ({"centered": True}, [torch.optim.RMSprop]),
    ({"amsgrad": True, "fused": True}, [torch.optim.Adam, torch.optim.AdamW]),
    ({"decoupled_weight_decay": True}, [torch.optim.NAdam, torch.optim.RAdam]),
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(k, o) for o, kinds in SETTINGS for k in kinds],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_the_step_of_a_slice_is_the_slice_of_the_step(kind, options):
    whole = nn.Parameter(torch.randn(1000))
    cuts = [0, 3, 500, 511, 1000]
    parts = [nn.Parameter(p.clone()) for p in whole.detach().tensor_split(cuts[1:-1])]
    options = {"lr": 0.01, **options}
    optimizers = kind([whole], **options), kind(parts, **options)
    for _ in range(7):  # RAdam rectifies from the sixth on
        whole.grad = torch.randn(1000)
        for part, start, end in zip(parts, cuts[:-1], cuts[1:], strict=True):
            part.grad = whole.grad[start:end].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat(parts), whole)
    assert why_not_sharded(optimizers[0]) == ""


class Normalized(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad /= p.grad.norm()
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.LBFGS,
        torch.optim.Adafactor,
        torch.optim.SparseAdam,
        torch.optim.Muon,
        Normalized,
    ],
    ids=lambda kind: kind.__name__,
)
def test_optimizers_that_mix_elements_are_refused(make):
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    assert why_not_sharded(optimizer).startswith(f"{make.__name__} is not known")


def test_a_replaced_step_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))])
    optimizer.step = lambda closure=None: None
    assert why_not_sharded(optimizer) == "somebody put another step on this optimizer"


def test_one_rank_and_no_optimizer(monkeypatch):
    model, config = nn.Linear(2, 2), Config(shard_optimizer=True)
    optimizer = torch.optim.SGD(model.parameters())
    prepared, kept = magi_train.prepare(model, optimizer, config=config)
    assert type(kept) is torch.optim.SGD
    notes = magi_train.report(prepared).notes
    assert notes == ["shard_optimizer changes nothing: there is one rank"]
    for build in (magi_train.prepare, magi_train.DataParallel):
        with pytest.raises(ValueError, match="shard_optimizer needs the optimizer"):
            build(nn.Linear(2, 2), config=config)
    monkeypatch.setenv("MAGI_SETTINGS", "shard_optimizer=true")
    for build in (magi_train.prepare, magi_train.DataParallel):
        with pytest.raises(ValueError, match=r"shard_optimizer \(MAGI_SETTINGS\) needs the optim"):
            build(nn.Linear(2, 2))


# Failures


def fails_in_its_step(rank, world_size):
    _, (model, optimizer) = pair("AdamW", rank)
    clip_by_norm(model, optimizer, rank, 0)
    if rank == 1:
        optimizer.param_groups[0]["betas"] = None
    clip_by_norm(model, optimizer, rank, 1)


def state_dict_on_one_rank(rank, world_size):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    config = Config(tier="eager", timeout_seconds=2.0, shard_optimizer=True)
    model, optimizer = magi_train.prepare(model, optimizer, config=config)
    if rank == 0:
        optimizer.state_dict()
    for _ in range(100):
        World.current().check()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (fails_in_its_step, "rank 1 failed: TypeError"),
        pytest.param(
            state_dict_on_one_rank,
            "did not answer 'state_dict() of sharded optimizer",
            marks=pytest.mark.full,
        ),
    ],
)
def test_no_rank_is_left_hanging(work, words):
    began = time.monotonic()
    outcomes = run_ranks(work, timeout=60)
    assert all(o.error for o in outcomes)
    assert words in outcomes[0].error
    assert time.monotonic() - began < 45
