"""Padding masks: a batch without padding trains without the mask, every other one with it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train import Config, FusionConfig
from magi_train.capture import Region
from tests.close import difference, tolerance
from tests.models import BATCH, SEQUENCE, WIDTH, bert, gpt2, llama, loss_of, t5, tokens

LIMIT = tolerance(torch.float32, SEQUENCE * WIDTH)
EAGER_CODE = Config(lowering="aot_eager")


def padding(kind, dtype=torch.int64):
    mask = torch.ones(BATCH, SEQUENCE, dtype=dtype)
    if kind == "left":
        mask[1, :5] = 0
    elif kind == "right":
        mask[2, 9:] = 0
    elif kind == "one":
        mask[BATCH - 1, SEQUENCE // 2] = 0
    return mask


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters()}


def trained_alike(model, twin, ours, batches):
    """Run batches through `model` and `ours`, which trains `twin`; the largest difference."""
    apart = []
    for batch in batches:
        for m, call in ((model, model), (twin, ours)):
            m.zero_grad()
            loss_of(call(**batch)).backward()
        apart.append(difference(gradients(twin), gradients(model)))
    return max(apart)


def attention_rows(prepared):
    rows = magi_train.report(prepared).rows
    return [r.plan for r in rows if r.name == "canonicalize_attention"]


def text(kind, seed=0):
    ids = tokens(seed)
    return {"input_ids": ids, "attention_mask": padding(kind), "labels": ids}


UNPADDED_FIRST, PADDED_FIRST = ("none", "left", "none", "right"), ("right", "none", "one", "none")


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (llama, UNPADDED_FIRST),
        (bert, PADDED_FIRST),
        pytest.param(gpt2, PADDED_FIRST, marks=pytest.mark.full),
        pytest.param(t5, UNPADDED_FIRST, marks=pytest.mark.full),
    ],
)
def test_library_models_with_and_without_padding(make, order):
    model = make().train()
    twin = copy.deepcopy(model)
    ours = magi_train.prepare(twin, config=EAGER_CODE)
    batches = [text(kind, seed) for seed, kind in enumerate(order)]
    assert trained_alike(model, twin, ours, batches) <= LIMIT
    plans = attention_rows(ours)
    assert len(plans) == 2, "one graph without facts, one for the fact"
    with_fact = next(p for p in plans if p["assumed"])
    assert with_fact["assumed"] == ["l_kwargs_attention_mask_"]
    assert with_fact["causal"] or with_fact["unmasked"]
    without = next(p for p in plans if not p["assumed"])
    assert not without["causal"] + without["unmasked"]
    if make is t5:  # its own attention has a learned bias, the crossed one only the mask
        assert len(with_fact["unmasked"]) == 2
        assert len(with_fact["left_alone"]) == 4
    assert magi_train.report(ours).tier == "graph"
    assert not magi_train.report(ours).notes


def test_it_can_be_switched_off():
    config = Config(lowering="aot_eager", fusion=FusionConfig(padding=False))
    ours = magi_train.prepare(Attends(), config=config)
    ours(x(), padding("none")).backward()
    assert not attention_rows(ours)[0]["assumed"]


class Attends(nn.Module):
    """One attention; subclasses build its mask from `[batch, sequence]` padding."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def mask(self, pad):
        return pad.bool()[:, None, None, :]

    def forward(self, x, pad, other=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(pad)).square().mean()


class Twice(Attends):
    """A full and a windowed layer over one padding mask: the fact helps the first only."""

    def forward(self, x, pad, other=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        i = torch.arange(SEQUENCE)
        window = ((i[:, None] - i).abs() < 3) & self.mask(pad)
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(pad))
        return F.scaled_dot_product_attention(first, k, v, attn_mask=window).square().mean()


class Writes(Attends):
    """Changes the padding before it is used."""

    def mask(self, pad):
        pad[:, 3:] = 0
        return super().mask(pad)


class WritesOther(Attends):
    """Changes another argument, which may share the padding's memory."""

    def forward(self, x, pad, other=None):
        other[:, 3:] = 0
        return super().forward(x, pad)


class Remembers(Attends):
    """Reads the padding from an attribute that the user sets; the argument is not used."""

    held = None

    def mask(self, pad):
        return super().mask(self.held)


class Swaps(Attends):
    """Uses `other` where it is given."""

    def forward(self, x, pad, other=None):
        return super().forward(x, pad if other is None else other)


def x(seed=0):
    return torch.randn(BATCH, SEQUENCE, WIDTH, generator=torch.Generator().manual_seed(seed))


def prepared(kind):
    model = kind()
    twin = copy.deepcopy(model)
    return model, twin, magi_train.prepare(twin, config=EAGER_CODE)


def test_one_mask_proven_and_another_not():
    """Both depend on the same input; the form that relies on it must not take padded batches."""
    batches = [{"x": x(i), "pad": padding(k)} for i, k in enumerate(("none", "left", "none"))]
    model, twin, ours = prepared(Twice)
    assert trained_alike(model, twin, ours, batches) <= LIMIT
    plan = attention_rows(ours)[0]
    assert len(plan["unmasked"]) == len(plan["left_alone"]) == 1
    assert "sliding window of 2 keys back and 2 ahead" in plan["left_alone"][0][1]


def test_a_mask_that_is_written_in_the_step_is_left():
    model, _, ours = prepared(Writes)
    for seed in range(2):
        want = model(x(seed), padding("none"))
        assert torch.allclose(ours(x(seed), padding("none")), want, atol=LIMIT)
    assert not attention_rows(ours)[0]["unmasked"]


def test_memory_that_another_argument_shares_is_left():
    model, _, ours = prepared(WritesOther)
    mask, same = padding("none"), padding("none")
    want = model(x(), mask, mask.view(BATCH, SEQUENCE))
    got = ours(x(), same, same.view(BATCH, SEQUENCE))
    assert torch.allclose(got, want, atol=LIMIT)
    assert not attention_rows(ours)[0]["unmasked"]


def test_a_tensor_in_an_attribute_is_not_the_argument():
    model, twin, ours = prepared(Remembers)
    for kind in ("none", "left"):
        model.held = twin.held = held = padding(kind)
        given = held if kind == "none" else padding("none")
        assert torch.allclose(ours(x(), given), model(x(), given), atol=LIMIT), kind


def test_one_tensor_passed_twice_and_then_two():
    """The first call cannot tell which of two names is read."""
    model, _, ours = prepared(Swaps)
    mask = padding("none")
    for pad, other in ((mask, mask), (padding("none"), padding("left")), (mask, padding("none"))):
        assert torch.allclose(ours(x(), pad, other), model(x(), pad, other), atol=LIMIT)
    assert attention_rows(ours)[0]["unmasked"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_dtypes_and_shapes(dtype):
    model, twin, ours = prepared(Attends)
    batches = [{"x": x(i), "pad": padding(k, dtype)} for i, k in enumerate(("none", "one", "none"))]
    batches += [{"x": b["x"][:2], "pad": b["pad"][:2]} for b in batches]  # a short last batch
    batches += [{"x": b["x"][:, :7], "pad": b["pad"][:, :7]} for b in batches[:3]]
    assert trained_alike(model, twin, ours, batches) <= LIMIT


def test_steps_with_a_batch_argument():
    """prepare_step with a dict, and a step in Lightning's form with a BatchEncoding."""
    from transformers import BatchEncoding

    model, twin, ours = prepared(Attends)
    step = magi_train.prepare_step(lambda batch: ours(**batch), ours)
    lightning = Region(ours._magi_runtime, lambda batch, index: ours(**batch), "training_step")
    for kind in ("none", "left", "none"):
        batch = {"x": x(), "pad": padding(kind)}
        for call, given in ((step, batch), (lambda b: lightning(b, 0), BatchEncoding(batch))):
            model.zero_grad()
            twin.zero_grad()
            model(**batch).backward()
            call(given).backward()
            assert difference(gradients(twin), gradients(model)) <= LIMIT
    proven = [p["assumed"] for p in attention_rows(ours) if p["unmasked"]]
    assert proven == [["l_args_0_pad_"], ["l_args_0_data_pad_"]]


class Crosses(Attends):
    """Queries of one sequence, keys and values of another with its own padding."""

    def forward(self, x, pad, memory):
        q = self.qkv(x)[..., :WIDTH].unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = self.qkv(memory)[..., WIDTH:].unflatten(-1, (2, 4, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(pad)).square().mean()


def test_cross_attention():
    model, twin, ours = prepared(Crosses)
    batches = [
        {"x": x(i)[:, :7], "memory": x(9 + i), "pad": padding(kind)}
        for i, kind in enumerate(("none", "right", "none"))
    ]
    assert trained_alike(model, twin, ours, batches) <= LIMIT
    assert attention_rows(ours)[0]["unmasked"]


def test_lightning_moves_are_recorded():
    from lightning.pytorch import LightningModule

    from magi_train.core.facts import NOTHING, ONES, known
    from magi_train.integrations.lightning import strategy_class

    strategy, far = strategy_class("lightning.pytorch")(), torch.device("meta")
    batch = {"mask": padding("none"), "padded": padding("left")}
    got = strategy.batch_to_device(batch, far)
    assert [known(got[n]) for n in batch] == [ONES, NOTHING]

    class Hooks(LightningModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"mask": batch["mask"] * 1, "padded": batch["padded"]}

    strategy._lightning_module = Hooks()
    got = strategy.batch_to_device(batch, far)
    assert [known(got[n]) for n in batch] == [None, NOTHING], "the hook made another tensor"
