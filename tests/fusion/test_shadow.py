"""Weight shadows: the numbers are autocast's, bit for bit, whoever writes the weights."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import magi_train
from magi_train import Config, FusionConfig
from magi_train.core.errors import StaleShadowError
from magi_train.fusion.shadow import MATRICES, VECTORS, DriftFlag, WeightShadows
from tests.close import difference, tolerance
from tests.models import MODELS, bert, llama, loss_of

EAGER_CODE = "aot_eager"


def train(kind, tier, lowering, *, shadows, dtype=torch.bfloat16, between=None, steps=3):
    """Return the losses and the prepared module after `steps` of two micro-batches."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, batch = MODELS[kind]
    model = make().train()
    prepared = magi_train.prepare(model, config=Config(tier=tier, lowering=lowering))
    if shadows:
        prepared._magi_runtime.shadows.manage(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        for micro in range(2):
            with torch.autocast("cpu", dtype):
                loss = loss_of(prepared(**batch(10 * step + micro)))
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        if between is not None:
            between(model)
    return losses, prepared


def row(prepared):
    return next(r.plan for r in magi_train.report(prepared).rows if r.name == "use_weight_shadows")


@pytest.mark.parametrize(
    ("kind", "tier", "lowering"),
    [
        ("llama", "region", EAGER_CODE),
        pytest.param("resnet", "graph", EAGER_CODE, marks=pytest.mark.full),
        pytest.param("used_twice", "graph", "inductor", marks=pytest.mark.full),
        pytest.param("bert", "graph", "inductor", marks=pytest.mark.full),
        pytest.param("llama", "region", "inductor", marks=pytest.mark.full),
        pytest.param("t5", "graph", "inductor", marks=pytest.mark.full),
    ],
)
def test_the_numbers_are_those_of_autocast(kind, tier, lowering):
    want, _ = train(kind, tier, lowering, shadows=False)
    got, prepared = train(kind, tier, lowering, shadows=True)
    assert got == want
    linears = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in prepared.modules())
    blocks = 2 if tier == "region" else 1  # of which the report has one
    assert row(prepared)["casts"] >= len(row(prepared)["weights"]) >= linears // blocks - 1


def test_fp16_is_shadowed_as_well():
    want, _ = train("llama", "graph", EAGER_CODE, shadows=False, dtype=torch.float16)
    got, prepared = train("llama", "graph", EAGER_CODE, shadows=True, dtype=torch.float16)
    assert got == want
    shadows = prepared._magi_runtime.shadows
    assert shadows.of(prepared.lm_head.weight).dtype is torch.float16


def load_other_weights(model):
    torch.manual_seed(7)
    model.load_state_dict({k: torch.randn_like(v) * 0.02 for k, v in model.state_dict().items()})


def assign_data(model):
    for p in model.parameters():
        p.data = p.data * 0.5


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


@pytest.mark.parametrize("write", [load_other_weights, assign_data, in_place])
def test_foreign_writes_are_seen(write):
    settings = ("used_twice", "graph", EAGER_CODE)
    want, _ = train(*settings, shadows=False, between=write)
    plain, _ = train(*settings, shadows=False)
    got, _ = train(*settings, shadows=True, between=write)
    assert got == want
    assert got[2:] != plain[2:]


def test_evaluation_is_a_time_to_look_again():
    """Averaged weights are often swapped in through .data, for an evaluation."""
    torch.manual_seed(0)
    model = llama()
    prepared = magi_train.prepare(model, config=Config(lowering=EAGER_CODE))
    prepared._magi_runtime.shadows.manage(model.parameters())
    batch = MODELS["llama"][1](0)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return float(prepared(**batch).loss.detach())

    before = loss()
    model.lm_head.weight.data.mul_(0.5)
    assert loss() == before, "nothing can see this write, or the test is void"
    prepared.eval()
    prepared.train()
    with torch.autocast("cpu", torch.bfloat16):
        want = float(model(**batch).loss.detach())
    assert loss() == pytest.approx(want, rel=1e-2)
    assert loss() != before


def test_a_drift_that_the_optimizer_found_is_an_error():
    _, prepared = train("llama", "graph", EAGER_CODE, shadows=True, steps=1)
    drift = prepared._magi_runtime.shadows.drift
    drift.flag.fill_(1)
    drift.fetch()
    batch = MODELS["llama"][1](0)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(StaleShadowError, match=r"written through `\.data`"),
    ):
        prepared(**batch)


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Let the interpreter take the place of a device."""
    fused_step = pytest.importorskip("magi_train.fusion.fused_step")
    if not fused_step.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setattr(fused_step, "DEVICES", ("cpu",))


def optimized(shadows, between, steps=4):
    """Train with the fused optimizer; return losses and the prepared module."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = Config(lowering=EAGER_CODE, fusion=FusionConfig(weight_shadows=shadows))
    prepared, optimizer = magi_train.prepare(model, optimizer, config=config)
    losses = []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = prepared(**MODELS["llama"][1](step)).loss
        loss.backward()
        between(step, model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, prepared


def nothing(step, model):
    pass


def decay_by_hand(step, model):
    if step == 1:
        in_place(model)


@pytest.mark.parametrize("between", [nothing, decay_by_hand])
def test_the_optimizer_writes_the_shadows(between, kernels_on_cpu):
    want, _ = optimized(False, between)
    got, prepared = optimized(True, between)
    assert got == want
    shadows = prepared._magi_runtime.shadows
    for name, p in prepared.named_parameters():
        if "norm" in name or "embed" in name:  # autocast does not cast these
            assert shadows.of(p) is None
            continue
        assert torch.equal(shadows.of(p), p.detach().bfloat16())
        assert shadows._known[id(p)] == (p._version, p.data_ptr()), "a step makes nothing stale"


def test_a_write_through_data_is_caught(kernels_on_cpu):
    def behind_the_back(step, model):
        if step == 1:
            model.lm_head.weight.data[3, 5] += 1.0

    with pytest.raises(StaleShadowError, match=r"written through `\.data`"):
        optimized(True, behind_the_back)


def test_without_autocast_nothing_is_allocated():
    torch.manual_seed(0)
    model = bert()
    prepared = magi_train.prepare(model, config=Config(lowering=EAGER_CODE))
    prepared._magi_runtime.shadows.manage(model.parameters())
    prepared(**MODELS["bert"][1](0)).loss.backward()
    shadows = prepared._magi_runtime.shadows
    assert all(shadows.of(p) is None for p in model.parameters())


def test_places_are_disjoint_aligned_and_neighbours():
    block = nn.ModuleDict({n: nn.Linear(16, 24, bias=True) for n in ("q", "k", "v")})
    block["conv"] = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    block["low"] = nn.Linear(8, 8).bfloat16()
    shadows = WeightShadows()
    shadows.manage(block.parameters())
    assert shadows.place(block["low"].weight) is None
    assert shadows.allocate(torch.bfloat16)
    assert not shadows.allocate(torch.float16), "one precision at a time"
    shadows.use(block.parameters())
    shadows.refresh()
    ends = {MATRICES: 0, VECTORS: 0}
    for name, p in block.named_parameters():
        place = shadows.place(p)
        if place is None:
            continue  # it has the low precision already
        assert place.flat == (MATRICES if p.dim() > 1 else VECTORS)
        assert place.offset % 128 == 0
        assert place.offset >= ends[place.flat]
        ends[place.flat] = place.end
        assert torch.equal(shadows.of(p), p.detach().bfloat16()), name
        assert shadows.of(p).stride() == p.stride()
    assert shadows.place(block["k"].weight).offset == shadows.place(block["q"].weight).end


def test_a_copy_of_the_model_is_not_confused_with_it():
    """Blocks that share a graph may lie otherwise, or have no shadow at all."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=3)
    twin = copy.deepcopy(model)
    config = Config(tier="region", lowering=EAGER_CODE)
    ours, theirs = magi_train.prepare(model, config=config), magi_train.prepare(twin, config=config)
    layers = model.model.layers
    mixed = [*layers[0].parameters(), *layers[2].parameters(), *layers[1].mlp.parameters()]
    ours._magi_runtime.shadows.manage(mixed)
    batch = MODELS["llama"][1](0)
    losses = []
    for prepared in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            loss = prepared(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x):
        weight = self.weight.to(torch.bfloat16, memory_format=torch.channels_last)
        x = nn.functional.conv2d(self.conv(x).bfloat16(), weight)
        return x.square().mean() + weight.permute(0, 2, 3, 1).view(-1).square().mean()


def pictures(ours, change, steps=3):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = module = Pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if ours:
        config = Config(lowering=EAGER_CODE)
        module, optimizer = magi_train.prepare(model, optimizer, config=config)
    losses = []
    for step in range(steps):
        if step == 0:
            change(model)
        images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "change", [lambda model: None, lambda model: model.to(memory_format=torch.channels_last)]
)
def test_other_strides_than_those_of_the_shadow(change, kernels_on_cpu):
    """Of a cast, and of parameters whose layout `module.to` changes behind `prepare`."""
    assert pictures(True, change) == pytest.approx(pictures(False, change), rel=1e-2)


def test_two_forwards_with_an_evaluation_between_them():
    """train() casts again; a backward that is still to come must not take that for a change."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=1)
    prepared = magi_train.prepare(model, config=Config(lowering=EAGER_CODE))
    prepared._magi_runtime.shadows.manage(model.parameters())
    losses = []
    for seed in (0, 1, 2):
        prepared.train()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(prepared(**MODELS["llama"][1](seed)).loss)
        prepared.eval()
    sum(losses).backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        sum(model(**MODELS["llama"][1](seed)).loss for seed in (0, 1, 2)).backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    assert difference(got, want) < tolerance(torch.bfloat16)


def test_a_step_in_a_graph_of_the_users_is_followed(monkeypatch):
    """A replay moves no version counter: the casts must be in the graph, and behind it."""
    weight = nn.Parameter(torch.randn(4, 4))
    shadows = WeightShadows()
    shadows.manage([weight])
    shadows.allocate(torch.bfloat16)
    shadows.use([weight])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for captured in (False, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=captured: c)
        shadows.refresh()
        weight.data.add_(1.0)  # as a replayed optimizer writes
        moved = shadows.of(weight) != weight.bfloat16()
        shadows.refresh()
        assert bool(moved.any())
        same = torch.equal(shadows.of(weight), weight.bfloat16())
        assert same == shadows._captured


def test_a_drift_is_seen_though_the_next_copy_is_under_way(monkeypatch):
    """As always where the host runs ahead of the device."""

    class NeverThere:
        def record(self):
            pass

        def query(self):
            return False

    drift = DriftFlag(torch.device("cpu"))
    monkeypatch.setattr(drift, "_event", NeverThere(), raising=False)
    drift.flag.fill_(1)
    drift.fetch()
    assert drift.raised()


@pytest.mark.parametrize("tier", ["graph", "region"])
def test_a_model_that_nobody_holds_is_freed(tier):
    """Dynamo keeps backends, and what they return, for as long as the process lives."""
    model = llama(num_hidden_layers=2)
    prepared = magi_train.prepare(model, config=Config(tier=tier, lowering=EAGER_CODE))
    prepared._magi_runtime.shadows.manage(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        prepared(**MODELS["llama"][1](0)).loss.backward()
    module, weight = weakref.ref(model), weakref.ref(model.lm_head.weight)
    del model, prepared
    gc.collect()
    assert module() is None
    assert weight() is None
