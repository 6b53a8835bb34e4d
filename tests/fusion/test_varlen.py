"""Packed sequences and windows: the op, the proof of their masks, the rewritten graphs, models."""

import copy

import pytest
import torch
import torch.nn.functional as F

import magi_train
from magi_train import Config
from magi_train.core.facts import COUNTING, Fact
from magi_train.core.passes import PassContext
from magi_train.fusion import varlen
from magi_train.fusion.attention import ATTENTION, CanonicalizeAttention
from tests.close import difference, tolerance
from tests.models import BATCH, SEQUENCE, VOCABULARY, WIDTH, gpt2, llama, loss_of, tokens

HEADS, GROUPS, LENGTH, SIZE = 4, 2, 12, 8
ROWS = 3
PACKED = Fact("packed", 64)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """No gain there, but the same rewrite: the reference stands in for the kernel."""
    monkeypatch.setitem(varlen.SUPPORTED, "cpu", (torch.float32, torch.bfloat16))


def packed(seed, rows=ROWS, length=LENGTH, often=0.25):
    """Return positions that begin again at random places, other ones in each row."""
    begins = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < often
    begins[:, 0] = True
    number = torch.arange(length)
    return number - torch.where(begins, number, 0).cummax(-1).values


def allowed(positions, back=-1, ahead=0):
    """Return what a mask of packed sequences allows, pair by pair."""
    rows, length = positions.shape
    found = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for r in range(rows):
        number = (positions[r] == 0).cumsum(0).tolist()
        for i in range(length):
            for j in range(length):
                near = (back < 0 or i - j <= back) and (ahead < 0 or j - i <= ahead)
                found[r, 0, i, j] = near and number[i] == number[j]
    return found


def qkv(seed=0, dtype=torch.float32, groups=GROUPS, rows=ROWS, length=LENGTH):
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, n, length, SIZE) for n in (HEADS, groups, groups))
    return [torch.randn(*s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def with_gradients(function, inputs):
    out = function(*inputs)
    return dict(zip("oqkv", [out, *torch.autograd.grad(out.square().sum(), inputs)], strict=True))


def dense(mask, scale=None):
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )


def check(function, inputs, mask, scale=None):
    """Compare with attention under `mask` in float64: as near as eager attention, or nearly so.

    Where a query sees one key its gradients cancel, for us and for eager.
    """
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = with_gradients(dense(mask, scale), exact)
    eager = with_gradients(dense(mask, scale), inputs)
    limit = tolerance(inputs[0].dtype, HEADS * LENGTH * SIZE) + 2 * difference(eager, want)
    assert difference(with_gradients(function, inputs), want) < limit


def some(cases, *always):
    """Return the names of all cases; those not in `always` take part in `make test-all` only."""
    return [n if n in always else pytest.param(n, marks=pytest.mark.full) for n in cases]


# -- the op ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("back", "ahead"), [(-1, 0), (-1, -1), (2, 0), (1, 3), (0, 0)])
def test_the_op_is_masked_attention(back, ahead, dtype):
    for seed in range(6):
        positions = packed(seed, often=[0.0, 0.25, 1.0][seed % 3])
        inputs = qkv(seed, dtype, groups=[1, GROUPS, HEADS][seed // 2])
        numbers = torch.arange(1, ROWS * LENGTH + 2 + seed)  # more than there are sequences

        def ours(q, k, v, positions=positions, numbers=numbers):
            begins = varlen.offsets_of(positions, numbers, (ROWS, LENGTH))
            return varlen.attend(q, k, v, begins, back, ahead, 0.3, (ROWS, HEADS, LENGTH, SIZE))

        check(ours, inputs, allowed(positions, back, ahead), 0.3)


def test_the_op_is_well_formed():
    """Fake shapes, autograd and functionalization, as torch's own check sees them."""
    q, k, v = (t.detach().transpose(1, 2).flatten(0, 1) for t in qkv())
    inputs = [t.contiguous().requires_grad_() for t in (q, k, v)]
    offsets = torch.tensor([0, 5, 5, 20, 36, 36], dtype=torch.int32)
    torch.library.opcheck(varlen.varlen_attention, (*inputs, offsets, LENGTH, 3, 0, 0.3))


def test_the_result_lies_as_is_promised_whatever_the_query_does():
    """Heads that lie one behind the other: the kernel, and its reference, answer as the query."""
    q, k, v = (t.detach()[0].transpose(0, 1) for t in qkv(groups=HEADS))
    offsets = torch.tensor([0, 5, LENGTH], dtype=torch.int32)
    assert not varlen.reference(q, k, v, offsets, 3, 0, 0.3)[0].is_contiguous()
    out, logsumexp = varlen.varlen_attention(q, k, v, offsets, LENGTH, 3, 0, 0.3)
    assert out.is_contiguous()
    assert logsumexp.is_contiguous()


# -- masks of packed sequences -----------------------------------------------------------------


def by_difference(positions):
    """As transformers tells sequences: a step that is not one."""
    jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    number = jumps.cumsum(-1)
    return (number[:, :, None] == number[:, None, :])[:, None]


def by_zero(positions):
    number = (positions == 0).cumsum(-1)
    return (number[:, :, None] == number[:, None, :])[:, None]


def by_start(positions):
    start = torch.arange(LENGTH) - positions
    return (start[:, :, None] == start[:, None, :])[:, None]


def ahead():
    """How far each key lies ahead of each query; made in the graph, as libraries do."""
    number = torch.arange(LENGTH)
    return number - number[:, None]


def causal():
    return ahead() <= 0


def window():
    return ahead() > -4


MASKS = {
    "as transformers": (lambda p: by_difference(p) & causal(), (-1, 0)),
    "zeros counted": (lambda p: by_zero(p) & causal(), (-1, 0)),
    "by start": (lambda p: by_start(p) & causal(), (-1, 0)),
    "positions compared": (
        lambda p: by_zero(p) & (p[:, :, None] >= p[:, None, :])[:, None],
        (-1, 0),
    ),
    "in both directions": (by_zero, (-1, -1)),
    "and a window": (lambda p: by_zero(p) & causal() & window(), (3, 0)),
    "a window around": (lambda p: by_zero(p) & window() & window().t(), (3, 3)),
    "added": (lambda p: torch.where(by_zero(p) & causal(), 0.0, -torch.inf), (-1, 0)),
    "for every head": (lambda p: (by_zero(p) & causal()).expand(-1, HEADS, -1, -1), (-1, 0)),
}


def but(row, column, value):
    """A mask with one element of its own."""

    def build(p):
        number = torch.arange(LENGTH)
        hit = (number[:, None] == row) & (number == column)
        return (by_zero(p) & causal() & ~hit) | hit if value else by_zero(p) & causal() & ~hit

    return build


NEAR_MISSES = {
    "one more": but(7, 2, True),
    "one more ahead": but(2, 3, True),
    "one less": but(7, 2, False),
    "the sequence before too": lambda p: (
        ((p == 0).cumsum(-1)[:, :, None] - (p == 0).cumsum(-1)[:, None, :] <= 1)[:, None] & causal()
    ),
    "strict": lambda p: by_zero(p) & (ahead() < 0),
    "the first row for all": lambda p: by_zero(p[:1]) & causal(),
    "rows rolled": lambda p: by_zero(p.roll(1, 0)) & causal(),
    "only long ones": lambda p: by_zero(p) & causal() | (causal() & (p == 0).all()),
    "the row before is padding": lambda p: by_zero(p) & causal() & (p >= 1)[:, None, None, :],
    "a bias": lambda p: torch.where(by_zero(p) & causal(), 0.0, -3.0),
    "even ones": lambda p: by_zero(p) & causal() & ((p == 0).cumsum(-1) % 3 > 0)[:, None, :, None],
    "another input": lambda p: by_zero(p) & causal() & OTHER[:, None, None],
}
OTHER = torch.ones(ROWS, LENGTH, dtype=torch.bool)


def captured(build, *inputs, repeats=HEADS // GROUPS, **settings):
    """Return Dynamo's graph of attention under a mask made of positions, keys repeated."""

    def function(q, k, v, p):
        k, v = (t[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(q.shape) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(p), **settings)

    graphs = []
    backend = lambda gm, _: graphs.append(gm) or gm.forward  # noqa: E731
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return graphs[-1]


def planned(gm, fact=PACKED):
    facts = {n.name: fact for n in gm.graph.find_nodes(op="placeholder") if n.target == "L_p_"}
    return CanonicalizeAttention().plan(gm, PassContext("cpu", facts=facts))


def applied(gm, plan):
    CanonicalizeAttention().apply(gm, plan, PassContext("cpu"))
    gm.graph.lint()
    gm.recompile()
    assert not [n for n in gm.graph.nodes if n.target in ATTENTION]

    names = [n.target for n in gm.graph.find_nodes(op="placeholder")]

    def run(q, k, v, p):
        given = {"L_q_": q, "L_k_": k, "L_v_": v, "L_p_": p}
        return gm(*(given[n] for n in names))[0]

    return run


@pytest.mark.parametrize("kind", some(MASKS, "as transformers", "and a window"))
def test_packed_sequences(kind):
    build, limits = MASKS[kind]
    gm = captured(build, *qkv(), packed(0))
    plan = planned(gm)
    (band,) = plan.banded
    assert (band.back, band.ahead, band.sequences) == (*limits, PACKED.sequences)
    assert plan.assumed == (band.positions,)
    assert not plan.left_alone
    run = applied(gm, plan)
    keys = [n.args[1] for n in gm.graph.nodes if n.target is varlen.varlen_attention]
    assert [k.meta["example_value"].shape[1] for k in keys] == [GROUPS], "heads are not repeated"
    for seed in range(12):
        positions, inputs = packed(seed, often=[0.0, 0.1, 0.4, 1.0][seed % 4]), qkv(seed)
        check(lambda q, k, v, p=positions: run(q, k, v, p), inputs, allowed(positions, *limits))


@pytest.mark.parametrize("kind", some(NEAR_MISSES, "one more", "rows rolled", "strict"))
def test_near_misses_stay(kind):
    gm = captured(NEAR_MISSES[kind], *qkv(), packed(0))
    plan = planned(gm)
    assert not plan.banded + plan.causal + plan.unmasked
    assert plan.left_alone


def test_nothing_is_assumed_without_the_fact():
    gm = captured(MASKS["zeros counted"][0], *qkv(), packed(0))
    plan = CanonicalizeAttention().plan(gm, PassContext("cpu"))
    assert "the mask depends on l_p_" in plan.left_alone[0][1]
    assert planned(gm, COUNTING).causal, "one sequence a row is plainly causal"


def test_one_row_of_positions_for_the_batch():
    build = MASKS["as transformers"][0]
    gm = captured(lambda p: build(p.expand(ROWS, -1)), *qkv(), packed(0, rows=1))
    plan = planned(gm)
    assert plan.banded[0].sequences == PACKED.sequences * ROWS
    run, inputs, positions = applied(gm, plan), qkv(), packed(3, rows=1)
    check(lambda q, k, v: run(q, k, v, positions), inputs, allowed(positions))


WINDOWS = {
    "window": (lambda p: causal() & window(), (3, 0)),
    "around": (lambda p: window() & window().t(), (3, 3)),
    "all back, two ahead": (lambda p: ahead() <= 2, (-1, 2)),
    "diagonal": (lambda p: ahead() == 0, (0, 0)),
}


@pytest.mark.parametrize("kind", some(WINDOWS, "window"))
def test_windows(kind):
    build, limits = WINDOWS[kind]
    gm = captured(build, *qkv(), packed(0), scale=0.2)
    plan = CanonicalizeAttention().plan(gm, PassContext("cpu"))
    (band,) = plan.banded
    assert (band.back, band.ahead, band.positions) == (*limits, "")
    run, inputs = applied(gm, plan), qkv(1)
    mask = allowed(torch.arange(LENGTH).expand(ROWS, -1), *limits)
    check(lambda q, k, v: run(q, k, v, None), inputs, mask, 0.2)


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        gm = captured(MASKS["and a window"][0], *qkv(), packed(0))
        plan = planned(gm)
        assert plan.banded[0].dtype == "bfloat16"
        run, inputs = applied(gm, plan), qkv()
        got = with_gradients(lambda q, k, v: run(q, k, v, packed(1)), inputs)
    assert got["o"].dtype is torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = with_gradients(dense(allowed(packed(1), 3, 0)), exact)
    assert difference(got, want) < tolerance(torch.bfloat16, LENGTH * SIZE)


REFUSED = {
    "dropout": (torch.float32, {"dropout_p": 0.5}, "dropout"),
    "dtype": (torch.float16, {}, "takes float32, bfloat16, and not torch.float16"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_op_does_not_take(kind):
    dtype, settings, words = REFUSED[kind]
    for build in (MASKS["zeros counted"][0], WINDOWS["window"][0]):
        gm = captured(build, *qkv(dtype=dtype), packed(0), **settings)
        plan = planned(gm)
        assert not plan.banded
        assert words in plan.left_alone[0][1]


def test_tensors_the_op_does_not_take(monkeypatch):
    def why(shape, other=None, device="cpu"):
        q, k = torch.empty(shape, device=device), torch.empty(other or shape, device=device)
        return varlen.refusal(q, k, k, torch.float32, 0.0)

    assert not why((1, 4, 8, 16), (1, 2, 8, 16))
    assert "eights" in why((1, 4, 8, 12))
    assert "eights" in why((1, 4, 8, 264))
    assert "differ" in why((1, 4, 8, 16), (1, 3, 8, 16))
    assert "differ" in why((1, 4, 8, 16), (1, 4, 9, 16))
    assert "four known" in why((4, 8, 16))
    assert "no faster than a mask" in why((1, 4, 8, 16), device="meta")


# -- models ------------------------------------------------------------------------------------


def text(kind, seed):
    ids = tokens(seed)
    positions = {
        "packed": packed(seed, BATCH, SEQUENCE),
        "counting": torch.arange(SEQUENCE).expand(BATCH, -1).contiguous(),
        "other": packed(seed, BATCH, SEQUENCE) + 1,
    }
    given = {} if kind == "none" else {"position_ids": positions[kind]}
    return {"input_ids": ids, "labels": ids, "use_cache": False, **given}


def mistral(kind, **more):
    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def qwen():
    return mistral("Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)


MODELS = {
    "llama": (lambda: llama(num_hidden_layers=1), [(-1, 0)]),
    "gpt2": (gpt2, [(-1, 0)] * 2),
    "mistral": (lambda: mistral("Mistral", sliding_window=5), [(4, 0)] * 2),
    "qwen": (qwen, [(-1, 0), (4, 0)]),
}
"""A model, and what each of its layers sees of its sequence."""


@pytest.mark.parametrize("name", some(MODELS, "llama"))
def test_library_models(name):
    """Packed, one sequence a row, and positions that are neither: three forms, one function."""
    model = MODELS[name][0]().train()
    twin = copy.deepcopy(model)
    ours = magi_train.prepare(twin, config=Config(lowering="aot_eager"))
    for seed, kind in enumerate(("packed", "counting", "other", "packed")):
        for m, call in ((model, model), (twin, ours)):
            m.zero_grad()
            loss_of(call(**text(kind, seed))).backward()
        want, got = ({n: p.grad for n, p in m.named_parameters()} for m in (model, twin))
        assert difference(got, want) <= tolerance(torch.float32, SEQUENCE * WIDTH), kind
    rows = magi_train.report(ours).rows
    plans = [r.plan for r in rows if r.name == "canonicalize_attention"]
    assert len(plans) == 3, "no form is compiled twice"
    limits = MODELS[name][1]
    assert [(b["back"], b["ahead"]) for b in plans[0]["banded"]] == limits
    windows = len([limit for limit in limits if limit != (-1, 0)])
    assert len(plans[1]["causal"]) == len(limits) - windows
    assert len(plans[1]["banded"]) == windows
    assert len(plans[2]["left_alone"]) == len(limits)
    assert magi_train.report(ours).tier == "graph"


@pytest.mark.full
def test_generated_code_is_right():
    """Inductor takes the op, its layouts and the search for the beginnings."""

    def ours(q, k, v, positions):
        numbers = torch.arange(1, ROWS * LENGTH + 2)
        begins = varlen.offsets_of(positions, numbers, (ROWS, LENGTH))
        return varlen.attend(q, k, v, begins, 3, 0, None, (ROWS, HEADS, LENGTH, SIZE))

    compiled = torch.compile(ours, fullgraph=True)
    for seed in range(3):
        inputs, positions = qkv(seed), packed(seed)
        check(lambda q, k, v, p=positions: compiled(q, k, v, p), inputs, allowed(positions, 3, 0))


def test_kept_on_the_cpu(monkeypatch):
    monkeypatch.delitem(varlen.SUPPORTED, "cpu")
    gm = captured(MASKS["zeros counted"][0], *qkv(), packed(0))
    plan = planned(gm)
    assert not plan.banded
    assert "the mask depends on l_p_; on cpu" in plan.left_alone[0][1]
