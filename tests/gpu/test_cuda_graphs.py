"""CUDA graphs on a device: parity with plain launches, replays that happened, failed captures."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import magi_train
from magi_train import Config
from magi_train.replay import REPLAYS, TIMED, WARM
from tests.close import difference, tolerance
from tests.models import gpt2, images, resnet, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 12
LIMIT = tolerance(torch.bfloat16, 64)


def text(i):
    return {"input_ids": tokens(i).cuda(), "labels": tokens(i).cuda()}


def pictures(i):
    return {"pixel_values": images(i).cuda(), "labels": (tokens(i)[:, 0] % 5).cuda()}


def train(model, batch_of, graphs, *, steps=STEPS, accumulate=1, keep=False, to_none=True):
    """Train; return losses, what was kept, the parameters and buffers, and the report."""
    torch.manual_seed(0)
    model = copy.deepcopy(model).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prepared, optimizer = magi_train.prepare(
        model, optimizer, config=Config(tier="graph", cuda_graphs=graphs)
    )
    losses, kept = [], []
    for i in range(steps):
        with torch.autocast("cuda", torch.bfloat16):
            out = prepared(**batch_of(i))
        (out.loss / accumulate).backward()
        losses.append(out.loss)
        if keep:
            kept.append(out.logits)
        if i % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    seen = {f"loss {i}": x.detach() for i, x in enumerate(losses)}
    seen |= {f"logits {i}": x.detach().float() for i, x in enumerate(kept)}
    return seen, dict(model.state_dict()), magi_train.report(prepared)


def compare(model, batch_of, at_least, **options):
    torch.manual_seed(1)
    want, want_state, _ = train(model, batch_of, False, **options)
    got, got_state, report = train(model, batch_of, True, **options)
    assert report.measured.get(REPLAYS, 0) >= at_least, report
    assert difference(got, want) <= LIMIT
    numbers = {n: t for n, t in want_state.items() if t.is_floating_point()}
    assert difference({n: got_state[n] for n in numbers}, numbers) <= LIMIT
    for n, t in want_state.items():
        assert t.is_floating_point() or torch.equal(got_state[n], t), n
    return report


def test_gpt2_with_dropout_and_outputs_kept():
    """The masks of each step are the plain run's; every logits tensor stays what it was."""
    compare(gpt2(dropout=0.1), text, STEPS - WARM - 2, keep=True)


def test_gpt2_wide_outputs_in_a_variable():
    """Logits above the size that is copied from the start: found alive once, then copied."""

    def batch_of(i):
        ids = tokens(i, batch=8).repeat(1, 64).cuda()
        return {"input_ids": ids, "labels": ids}

    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=1024)
    )
    compare(model, batch_of, STEPS - WARM - 3)


@pytest.mark.parametrize("to_none", [True, False])
def test_accumulation(to_none):
    report = compare(
        gpt2(dropout=0.1), text, 2 * STEPS - WARM - 3,
        steps=2 * STEPS, accumulate=4, to_none=to_none,
    )  # fmt: skip
    assert to_none is ("gradients that outlive" in str(report))


def test_batch_norm_statistics_move_once_a_step():
    compare(resnet(), pictures, STEPS - WARM - 1)


def test_timm_resnet():
    timm = pytest.importorskip("timm")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("resnet18", num_classes=5)

        def forward(self, pixel_values, labels):
            logits = self.net(pixel_values)
            return Output(F.cross_entropy(logits, labels), logits)

    compare(Model(), pictures, STEPS - WARM - 1)


class Output(dict):
    """What a model returns, with attributes."""

    def __init__(self, loss, logits):
        super().__init__(loss=loss, logits=logits)

    loss = property(lambda self: self["loss"])
    logits = property(lambda self: self["logits"])


def test_each_replay_drops_others():
    """Dropout's masks differ between replays, and a seed brings them back."""
    prepared = magi_train.prepare(
        nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).cuda(),
        config=Config(tier="graph", cuda_graphs=True),
    )
    x = torch.randn(8, 64, device="cuda")

    def run():
        out = prepared(x)
        out.sum().backward()
        prepared.zero_grad()
        return out.detach().clone()

    for _ in range(WARM + 2):
        run()
    torch.manual_seed(7)
    first, second = run(), run()
    torch.manual_seed(7)
    again = run()
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert magi_train.report(prepared).measured[REPLAYS] >= 4


def test_auto_measures_and_says_so():
    model = gpt2().cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    prepared, optimizer = magi_train.prepare(model, optimizer, config=Config(tier="graph"))
    for i in range(WARM + 2 * TIMED + 8):
        with torch.autocast("cuda", torch.bfloat16):
            loss = prepared(**text(i)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = magi_train.report(prepared)
    row = next(row for row in report.rows if row.name == "cuda_graphs")
    assert row.plan["replayed"] or "it does not pay" in row.plan["reason"]
    assert report.measured[REPLAYS] > TIMED


@torch.library.custom_op("magi_test::waits", mutates_args=())
def waits(x: torch.Tensor) -> torch.Tensor:
    """An op that waits for the device, which no capture allows."""
    return x * 1 if x.abs().sum().item() >= 0 else x


waits.register_fake(lambda x: torch.empty_like(x))
waits.register_autograd(lambda ctx, g: g)


def test_a_failed_capture_leaves_a_usable_process():
    class Waiting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            return F.dropout(waits(self.inner(x)), 0.5).square().mean()

    model = Waiting().cuda()
    prepared = magi_train.prepare(model, config=Config(tier="graph", cuda_graphs=True))
    stream = torch.cuda.current_stream()
    for _ in range(WARM + 3):
        prepared(torch.randn(4, 16, device="cuda")).backward()
    report = magi_train.report(prepared)
    assert "capture failed" in str(report)
    assert REPLAYS not in report.measured
    assert torch.cuda.current_stream() == stream
    torch.randn(3, device="cuda").sum().item()  # the generator works
    before = torch.cuda.memory_reserved()
    del prepared, model
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    # and other graphs can still be captured
    compare(gpt2(dropout=0.1), text, STEPS - WARM - 2)


def test_memory_is_that_of_one_step():
    """The pool takes the place of the plain step's activations, it does not double them."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(16))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x.square().mean()

    peaks = []
    for graphs in (False, True):
        prepared = magi_train.prepare(
            Deep().cuda(), config=Config(tier="graph", cuda_graphs=graphs)
        )
        x = torch.randn(65536, 256, device="cuda")
        for i in range(8):
            if i == 5:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            prepared(x).backward()
            prepared.zero_grad()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_reserved())
        del prepared
        torch.cuda.empty_cache()
    batch = x.nbytes
    assert peaks[1] <= peaks[0] * 1.1 + 2 * batch, peaks
