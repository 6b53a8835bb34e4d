"""Variable-length attention on its kernel: numbers against float64, models, and what it gains.

The last test prints milliseconds; run it with `-s`.
"""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F

import magi_train
from magi_train import Config
from magi_train.fusion import varlen
from tests.close import difference, tolerance
from tests.fusion.test_varlen import allowed, mistral, packed
from tests.models import BATCH, SEQUENCE, gpt2, llama, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROWS, HEADS, LENGTH = 2, 4, 300


def qkv(dtype, groups, size, rows=ROWS, heads=HEADS, length=LENGTH):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((rows, n, length, size) for n in (heads, groups, groups))
    make = {"generator": g, "device": "cuda", "dtype": dtype}
    return [torch.randn(*shape, **make).requires_grad_() for shape in shapes]


def gradients(function, inputs):
    out = function(*inputs)
    return dict(zip("oqkv", [out, *torch.autograd.grad(out.square().sum(), inputs)], strict=True))


def ours(positions, back, ahead, bound):
    def run(q, k, v):
        rows, _, length, _ = q.shape
        numbers = torch.arange(1, bound + 2, device="cuda")
        begins = varlen.offsets_of(positions, numbers, (rows, length))
        return varlen.attend(q, k, v, begins, back, ahead, None, tuple(q.shape))

    return run


def dense(mask):
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "size"), [(4, 64), (2, 128), (1, 72), (2, 256)])
@pytest.mark.parametrize(("back", "ahead"), [(-1, 0), (-1, -1), (40, 0), (10, 20), (0, 0)])
def test_the_kernel(dtype, groups, size, back, ahead):
    for often, bound in ((0.0, 2), (0.02, 64), (1.0, 1024)):
        positions = packed(1, ROWS, LENGTH, often)
        inputs = qkv(dtype, groups, size)
        mask = allowed_quickly(positions, back, ahead).cuda()
        exact = [t.detach().double().requires_grad_() for t in inputs]
        want = gradients(dense(mask), exact)
        eager = gradients(dense(mask), inputs)
        got = gradients(ours(positions.cuda(), back, ahead, bound), inputs)
        limit = tolerance(dtype, LENGTH) + 2 * difference(eager, want)
        assert difference(got, want) < limit


def allowed_quickly(positions, back, ahead):
    number = (positions == 0).cumsum(-1)
    far = torch.arange(positions.shape[1])[:, None] - torch.arange(positions.shape[1])
    length = positions.shape[1]
    near = (far <= (back if back >= 0 else length)) & (-far <= (ahead if ahead >= 0 else length))
    return ((number[:, :, None] == number[:, None, :]) & near)[:, None]


def test_the_quick_mask_is_the_slow_one():
    positions = packed(3, 2, 12)
    for limits in ((-1, 0), (3, 0), (2, 1), (-1, -1)):
        assert torch.equal(allowed_quickly(positions, *limits), allowed(positions, *limits))


def text(kind, seed):
    ids = tokens(seed)
    positions = packed(seed, BATCH, SEQUENCE)
    counting = torch.arange(SEQUENCE).expand(BATCH, -1).contiguous()
    given = {"packed": positions, "counting": counting, "other": positions + 1}[kind]
    return {"input_ids": ids, "labels": ids, "use_cache": False, "position_ids": given}


def step(model, given):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**given).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "mistral": lambda: mistral("Mistral", sliding_window=5),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = MODELS[name]().cuda().train()
    twin = copy.deepcopy(model)
    ours = magi_train.prepare(twin, config=Config(tier="graph"))
    for seed, kind in enumerate(("packed", "counting", "other", "packed", "counting")):
        given = magi_train.to_device(text(kind, seed), "cuda")
        # two bfloat16 runs, each its own distance from the exact one
        limit = tolerance(torch.bfloat16, 64)
        assert difference(step(ours, given), step(model, given)) <= limit, kind
    plans = [r.plan for r in magi_train.report(ours).rows if r.name == "canonicalize_attention"]
    assert len(plans) == 3
    assert len(plans[0]["banded"]) == 2
    assert len(plans[1]["causal"]) + len(plans[1]["banded"]) == 2
    assert len(plans[2]["left_alone"]) == 2


def test_a_batch_nobody_looked_at_keeps_its_mask():
    model = llama().cuda().train()
    ours = magi_train.prepare(copy.deepcopy(model), config=Config(tier="graph"))
    given = {n: t.cuda() if torch.is_tensor(t) else t for n, t in text("packed", 0).items()}
    step(ours, given)
    report = magi_train.report(ours)
    assert any("magi_train.to_device" in note for note in report.notes)
    rows = [r for r in report.rows if r.name == "canonicalize_attention"]
    assert rows[0].plan["left_alone"]
    # what was learned ends when the tensor is written on the device
    given = magi_train.to_device(text("packed", 0), "cuda")
    step(ours, given)
    assert len([r for r in report.rows if r.plan.get("banded")]) == 1
    given["position_ids"].copy_(text("other", 0)["position_ids"])
    assert difference(step(ours, given), step(model, given)) <= tolerance(torch.bfloat16, 64)
    assert len([r for r in report.rows if r.name == "canonicalize_attention"]) == 2


def test_nothing_waits_for_the_device():
    ours = magi_train.prepare(llama().cuda().train(), config=Config(tier="graph"))
    batches = [magi_train.to_device(text("packed", seed), "cuda") for seed in range(3)]
    for given in batches:
        step(ours, given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in batches:
            step(ours, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def milliseconds(function):
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


LONG, SEQUENCES, WINDOW = 8192, 8, 1024
SHAPES = {"packed": (-1, SEQUENCES), "window": (WINDOW - 1, 1), "whole rows": (-1, 1)}


@pytest.mark.parametrize("kind", SHAPES)
def test_what_it_gains(kind):
    """Forward and backward, 2 x 8192, 32 heads of 64 over 8: dense mask, and ours."""
    back, sequences = SHAPES[kind]
    positions = (torch.arange(LONG) % (LONG // sequences)).expand(2, -1).contiguous().cuda()
    mask = allowed_quickly(positions.cpu(), back, 0).cuda()
    inputs = qkv(torch.bfloat16, 8, 64, 2, 32, LONG)

    def repeated(q, k, v):
        k, v = (t.repeat_interleave(4, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def timed(function):
        def both():
            out = function(*inputs)
            torch.autograd.grad(out.sum(), inputs)

        return milliseconds(both)

    slow = timed(repeated)
    for bound in (2 * sequences, 64, 256):
        fast = timed(ours(positions, back, 0, bound))
        text = f"\n{kind}: dense mask {slow:.2f} ms, varlen for {bound} sequences {fast:.2f} ms"
        print(text)  # noqa: T201
        assert fast < slow
