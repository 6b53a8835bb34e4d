"""The fused optimizer step: numbers beside torch's and float64, what stays torch's, what it leaves.

Runs the kernels in Triton's interpreter on CPU tensors, so the real ones must not be compiled here.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import magi_train
from magi_train import Config, FusionConfig
from magi_train.core.report import Report

pytest.importorskip("triton")
from magi_train.fusion import fused_step
from magi_train.fusion.kernels import multi_tensor
from magi_train.fusion.kernels.multi_tensor import BLOCK_ELEMENTS, AddressTable, StepScalars
from magi_train.fusion.optimizer import TakenOver, take_over
from tests.close import difference, tolerance
from tests.optimizers import ALL, give_gradients, parameters, reference_step

if not multi_tensor.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1; tests/gpu runs the kernels", allow_module_level=True)

STEPS = 3
SIZES = (1, 3, 1030, BLOCK_ELEMENTS + 5)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Nobody wants an interpreted step outside of tests, so the CPU is not taken otherwise."""
    monkeypatch.setattr(fused_step, "DEVICES", ("cpu",))


def apart(got, want):
    """Return the largest difference, each tensor relative to its largest element."""
    return difference(dict(enumerate(got)), dict(enumerate(want)))


LIMIT = tolerance(torch.float32, 1, 8 * STEPS)
"""An element is not a sum: a step rounds p, m, v, root, quotient and products once each."""


def taken(optimizer, report=None, **kwargs):
    report = report or Report()
    assert take_over(optimizer, report, **kwargs) is optimizer
    assert isinstance(optimizer, TakenOver), report.rows
    return optimizer


@pytest.mark.parametrize("name", ALL)
def test_steps_equal_torch(name):
    kind, settings = ALL[name]
    sizes = (3, 1030)
    mine, theirs = parameters(sizes), parameters(sizes)
    ours, reference = taken(kind(mine, **settings)), kind(theirs, **settings)
    for step in range(STEPS):
        for params, optimizer in ((mine, ours), (theirs, reference)):
            give_gradients(params, step)
            optimizer.step()
    assert apart(mine, theirs) <= LIMIT
    for p, q in zip(mine, theirs, strict=True):
        assert ours.state[p].keys() == reference.state[q].keys()
        for key, value in reference.state[q].items():
            assert apart([ours.state[p][key]], [value]) <= LIMIT, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW", "AMSGrad", "nesterov"])
def test_narrow_gradients_scale_and_clip_equal_the_reference_in_float64(name, dtype):
    kind, settings = ALL[name]
    params = parameters((3, 40))
    masters = [p.detach().double() for p in params]
    states = [{} for _ in params]
    optimizer = taken(kind(params, **settings))
    scalars = StepScalars(grad_scale=torch.tensor(8.0), clip=torch.tensor(0.3))
    for step in range(STEPS):
        give_gradients(params, step, dtype, scale=8.0)
        grads = [p.grad.double() for p in params]
        optimizer.grad_scale, optimizer.clip_factor = scalars.grad_scale, scalars.clip
        optimizer.step()
        assert optimizer.clip_factor is None, "the factor is for one step"
        # as torch: what is left in .grad is unscaled; clipping is not
        for p, g in zip(params, grads, strict=True):
            assert torch.equal(p.grad, (g / 8).to(dtype))
        reference_step(kind, settings, masters, grads, states, scalars)
    assert apart(params, masters) <= LIMIT


@pytest.mark.parametrize("size", SIZES)
def test_no_element_beyond_a_tensor_is_touched(size):
    """Aligned and not, whole blocks and tails: parameters are views into a larger buffer."""
    for offset in (0, 1):
        memory = torch.randn(offset + size + 7)
        before = memory.clone()
        p = nn.Parameter(memory[offset : offset + size])
        q = nn.Parameter(p.detach().clone())
        ours, theirs = taken(AdamW([p], lr=1e-2)), AdamW([q], lr=1e-2)
        give_gradients([p], 0)
        give_gradients([q], 0)
        ours.step()
        theirs.step()
        assert apart([p], [q]) <= LIMIT
        assert torch.equal(memory[:offset], before[:offset])
        assert torch.equal(memory[offset + size :], before[offset + size :])


def test_the_map_covers_every_element_once():
    sizes = (0, 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 0, 3 * BLOCK_ELEMENTS)
    table = AddressTable(sizes, torch.device("cpu"))
    assert table.blocks.tolist() == [[1, 0], [2, 0], [3, 0], [3, 1], [5, 0], [5, 1], [5, 2]]


def test_addresses_travel_only_when_they_change():
    params = parameters()
    optimizer = taken(AdamW(params))
    give_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    (table,) = optimizer._magi_step.tables.values()
    assert table.uploads == 1
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert table.uploads == 2


def test_groups_keep_their_own_settings():
    def build(params):
        groups = [
            {"params": params[:2], "lr": 1e-1, "weight_decay": 0.5},
            {"params": params[2:], "betas": (0.1, 0.2), "lr": torch.tensor(1e-2)},
        ]
        return AdamW(groups, lr=1e-3)

    mine, theirs = parameters((3, 4, 5, 6)), parameters((3, 4, 5, 6))
    ours, reference = taken(build(mine)), build(theirs)
    extra, twin = parameters((9,)), parameters((9,))
    for step in range(STEPS):
        for params, optimizer in ((mine, ours), (theirs, reference)):
            give_gradients(params, step)
            if step == 1:
                params[1].grad = None  # its step count falls behind
            optimizer.step()
        if step == 0:
            ours.add_param_group({"params": extra, "lr": 0.2})
            reference.add_param_group({"params": twin, "lr": 0.2})
            mine, theirs = mine + extra, theirs + twin
    assert apart(mine, theirs) <= LIMIT
    steps = [float(ours.state[p]["step"]) for p in mine]
    assert steps == [3.0, 2.0, 3.0, 3.0, 2.0]


def test_a_parameter_without_gradient_gets_no_state():
    params = parameters()
    optimizer = taken(AdamW(params))
    before = params[0].detach().clone()
    give_gradients(params[1:], 0)
    optimizer.step()
    assert params[0] not in optimizer.state
    assert torch.equal(params[0], before)


def test_without_momentum_there_is_no_state():
    ours, theirs = (SGD([nn.Parameter(torch.ones(3))], lr=0.1) for _ in range(2))
    for optimizer in (taken(ours), theirs):
        give_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
    assert ours.state_dict() == theirs.state_dict()


def test_empty_and_scalar_tensors():
    mine = [nn.Parameter(torch.randn(s)) for s in ((0, 4), (), (1, 1))]
    theirs = copy.deepcopy(mine)
    ours, reference = taken(AdamW(mine, lr=1e-2)), AdamW(theirs, lr=1e-2)
    for params, optimizer in ((mine, ours), (theirs, reference)):
        give_gradients(params, 0)
        optimizer.step()
    assert apart(mine, theirs) <= LIMIT
    assert float(ours.state[mine[0]]["step"]) == 1


def test_a_dense_parameter_of_any_stride_is_walked_as_it_lies():
    for make in (lambda: torch.randn(6, 5).t(), lambda: torch.randn(2, 3, 4, 4).contiguous(
            memory_format=torch.channels_last)):  # fmt: skip
        p = nn.Parameter(make())
        q = copy.deepcopy(p)
        report = Report()
        ours, reference = taken(AdamW([p], lr=1e-2), report), AdamW([q], lr=1e-2)
        for each, optimizer in ((p, ours), (q, reference)):
            torch.manual_seed(3)
            each.grad = torch.empty_like(each).copy_(torch.randn(each.shape))
            optimizer.step()
        assert apart([p], [q]) <= LIMIT
        assert ours.state[p]["exp_avg"].stride() == p.stride()
        assert not report.notes


# GradScaler


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_an_overflow(fused):
    def train(optimizer, params):
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        for step in range(4):
            give_gradients(params, step)
            if step == 1:
                params[0].grad[0] = torch.inf
            for p in params:
                p.grad *= scaler.scale(torch.ones(()))
            if step == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale()

    mine, theirs = parameters(), parameters()
    ours, reference = taken(AdamW(mine, fused=fused)), AdamW(theirs, fused=fused)
    assert train(ours, mine) == train(reference, theirs)
    assert apart(mine, theirs) <= LIMIT
    assert {float(ours.state[p]["step"]) for p in mine} == {3.0}
    assert apart([p.grad for p in mine], [p.grad for p in theirs]) <= LIMIT


@pytest.mark.parametrize("name", ["AdamW", "momentum"])
def test_found_inf_changes_nothing_at_all(name):
    kind, settings = ALL[name]
    params = parameters((3, BLOCK_ELEMENTS))
    shadows = {p: p.detach().bfloat16() for p in params}
    optimizer = taken(kind(params, **settings), shadow_of=shadows.get)
    give_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict(), list(shadows.values())))
    optimizer.found_inf = torch.tensor(2.0)  # two devices overflowed
    optimizer.step()
    after = (params, optimizer.state_dict(), list(shadows.values()))
    for old, new in zip(before[0] + before[2], after[0] + after[2], strict=True):
        assert torch.equal(old, new)
    for key, held in before[1]["state"].items():
        for name, value in held.items():
            assert torch.equal(value, after[1]["state"][key][name]), name


# What stays torch's


def test_it_is_still_the_users_optimizer():
    class Mine(AdamW):
        """Adds nothing to the step."""

    params = parameters()
    optimizer = Mine(params, lr=0.5)
    text = repr(optimizer)
    taken(optimizer)
    assert isinstance(optimizer, Mine)
    assert type(optimizer).__name__ == "Mine"
    assert repr(optimizer) == text
    give_gradients(params, 0)
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_hooks_run_once_and_may_change_arguments():
    params = parameters()
    optimizer = AdamW(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    taken(optimizer)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    give_gradients(params, 0)
    with torch.profiler.profile() as traced:
        optimizer.step()
    assert calls == ["before", "after"]
    assert "Optimizer.step#AdamW.step" in {event.name for event in traced.events()}


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_made_before_and_after(before):
    mine, theirs = parameters(), parameters()
    ours, reference = AdamW(mine, lr=1e-2), AdamW(theirs, lr=1e-2)
    if before:
        schedulers = [LambdaLR(o, lambda e: 0.5**e) for o in (ours, reference)]
    taken(ours)
    if not before:
        schedulers = [LambdaLR(o, lambda e: 0.5**e) for o in (ours, reference)]
    for step in range(STEPS):
        for params, optimizer, scheduler in zip(
            (mine, theirs), (ours, reference), schedulers, strict=True
        ):
            give_gradients(params, step)
            optimizer.step()
            scheduler.step()  # warns, which is an error here, if it saw no step
    assert ours._magi_step.tables, "the kernel did not run"
    assert apart(mine, theirs) <= LIMIT


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", ["AdamW", "AMSGrad", "momentum"])
def test_a_checkpoint_goes_both_ways(name, ours_first, fused):
    kind, settings = ALL[name]
    settings = {**settings, "fused": fused}
    params, straight = parameters(), parameters()
    first, reference = kind(params, **settings), kind(straight, **settings)
    if ours_first:
        taken(first)
    for step in range(2):
        for each, optimizer in ((params, first), (straight, reference)):
            give_gradients(each, step)
            optimizer.step()
    held = first.state_dict()
    want = reference.state_dict()
    assert held["param_groups"] == want["param_groups"]
    assert {k: list(v) for k, v in held["state"].items()} == {
        k: list(v) for k, v in want["state"].items()
    }
    buffer = io.BytesIO()
    torch.save(held, buffer)
    buffer.seek(0)
    second = kind(params, **settings)
    if not ours_first:
        taken(second)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for each, optimizer in ((params, second), (straight, reference)):
        give_gradients(each, 2)
        optimizer.step()
    assert apart(params, straight) <= LIMIT


def test_copies_are_plain_and_go_on():
    params = parameters()
    optimizer = taken(AdamW(params))
    give_gradients(params, 0)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is AdamW
        (p, q) = twin.param_groups[0]["params"]
        give_gradients([p, q], 1)
        twin.step()
        assert float(twin.state[p]["step"]) == 2


def test_autograd_notices_the_write():
    params = parameters((4,))
    optimizer = taken(AdamW(params))
    loss = params[0].square().sum()
    give_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Shadows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_shadow_is_the_rounded_parameter(name, dtype):
    kind, settings = ALL[name]
    params = parameters((3, 1030, 5))
    half = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # ties of bfloat16
    params[0].data.copy_(half)
    params[2].data.copy_(torch.tensor([0.0, torch.inf, -0.0, 1e-40, -1e38]))
    params[2].data[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN
    shadows = {p: torch.full_like(p, 7, dtype=dtype) for p in (params[0], *params[2:])}
    written = []
    optimizer = taken(
        kind(params, **settings),
        shadow_of=shadows.get, on_written=written.append,
    )  # fmt: skip
    give_gradients(params, 0)
    params[0].grad.zero_()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    versions = {p: p._version for p in params}
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy, which warns
        optimizer.step()
    assert torch.equal(params[0], half)
    for p, shadow in shadows.items():
        assert torch.equal(shadow.isnan(), p.isnan())
        assert torch.equal(shadow.float().nan_to_num(), p.to(dtype).float().nan_to_num())
        assert shadow._version > 0
    assert [list(map(id, each)) for each in written] == [[id(p) for p in shadows]]
    assert all(p._version > versions[p] for p in params)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("write", ["an element", "a small tensor", "a large tensor", "a turn"])
def test_a_foreign_write_raises_the_flag(name, write):
    kind, settings = ALL[name]
    params = parameters((3, BLOCK_ELEMENTS + 5))
    shadows = {p: p.detach().bfloat16() for p in params}
    drift = torch.zeros((), dtype=torch.int32)
    optimizer = taken(kind(params, **settings), shadow_of=shadows.get, drift=drift)
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    assert int(drift) == 0
    if write != "an element":  # later on a part of each block is compared, in turns
        optimizer._magi_step.steps = multi_tensor.FULL_CHECKS + 2
    seen = []
    for _ in range(multi_tensor.CHECK_STRIDE):
        where = {"an element": params[1].data[-1:], "a turn": params[1].data[7:8]}
        where |= {"a small tensor": params[0].data, "a large tensor": params[1].data}
        where[write].add_(1)
        optimizer.step()
        seen.append(int(drift))
    assert seen[0] == (write != "a turn")
    assert seen[-1] == 1


def test_a_shadow_of_another_shape_is_refused():
    params = parameters()
    optimizer = taken(AdamW(params), shadow_of=lambda p: torch.zeros(2, dtype=torch.bfloat16))
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="must be bfloat16 or float16"):
        optimizer.step()


# What is left to torch


class Stepping(AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: Stepping(p), "Stepping has a step of its own"),
        (lambda p: torch.optim.Adagrad(p), "Adagrad has a step of its own"),
        (lambda p: AdamW(p, capturable=True, foreach=False), "2 parameters: capturable=True"),
        (lambda p: AdamW(p, differentiable=True), "2 parameters: differentiable=True"),
        (
            lambda p: AdamW(p, betas=(torch.tensor(0.9), torch.tensor(0.99))),
            "2 parameters: betas are tensors",
        ),
        (lambda p: AdamW([x.detach().double() for x in p]), "it is float64, not float32"),
        (lambda p: AdamW([torch.zeros(4, 4)[:, :2]]), "its memory has gaps or overlaps"),
        (lambda p: AdamW([x.detach().to("meta") for x in p]), "it lies on meta"),
    ],
)
def test_what_no_kernel_fits_is_left_alone_with_a_reason(build, words):
    optimizer = build(parameters())
    kind, report = type(optimizer), Report()
    assert take_over(optimizer, report) is optimizer
    if "betas" not in words or kind is type(optimizer):
        assert type(optimizer) is kind
    assert words in str(report.rows[0].plan["left_alone"])


def test_a_step_that_somebody_replaced_is_left_alone():
    optimizer = AdamW(parameters())
    optimizer.step = lambda closure=None: 5
    report = Report()
    take_over(optimizer, report)
    assert optimizer.step() == 5
    assert "another step" in str(report.rows[0].plan)


def test_torch_steps_the_rest_of_a_group():
    def build():
        mixed = [*parameters(), nn.Parameter(torch.randn(3).double()), nn.Parameter(torch.ones(2))]
        return mixed, AdamW(mixed, lr=1e-2)

    torch.manual_seed(5)
    mine, ours = build()
    torch.manual_seed(5)
    theirs, reference = build()
    report = Report()
    taken(ours, report)
    for step in range(STEPS):
        for params, optimizer in ((mine, ours), (theirs, reference)):
            give_gradients(params[:2] + params[3:], step)
            params[2].grad = torch.ones(3).double()
            if step == 1:  # its gradient has other strides
                params[3].grad = torch.ones(4)[::2]
            optimizer.step()
    assert apart(mine, theirs) <= LIMIT
    assert float(ours.state[mine[3]]["step"]) == STEPS
    assert report.rows[0].plan["taken"] == 3
    assert report.rows[0].plan["left_alone"] == ["1 parameters: it is float64, not float32"]
    assert report.notes == [
        "fused_optimizer left a parameter to torch: its gradient has other strides"
    ]


def test_a_clip_factor_reaches_the_rest():
    params = [nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(2))]
    optimizer = taken(SGD(params, lr=1.0))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.clip_factor = torch.tensor(0.5)
    optimizer.step()
    assert all(p.tolist() == [0.5, 0.5] for p in params)


def test_sparse_gradients_raise_as_in_torch():
    params = parameters((4, 3))
    optimizer = taken(AdamW(params))
    give_gradients(params, 0)
    params[0].grad = torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=True)
    before = params[1].detach().clone()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(params[1], before)


# The public way


def test_prepare_takes_the_optimizer_unless_told_not_to():
    for fusion, expected in ((FusionConfig(), True), (FusionConfig(optimizer=False), False),
                             (None, False)):  # fmt: skip
        model = nn.Linear(2, 2)
        config = Config(lowering="aot_eager", fusion=fusion)
        prepared, optimizer = magi_train.prepare(model, AdamW(model.parameters()), config=config)
        assert isinstance(optimizer, TakenOver) is expected
        rows = [r.plan for r in magi_train.report(prepared).rows if r.name == "fused_optimizer"]
        assert rows == ([{"optimizer": "AdamW", "taken": 2, "left_alone": []}] if expected else [])


def test_on_a_cpu_torch_steps(monkeypatch):
    monkeypatch.undo()
    optimizer, report = AdamW(parameters()), Report()
    take_over(optimizer, report)
    assert type(optimizer) is AdamW
    assert report.rows[0].plan["left_alone"] == [
        "2 parameters: it lies on cpu; the kernel runs on cuda"
    ]
