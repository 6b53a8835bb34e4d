"""Dropout's masks as bits: which, their distribution, and what training with them computes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import magi_train
from magi_train import Config, FusionConfig, lower
from magi_train.capture import generated_code_passes
from magi_train.core import compat
from magi_train.fusion.dropout import SMALLEST, UNPACKED, PackDropout

pytest.importorskip("triton")
from magi_train.fusion.kernels import dropout_bits as kernels
from magi_train.fusion.kernels import multi_tensor

ON = FusionConfig(packed_dropout=True)
ROWS, WIDTH = 2048, 256
assert ROWS * WIDTH == SMALLEST


def unpacked(bits):
    return ((bits.unsqueeze(-1) >> torch.arange(8)) & 1).flatten(-2).bool()


def train(model, *inputs, seed=0, **config):
    """Return the prepared model and the code of a step from that seed; gradients are in `model`."""
    torch._dynamo.reset()
    prepared = magi_train.prepare(model, config=Config(fusion=ON, progress=False, **config))
    model.zero_grad()
    torch.manual_seed(seed)
    _, codes = run_and_get_code(lambda: prepared(*inputs).sum().backward())
    return prepared, "".join(codes)


def plan_of(prepared):
    rows = [r for r in magi_train.report(prepared).rows if r.name == "pack_dropout"]
    return rows[-1].plan


# -- the kernel ------------------------------------------------------------------------------------


@pytest.mark.skipif(not multi_tensor.interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", [(7, 33), (1, 1), (3, kernels.BLOCK), (0, 4)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.96])
def test_the_kernel_gives_the_bits_of_its_reference(shape, p):
    seeds = torch.tensor([0, 2**63 - 1, -5, 1234567890123456789])
    for index in range(len(seeds)):
        got = kernels.dropout_bits(seeds, index, list(shape), p)
        assert torch.equal(got, kernels.dropout_bits_reference(seeds, index, list(shape), p))


def test_the_words_are_philox_4x32_10():
    # Random123's known answers for a counter and a key of zeros, and of ones.
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for half in halves:
        for limit in (half, half + 1):  # an element is kept from its own number on
            bits = kernels.dropout_bits_reference(torch.zeros(1).long(), 0, [1], limit / 2**16)
            assert unpacked(bits).tolist() == [h >= limit for h in halves]


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5, 0.9])
def test_bits_are_independent_and_kept_with_the_right_probability(p):
    seeds = torch.tensor([17, 18])
    first, second = (
        unpacked(kernels.dropout_bits_reference(seeds, i, [2**16], p)).double() for i in range(2)
    )
    n, spread = first.numel(), math.sqrt(p * (1 - p))
    for kept in (first, second):
        assert abs(kept.mean() - (1 - p)) < 5 * spread / math.sqrt(n) + 2**-17
        centred = kept - kept.mean()
        for apart in (1, 2, 7, 8, 64):
            shared = (centred[apart:] * centred[:-apart]).mean() / spread**2
            assert abs(shared) < 5 / math.sqrt(n)
    shared = ((first - first.mean()) * (second - second.mean())).mean() / spread**2
    assert abs(shared) < 5 / math.sqrt(n)


# -- what is planned and refused -------------------------------------------------------------------


class Dropped(nn.Module):
    """Dropouts behind products of a weight, so that gradients show which elements were kept."""

    def __init__(self, count=1, p=0.25, width=WIDTH):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(ROWS, width) for _ in range(count))
        self.p = p

    def forward(self, x):
        for weight in self.weights:
            x = F.dropout(x * weight, self.p)
        return x


def test_masks_are_bits_forward_and_backward():
    model = Dropped()
    x = torch.ones(ROWS, WIDTH)
    prepared, code = train(model, x)
    assert plan_of(prepared) == {"packed": ["gt"], "left_alone": []}
    assert "magi_train.dropout_bits" in code
    kept = model.weights[0].grad != 0
    assert set(model.weights[0].grad.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(kept.double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / kept.numel())
    torch.manual_seed(0)
    out = prepared(x)
    assert torch.equal(out != 0, kept), "the forward keeps what the backward does"
    assert not torch.equal(prepared(x) != 0, kept), "another step, another mask"


@pytest.mark.usefixtures("idle_kernels")
def test_each_of_several_masks_is_saved_as_bits():
    prepared, _ = train(Dropped(4), torch.randn(ROWS, WIDTH))
    (saved,) = [r for r in magi_train.report(prepared).rows if r.name == "saved_activations"]
    floats = 4 * ROWS * WIDTH * 4 / 2**20  # at most: what each product's gradient needs
    assert saved.plan["saved_mib"] <= floats + 4 * ROWS * WIDTH / 8 / 2**20 + 0.001


@pytest.mark.usefixtures("idle_kernels")
def test_masks_are_written_in_the_forward_and_read_from_bits_in_the_backward(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graphs = []
    monkeypatch.setattr(lower, "_note_saved", lambda _, graph: graphs.append(graph))
    train(Dropped(), torch.ones(ROWS, WIDTH))
    found = [[n for n in graph.nodes if UNPACKED in n.meta] for graph in graphs]
    assert [len(masks) for masks in found] == [1, 1]
    assert [bool(masks[0].meta.get(compat.IN_MEMORY)) for masks in found] == [True, False]


@pytest.mark.usefixtures("idle_kernels")
def test_other_sizes_and_probabilities_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(ROWS, WIDTH))

        def forward(self, x):
            y = F.dropout(x * self.weight, 0.001)
            y = y + F.dropout(x * self.weight, 0.99)
            y = y + F.dropout((x * self.weight)[:64], 0.1).mean()
            y = y + F.dropout((x * self.weight).reshape(WIDTH // 4, 4 * ROWS)[:, :-2], 0.1).mean()
            return y + torch.rand_like(x)

    prepared, code = train(Model(), torch.ones(ROWS, WIDTH))
    reasons = [reason for _, reason in plan_of(prepared)["left_alone"]]
    assert "magi_train.dropout_bits" not in code
    for said in (
        "a probability of 0.001", "a probability of 0.99", "16384 elements; from 524288",
        "last dimension, 8190,", "not compared",
    ):  # fmt: skip
        assert any(said in reason for reason in reasons), (said, reasons)


def test_the_switch():
    def chosen(fusion, device, **more):
        passes = generated_code_passes(Config(fusion=fusion, **more), device)
        return any(isinstance(each, PackDropout) for each in passes)

    assert [chosen(FusionConfig(), d) for d in ("cuda", "cpu")] == [True, False]
    assert [chosen(ON, d) for d in ("cuda", "cpu")] == [True, True]
    assert not chosen(FusionConfig(packed_dropout=False), "cuda")
    assert not chosen(ON, "cuda", lowering="aot_eager")
    assert not chosen(None, "cuda")


# -- with the rest ---------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two blocks with dropouts, which a checkpoint or a memory budget can run again."""

    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.25), nn.Linear(WIDTH, WIDTH)
            )
            for _ in range(2)
        )
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x.square()


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["budget", "checkpoint"])
def test_masks_that_are_drawn_again_are_the_same(how):
    x = torch.randn(ROWS, WIDTH)
    plain = Layers()
    train(plain, x)
    other = Layers(checkpointed=how == "checkpoint")
    prepared, code = train(other, x, memory_budget_gib=0.018 if how == "budget" else None)
    assert len(plan_of(prepared)["packed"]) == 2
    for name, got in gradients(other).items():
        torch.testing.assert_close(got, gradients(plain)[name])
    if how == "checkpoint":
        assert code.count("magi_train.dropout_bits.default(") > 2, "drawn again in the backward"


def test_the_region_tier_and_the_seed():
    model, x = Layers(), torch.randn(ROWS, WIDTH)
    prepared, code = train(model, x, tier="region")
    assert "magi_train.dropout_bits" in code
    first = copy.deepcopy(gradients(model))
    model.zero_grad()
    torch.manual_seed(0)
    prepared(x).sum().backward()
    assert all(torch.equal(first[n], g) for n, g in gradients(model).items())
    model.zero_grad()
    prepared(x).sum().backward()
    assert not all(torch.equal(first[n], g) for n, g in gradients(model).items())


def test_numbers_that_are_cut_off_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(ROWS, WIDTH))

        def forward(self, x):
            return x * self.weight * (torch.rand_like(x).int() > 0.5)

    model = Model()
    prepared, _ = train(model, torch.ones(ROWS, WIDTH))
    assert not plan_of(prepared)["packed"]
    assert not model.weight.grad.any()


def test_batches_of_changing_sizes():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return F.dropout(x * self.weight, 0.5)

    model = Rows()
    prepared, _ = train(model, torch.ones(ROWS, WIDTH))
    for rows in (ROWS + 8, ROWS + 24, ROWS + 100):
        x = torch.ones(rows, WIDTH, requires_grad=True)
        out = prepared(x)
        out.sum().backward()
        assert torch.equal(out != 0, x.grad != 0)
        assert abs((out != 0).double().mean() - 0.5) < 2.5 / math.sqrt(rows * WIDTH)
    assert plan_of(prepared)["packed"], "of the form for any number of rows"
