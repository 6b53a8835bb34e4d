"""FP8 linears: the numbers of the quantisation, what is quantised, and what is refused and why."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import magi_train
from magi_train import Config
from magi_train.core import hardware
from magi_train.fusion import fp8_match, quantize
from tests.close import relative_error, tolerance
from tests.models import MODELS

FULL = pytest.mark.full
LOGITS = "no product follows: it makes the logits"
M, K, N = 32, 64, 48
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FREE = fp8_match.Machine(1.0, 2.0, 1e12, 0.0)
"""A machine on which every linear gains."""


@pytest.fixture
def fp8(monkeypatch):
    """Let linears of any size run in fp8 here; the CPU has the product, only no gain from it."""
    monkeypatch.setattr(hardware, "no_fp8_because", lambda _: "")
    monkeypatch.setattr(fp8_match, "MACHINE", FREE)


def run(model, batch, precision="fp8", dtype=torch.bfloat16, manage=True, **config):
    """Return the loss, every gradient, and the plans of the passes by name."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    config = Config(**{"lowering": "aot_eager", **config}, precision=precision)
    prepared = magi_train.prepare(model, config=config)
    if manage:
        prepared._magi_runtime.shadows.manage(model.parameters())
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = prepared(**batch)
    loss = getattr(out, "loss", out)
    loss.backward()
    got = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    plans = {r.name: r.plan for r in magi_train.report(prepared).rows}
    return loss.detach(), got, plans


class Quantised(torch.autograd.Function):
    """A linear as fp8 computes it, in float64, but for roundings to bf16."""

    @staticmethod
    def round(x, dtype):
        scale = x.abs().max().clamp(min=2.0**-100) / torch.finfo(dtype).max
        return (x / scale).float().to(dtype).double() * scale

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = (Quantised.round(t, torch.float8_e4m3fn) for t in (x, weight))
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = Quantised.round(dy, torch.float8_e5m2)
        return dy @ weight, dy.flatten(0, -2).t() @ x.flatten(0, -2)


def emulated(model, batch, names):
    """Return loss and gradients in float64 with the named linears quantised."""
    model = model.double()
    model.zero_grad(set_to_none=True)

    def forward(self, x):
        weight = self.weight if isinstance(self, nn.Linear) else self.weight.t()
        y = Quantised.apply(x, weight)
        return y if self.bias is None else y + self.bias

    for name, module in model.named_modules():
        if name.split(".")[-1] in names:
            module.forward = forward.__get__(module)
    out = model(**{n: v.double() if v.is_floating_point() else v for n, v in batch.items()})
    loss = getattr(out, "loss", out)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(64, 64), (200, 72), (16, 300)])
def test_the_cast_kernel_rounds_and_turns_as_its_reference(dtype, shape):
    kernels = pytest.importorskip("magi_train.fusion.kernels.fp8_cast")
    if not kernels.interpreted():
        pytest.skip("kernels are made for the device: tests/gpu/test_fp8.py")
    x = (torch.randn(shape) * torch.rand(shape).clamp(1e-6).log()).bfloat16()
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, 1e-30, -1e-4, 1e-2])
    whole = x.abs().max().float() / torch.finfo(dtype).max
    for given in (x, x.t(), x[:, ::2]):
        for scale in (whole, whole / 3):  # the second one clamps
            want = kernels.fp8_cast_reference(given, scale, dtype)
            got = kernels.fp8_cast(given, scale, dtype, (64, 32, 4))
            for g, w in zip(got, want, strict=True):
                assert g.is_contiguous()
                assert torch.equal(g.float(), w.float())
    with pytest.raises(TypeError, match=r"takes bfloat16, got torch\.float32"):
        kernels.fp8_cast(x.float(), whole, dtype)


def test_the_cast_kernel_is_launched_on_the_device_of_its_tensor(monkeypatch):
    """Triton takes the current one, which is another where a process has several models."""
    kernels = pytest.importorskip("magi_train.fusion.kernels.fp8_cast")
    seen, inside = [], []
    cast = kernels.fp8_cast
    monkeypatch.setattr(torch.cuda, "device", lambda d: seen.append(d) or mock.MagicMock())
    monkeypatch.setattr(kernels, "fp8_cast", lambda *a: inside.append(list(seen)) or cast(*a))
    x = torch.randn(16, 16, device="cpu").bfloat16()
    if not kernels.interpreted():
        pytest.skip("kernels are made for the device: tests/gpu/test_fp8.py")
    quantize._on_device(x, x.abs().max().float(), False)
    assert inside == [[x.device]]


class One(nn.Module):
    """Linears of one input; the gradients of their results are given, and exact in bf16."""

    def __init__(self, widths=(N,), bias=False, rows=M):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(rows, K).bfloat16().float())
        self.linears = nn.ModuleList(nn.Linear(K, n, bias=bias) for n in widths)
        self.last = nn.Linear(16, 16)
        for p in self.parameters():
            p.data = p.bfloat16().float()

    def forward(self, x):
        hidden = self.embed * 1.0
        results = [linear(hidden) for linear in self.linears]
        parts = [(y.to(g.dtype) * g).sum() for y, g in zip(results, x, strict=True)]
        return sum(parts) + self.last(sum(y[:, :16] for y in results)).sum() * 0


def upstream(widths=(N,), rows=M, scale=1.0):
    g = torch.Generator().manual_seed(1)
    return {"x": [(torch.randn(rows, n, generator=g) * scale).bfloat16().float() for n in widths]}


def emulate_one(model, batch):
    """Return loss and gradients of a `One` in float64, quantised."""
    model = model.double()
    model.zero_grad(set_to_none=True)
    loss = 0
    for linear, g in zip(model.linears, batch["x"], strict=True):
        y = Quantised.apply(model.embed, linear.weight)
        loss = loss + ((y if linear.bias is None else y + linear.bias) * g.double()).sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lowering", ["aot_eager", pytest.param("inductor", marks=FULL)])
def test_forward_and_gradients_are_those_of_quantised_operands(fp8, lowering, bias):
    """Operands are exact in bf16, so both sides quantise alike: what is left is a bf16 result."""
    model, batch = One((N, 16), bias), upstream((N, 16))
    loss, got, plans = run(model, batch, lowering=lowering, fusion=None)
    plan = plans["fp8_linears"]
    assert (plan["products"], plan["tensors"]) == (6, 5)  # x is cast once for both
    want_loss, want = emulate_one(model, batch)
    got = {n: g for n, g in got.items() if not n.startswith("last")}
    assert relative_error(got, want) < tolerance(torch.bfloat16, 1, 2)
    assert float(loss) == pytest.approx(float(want_loss), rel=tolerance(torch.bfloat16, N))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(fp8, bad):
    model, batch = One(), upstream()
    batch["x"][0][0, 0] = bad
    _, got, plans = run(model, batch, fusion=None)
    assert plans["fp8_linears"]["products"] == 3
    assert not got["embed"].isfinite().any()
    assert not got["linears.0.weight"].isfinite().any()


def test_zeros_and_the_smallest_numbers_stay_finite(fp8):
    for scale in (0.0, 1e-38):
        model, batch = One(), upstream(scale=scale)
        _, got, plans = run(model, batch, fusion=None)
        assert plans["fp8_linears"]["products"] == 3
        assert all(g is None or g.isfinite().all() for g in got.values())


@pytest.mark.parametrize(
    ("name", "parts", "products"),
    [
        pytest.param("llama", PROJECTIONS, 24, marks=FULL),
        pytest.param("gpt2", {"c_attn", "c_proj", "c_fc"}, 24, marks=FULL),
        pytest.param("bert", {"query", "key", "value", "dense"}, 39, marks=FULL),
    ],
)
def test_models_are_as_far_from_double_as_quantisation_makes_them(fp8, name, parts, products):
    make, batch = MODELS[name]
    model = make()
    model.train()
    _, got, plans = run(model, batch(0))
    plan = plans["fp8_linears"]
    assert plan["products"] == products
    assert [reason for *_, reason in plan["left_alone"]] == [LOGITS]
    plain = run(model, batch(0), precision="autocast")
    assert "fp8_linears" not in plain[2]
    assert plans["saved_activations"]["saved_mib"] < plain[2]["saved_activations"]["saved_mib"]
    model = model.double()
    model.zero_grad(set_to_none=True)
    model(**batch(0)).loss.backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    ideal = relative_error(emulated(model, batch(0), parts)[1], want)
    off = relative_error(got, want)
    assert off < 1.25 * ideal + relative_error(plain[1], want), "worse than its roundings"
    assert off > 2 * relative_error(plain[1], want), "this was not fp8"


class Block(nn.Module):
    def __init__(self, wide=2 * K):
        super().__init__()
        self.up, self.down = nn.Linear(K, wide, bias=False), nn.Linear(wide, K)
        self.drop = nn.Dropout(0.0)
        self.checkpointed = False

    def inner(self, x):
        return self.drop(self.down(torch.relu(self.up(x))))

    def forward(self, x):
        if self.checkpointed:
            return x + checkpoint(self.inner, x, use_reentrant=False)
        return x + self.inner(x)


class Mlp(nn.Module):
    """Two blocks, a head, and a loss: seven products a block, of which one has no gradient."""

    def __init__(self, wide=2 * K):
        super().__init__()
        self.start = nn.Linear(K, K)
        self.blocks = nn.ModuleList(Block(wide) for _ in range(2))
        self.head = nn.Linear(K, 16)

    def forward(self, x):
        h = self.start(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h).square().mean()


def rows(count=M, seed=0):
    return {"x": torch.randn(count, K, generator=torch.Generator().manual_seed(seed))}


def reasons(plans):
    return {reason for *_, reason in plans["fp8_linears"]["left_alone"]}


def assert_fp8_apart(got, want):
    """Assert that gradients differ by the roundings of fp8, and not by less."""
    off = relative_error(got, want)
    assert off < torch.finfo(torch.float8_e5m2).eps / 2
    assert off > torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_both_tiers_quantise_the_same(fp8, tier):
    model = Mlp()
    _, want, _ = run(model, rows(), precision="autocast", tier=tier)
    _, got, plans = run(model, rows(), tier=tier)
    # the first layer's input needs no gradient; a block is a graph of its own in REGION, the rest
    # is eager there, and equal plans are one row
    count = {"graph": 2 + 2 * 6, "region": 6}
    assert plans["fp8_linears"]["products"] == count[tier]
    assert reasons(plans) == ({LOGITS} if tier == "graph" else set())
    assert_fp8_apart(got, want)


@pytest.mark.parametrize(
    ("dtype", "settings", "count", "reason"),
    [
        (torch.float16, {}, M, "its operands are float16; fp8 replaces bfloat16 products only"),
        (torch.bfloat16, {}, M + 1, "a size is no multiple of 16"),
        pytest.param(torch.bfloat16, {"dynamic": True}, M, "a size is dynamic", marks=FULL),
    ],
)
def test_refused_with_a_reason(fp8, dtype, settings, count, reason):
    model = Mlp()
    _, got, plans = run(model, rows(count), dtype=dtype, manage=False, **settings)
    assert plans["fp8_linears"]["products"] == 0
    assert reasons(plans) == {reason}
    _, want, _ = run(model, rows(count), "autocast", dtype, manage=False, **settings)
    assert relative_error(got, want) == 0.0


@FULL
def test_small_linears_stay_on_a_real_machine(fp8, monkeypatch):
    monkeypatch.setattr(fp8_match, "MACHINE", hardware.FP8_H200)
    _, _, plans = run(Mlp(), rows())
    assert plans["fp8_linears"]["products"] == 0
    assert sum("us more than it saves" in reason for reason in reasons(plans)) >= 1


def test_a_device_without_fp8_trains_as_before_and_says_so(caplog):
    model = Mlp()
    _, got, plans = run(model, rows())
    assert "fp8_linears" not in plans
    assert "fp8 is implemented for NVIDIA GPUs, and the model lies on cpu" in caplog.text
    _, want, _ = run(model, rows(), precision="autocast")
    assert relative_error(got, want) == 0.0


def test_unknown_and_useless_settings_are_errors():
    with pytest.raises(ValueError, match=r"Config\.precision must be one of"):
        Config(precision="int8")
    with pytest.raises(ValueError, match="precision='fp8' needs a captured graph"):
        Config(precision="fp8", tier="eager")


def test_checkpointed_blocks_get_the_same_numbers_and_keep_less(fp8):
    model = Mlp()
    loss, want, plans = run(model, rows(512))
    for block in model.blocks:
        block.checkpointed = True
    again, got, fewer = run(model, rows(512))
    assert fewer["fp8_linears"]["products"] == plans["fp8_linears"]["products"]
    assert again == loss
    assert relative_error(got, want) == 0.0
    _, _, wide = run(model, rows(512), precision="autocast")
    saved = [p["saved_activations"]["saved_mib"] for p in (fewer, wide, plans)]
    assert saved[0] <= saved[1] < saved[2]


@FULL
def test_dropout_draws_the_same_numbers(fp8):
    model = Mlp()
    for block in model.blocks:
        block.drop.p = 0.5
    torch.manual_seed(3)
    _, want, _ = run(model, rows(), precision="autocast")
    torch.manual_seed(3)
    _, got, plans = run(model, rows())
    assert plans["fp8_linears"]["products"] == 14
    assert_fp8_apart(got, want)


def test_frozen_unused_and_shared_weights(fp8):
    model = Mlp()
    model.unused = nn.Linear(K, K)
    model.blocks[0].up.weight.requires_grad_(False)
    model.blocks[1].down.weight = model.blocks[0].down.weight
    _, want, _ = run(model, rows(), precision="autocast")
    _, got, plans = run(model, rows())
    assert plans["fp8_linears"]["products"] == 14 - 1  # the frozen weight needs no gradient
    assert plans["fp8_linears"]["tensors"] == 5 * 3 - 1  # one weight is shared
    assert got["unused.weight"] is None
    assert got["blocks.0.up.weight"] is None
    assert_fp8_apart(got, want)


@FULL
def test_bfloat16_parameters_without_autocast(fp8):
    model = Mlp().bfloat16()
    batch = {"x": rows()["x"].bfloat16()}
    _, want, _ = run(model, batch, "autocast", None)
    _, got, plans = run(model, batch, "fp8", None)
    assert plans["fp8_linears"]["products"] == 14
    assert_fp8_apart(got, want)


@FULL
def test_gradients_accumulate(fp8):
    model = Mlp()
    parts = [run(model, rows(seed=i))[1] for i in range(2)]
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    prepared = magi_train.prepare(model, config=Config(precision="fp8", lowering="aot_eager"))
    for i in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            prepared(**rows(seed=i)).backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    want = {n: parts[0][n] + parts[1][n] for n in got}
    assert relative_error(got, want) < tolerance(torch.float32, 2)


def sized(*shapes, shared=False):
    """Return linears with their backward, of sizes only; `shared` if they read one input."""
    graph = torch.fx.Graph()

    def matrix(name, *size):
        node = graph.placeholder(name) if name[0] == "w" else graph.call_function(torch.relu)
        node.meta["val"] = torch.empty(*size, device="meta", dtype=torch.bfloat16)
        return fp8_match.Operand(node, False, node)

    found, x = [], None
    for i, (m, k, n) in enumerate(shapes):
        x = x if shared and x is not None else matrix("x", m, k)
        weight, dy = matrix(f"w{i}", n, k), matrix("dy", m, n)
        products = [graph.call_function(torch.mm) for _ in range(3)]
        found.append(fp8_match.Linear(*products, x, weight, dy, (m, k, n)))
    return found


def chosen(found):
    gains, left = fp8_match.profitable(found, hardware.FP8_H200)
    assert len(gains) + len(left) == len(found)
    assert all(gain > 0 for gain in gains.values())
    return [one.shape for one in found if one.forward in gains]


def test_what_pays_on_an_h200():
    wide, skinny, tiny = (8192, 2048, 16384), (8192, 2048, 256), (64, 2048, 2048)
    assert chosen(sized(wide)) == [wide]
    assert chosen(sized(skinny)) == []
    assert chosen(sized(tiny)) == []
    assert chosen(sized(wide, skinny, tiny)) == [wide]


def test_one_cast_of_the_input_is_shared():
    part = (8192, 2048, 768)
    assert chosen(sized(part)) == []
    assert chosen(sized(part, part, part, shared=True)) == [part] * 3
    assert chosen(sized(part, part, part)) == []


def train_on_a_rank(rank, _, refusal):
    torch.manual_seed(0)
    here = mock.patch.object(hardware, "no_fp8_because", return_value=refusal * rank)
    with here, mock.patch.object(fp8_match, "MACHINE", FREE):
        _, got, plans = run(Mlp(), rows(seed=rank))
    return plans.get("fp8_linears", {}), {n: g.tolist() for n, g in got.items()}


@FULL
def test_ranks_have_one_plan_and_one_gradient(two_ranks):
    first, second = two_ranks(train_on_a_rank, "")
    assert first.error == second.error == ""
    assert first.value == second.value
    assert first.value[0]["products"] == 14
    for outcome in two_ranks(train_on_a_rank, "the card is too old"):  # rank 1's: nobody may
        assert outcome.error == ""
        assert outcome.value[0] == {}


@FULL
def test_a_memory_budget_holds_and_changes_nothing(fp8):
    model = Mlp()
    _, want, plans = run(model, rows(512))
    _, _, free = run(model, rows(512), memory_budget_gib=64)
    without = free["fit_budget"]["without_gib"]
    _, got, bounded = run(model, rows(512), memory_budget_gib=0.98 * without)
    assert bounded["fp8_linears"]["products"] == plans["fp8_linears"]["products"]
    assert bounded["fit_budget"]["planned_gib"] <= 0.98 * without
    assert relative_error(got, want) == 0.0


@FULL
def test_a_chunked_loss_stays_in_bfloat16(fp8):
    fusion = magi_train.FusionConfig(loss_chunk_mib=0.01)
    model = MODELS["llama"][0]()
    prepared = magi_train.prepare(
        model, config=Config(precision="fp8", lowering="aot_eager", fusion=fusion)
    )
    step = magi_train.prepare_step(lambda batch: prepared(**batch).loss, prepared)
    with torch.autocast("cpu", torch.bfloat16):
        step(MODELS["llama"][1](0)).backward()
    plans = {r.name: r.plan for r in magi_train.report(prepared).rows}
    assert len(plans["chunk_linear_cross_entropy"]["chunked"]) == 1
    assert plans["fp8_linears"]["products"] == 2 * 7 * 3
    assert reasons(plans) == {"its gradients are no products of the backward"}
